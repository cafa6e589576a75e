//! Each target on its seeds and on mutations of them, for a moment.

use std::time::Duration;

use block::testing::{drive, keep_seeds};

use super::*;

/// How long the mutations of one target run here. `make fuzz` runs them longer.
const MOMENT: Duration = Duration::from_secs(3);

/// The seeds of file systems are what their tools make, but for zeroes; two of them once more, with something to replay.
#[test]
fn disks_of_any_content_are_probed() {
    let piece = |at: u32, bytes: &[u8]| {
        [&(at / 16).to_be_bytes()[..], &(bytes.len() as u16).to_be_bytes(), bytes].concat()
    };
    let entry = |kind: u8, start: u32, sectors: u32| {
        let mut entry = vec![0, 0, 0, 0, kind, 0, 0, 0];
        entry.extend([start, sectors].map(u32::to_le_bytes).concat());
        entry
    };
    let record = |entries: &[Vec<u8>]| {
        let mut sector = vec![0; 512 - 432];
        entries
            .iter()
            .enumerate()
            .for_each(|(index, entry)| sector[14 + 16 * index..][..16].copy_from_slice(entry));
        sector[78..].copy_from_slice(&[0x55, 0xaa]);
        sector
    };
    let mut header = b"EFI PART\0\0\x01\0\x5c\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    header.extend([1_u64, 2047, 34, 2014].map(u64::to_le_bytes).concat());
    header.extend([7; 16]);
    header.extend(2_u64.to_le_bytes());
    header.extend([4_u32, 128, 0].map(u32::to_le_bytes).concat());
    let mut partition = vec![9; 32];
    partition.extend([34_u64, 1000, 0].map(u64::to_le_bytes).concat());
    partition.extend(b"r\0o\0o\0t\0");
    let gpt = [
        &[8, 0][..],
        &piece(432, &record(&[entry(0xee, 1, 2047)])),
        &piece(512, &header),
        &piece(1024, &partition),
        &piece(512, &[]),
    ];
    let logical = [
        &[8, 0][..],
        &piece(432, &record(&[entry(0x83, 8, 100), entry(5, 200, 1000)])),
        &piece(200 * 512 + 432, &record(&[entry(0x83, 8, 100), entry(5, 300, 200)])),
        &piece(500 * 512 + 432, &record(&[entry(0x82, 8, 100), entry(5, 0, 200)])),
    ];
    keep_seeds("probe", &[("gpt", gpt.concat()), ("logical", logical.concat())]);
    drive("probe", probe, MOMENT);
}

#[test]
fn state_directories_of_any_content_are_opened_or_refused() {
    let plain = r#"{"version":1,"boot-id":"b","disks":{"vda":{"layers":[{"path":"/i/a.raw","format":"raw","number":0}],"next":1}},"snapshots":[]}"#;
    let full = r#"{"version":1,"boot-id":"b","disks":{"vda":{"layers":[
        {"path":"/i/a.raw","format":"raw","number":0,"sealed":true,"merged":2},
        {"path":"/i/a.vda-000003.qcow2","format":"qcow2","number":3,"sealed":true},
        {"path":"/i/a.vda-000006.qcow2","format":"qcow2","number":6}],"next":7,
        "base":{"path":"/i/a.raw","format":"raw"},
        "marks":{"bitmaps":[{"name":"b","granularity":65536,"persistent":true,"since":{"boundary":2,"capacity":4096},"bits":5},
        {"name":"t","granularity":512,"persistent":false,"since":{"boundary":7,"capacity":4096}}],
        "history":{"folded":[{"from":0,"to":3,"bits":4}],"reverts":[{"to":2,"at":3}]}}}},
        "snapshots":[{"name":"s","time":"2026-01-02T03:04:05Z","grade":"crash","reason":"r","sealed":true,
        "timing":{"prepare":1.0,"gate":1.0,"drain":1.0,"pivot":1.0,"open":1.0,"seal":1.0,"gate-closed":1.0,"longest-wait":1.0},
        "disks":[{"id":"vda","path":"/i/a.raw","format":"raw"}]},
        {"name":"u","time":"2026-01-02T03:04:06Z","grade":"crash","reason":"r","sealed":false,
        "timing":{"prepare":1.0,"gate":1.0,"drain":1.0,"pivot":1.0,"open":1.0,"seal":1.0,"gate-closed":1.0,"longest-wait":1.0},
        "disks":[{"id":"vda","path":"/i/a.vda-000003.qcow2","format":"qcow2"}]}],
        "pending":"t","deleting":["s"],
        "jobs":[{"id":"j","task":{"merge":{"disk":"vda","lowest":0,"highest":3}},"automatic":true,"auto-dismiss":true,"speed":0,"paused":false,
        "moves":[{"disk":"vda","direction":"down","lowest":0,"highest":3,"copied":9}]},
        {"id":"k","task":{"delete":{"snapshot":"s"}},"automatic":false,"auto-dismiss":true,"speed":0,"paused":true}],
        "checkpoints":[{"name":"c","time":"2026-01-02T03:04:05Z","grade":"filesystem","reason":"r","disks":[{"id":"vda","boundary":4,"capacity":512}]}]}"#;
    let mended = full.replace('\n', "").replace("        ", "");
    crate::manifest::Manifest::parse(mended.as_bytes()).unwrap();
    let spoiled = [
        ("later-version", r#""version":1"#, r#""version":2"#),
        ("next-taken", r#""next":7"#, r#""next":6"#),
        ("number-twice", r#""number":3"#, r#""number":0"#),
        ("merged-later", r#""merged":2"#, r#""merged":7"#),
        ("folded-nothing", r#""from":0,"to":3"#, r#""from":3,"to":3"#),
        ("folded-later", r#""from":0,"to":3"#, r#""from":0,"to":8"#),
        ("reverted-later", r#""to":2,"at":3"#, r#""to":2,"at":7"#),
    ];
    let spoil = |(name, sound, not): (_, &str, &str)| (name, mended.replacen(sound, not, 1).into_bytes());
    let mut made = vec![("plain", plain.into()), ("full", mended.clone().into_bytes())];
    made.extend(spoiled.map(spoil));
    keep_seeds("state", &made);
    drive("state", state, MOMENT);
}

#[test]
fn files_of_changes_are_read_as_the_model_says() {
    let header = |capacity: u64, granularity: u32| {
        [b"FRAZILM1", &capacity.to_be_bytes()[..], &granularity.to_be_bytes(), &[0; 4]].concat()
    };
    let made = [
        ("small", [&[1], &header(70_000, 12)[..], &[0x81, 0, 3]].concat()),
        ("empty", [&[1], &header(0, 9)[..]].concat()),
        ("many", [&[1], &header(4096 << 12, 12)[..], &[0x10; 512]].concat()),
        ("unsealed", [&[0], &header(4096, 9)[..], &[1, 0, 0, 0, 0]].concat()),
    ];
    keep_seeds("bits", &made);
    drive("bits", bits, MOMENT);
}
