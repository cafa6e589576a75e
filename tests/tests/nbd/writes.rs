//! Exports that are written: throw-away overlays, as for an instant restore or for fsck.

use std::process::Command;

use super::served::{MIB, Served, overlay, run};

fn qemu_io(served: &Served, commands: &[&str]) -> String {
    let mut io = Command::new("qemu-io");
    for command in commands {
        io.args(["-c", command]);
    }
    let found = run(io.args(["-f", "raw"]).arg(served.uri()));
    assert!(!found.contains("failed"), "{found}");
    found
}

#[test]
fn qemu_io_writes_zeroes_discards_and_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut content = overlay(folder.path());
    let served = Served::new(content.export);
    qemu_io(
        &served,
        &[
            "write -P 0x31 1000448 70144",
            "write -f -P 0x32 5M 2M",
            "write -z 5M 64k",
            "write -z -u 6M 1M",
            "write -P 0x33 6M 4k",
            "flush",
            "read -P 0x31 1000448 70144",
            "read -P 0 5M 64k",
            "read -P 0x33 6M 4k",
            "read -P 0 6295552 4k",
            "read -P 0x21 10M 64k",
        ],
    );
    for (from, len, fill) in [
        (1_000_448, 70_144, 0x31),
        (5 * MIB, 2 * MIB, 0x32),
        (5 * MIB, 65_536, 0),
        (6 * MIB, MIB, 0),
        (6 * MIB, 4096, 0x33),
    ] {
        content.bytes[from as usize..(from + len) as usize].fill(fill);
    }
    assert!(served.copied() == content.bytes);
    qemu_io(&served, &["discard 10M 1M", "read -P 0 10M 1M"]);
}

#[test]
fn nbdcopy_fills_an_export() {
    let folder = tempfile::tempdir().unwrap();
    let content = overlay(folder.path());
    let served = Served::new(content.export);
    let mut bytes = content.bytes.clone();
    bytes.rotate_left(5 * MIB as usize + 512);
    let source = served.path("source");
    std::fs::write(&source, &bytes).unwrap();
    run(Command::new("nbdcopy").args(["--flush", "--destination-is-zero"]).arg(&source).arg(served.uri()));
    // What was there and is zero in the source was not written, for the destination was said to be zero.
    run(Command::new("nbdcopy").args(["--flush", "--allocated"]).arg(&source).arg(served.uri()));
    assert!(served.copied() == bytes);
}

#[test]
fn fio_verifies_what_it_writes() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::new(overlay(folder.path()).export);
    let found = run(Command::new("fio").args([
        "--name=verify",
        "--ioengine=nbd",
        &format!("--uri={}", served.uri()),
        "--rw=randwrite",
        "--bsrange=512-256k",
        "--bs_unaligned=0",
        "--iodepth=16",
        "--size=24m",
        "--io_size=48m",
        "--norandommap",
        "--fsync=64",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--serialize_overlap=1",
        "--randseed=7",
    ]));
    assert!(found.contains("err= 0"), "{found}");
}
