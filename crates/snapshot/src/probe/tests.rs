//! What no tool at hand makes, byte by byte; images of real tools are in the suite of `tests/`.

use std::sync::Arc;

use block::testing::{FaultStorage, MemStorage};
use block::{RawDisk, Storage};

use super::*;

/// Places on a disk, and the bytes there.
type Parts<'a> = &'a [(usize, &'a [u8])];

/// A disk of 256 KiB with these bytes at these places.
fn disk(parts: Parts<'_>) -> RawDisk {
    let mut bytes = vec![0; 256 << 10];
    for (at, part) in parts {
        bytes[*at..*at + part.len()].copy_from_slice(part);
    }
    RawDisk::new(Arc::new(MemStorage::from(bytes)), true).unwrap()
}

fn only(parts: Parts<'_>) -> FsVerdict {
    let verdicts = probe(&disk(parts)).unwrap();
    assert_eq!(verdicts.len(), 1, "{verdicts:?}");
    verdicts[0].clone()
}

#[test]
fn layers_in_between_are_named_and_not_looked_into() {
    let md = [0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0];
    let cases: [(FsKind, Parts<'_>); 8] = [
        (FsKind::Lvm, &[(512, b"LABELONE\x01\0\0\0\0\0\0\0"), (536, b"LVM2 001")]),
        (FsKind::Luks, &[(0, b"LUKS\xba\xbe\0\x02")]),
        (FsKind::MdRaid, &[(0, &md)]),
        (FsKind::MdRaid, &[(4096, &md)]),
        (FsKind::MdRaid, &[((256 << 10) - 8192, &md)]),
        (FsKind::MdRaid, &[(192 << 10, &[0xfc, 0x4e, 0x2b, 0xa9, 0, 0, 0, 0])]),
        (FsKind::Swap, &[((64 << 10) - 10, b"SWAPSPACE2")]),
        (FsKind::BsdLabel, &[(512, &[0x57, 0x45, 0x56, 0x82]), (644, &[0x57, 0x45, 0x56, 0x82])]),
    ];
    for (kind, parts) in cases {
        let found = only(parts);
        assert_eq!((found.kind, found.verdict), (kind, Verdict::Opaque), "{found:?}");
    }
}

#[test]
fn an_lvm_label_in_another_sector_than_it_says_is_a_copy() {
    let found = only(&[(1024, b"LABELONE\x01\0\0\0\0\0\0\0"), (1048, b"LVM2 001")]);
    assert_eq!(found.kind, FsKind::Unknown);
}

#[test]
fn a_hibernated_system_in_the_swap_space_is_told() {
    let found = only(&[(4086, b"S1SUSPEND\0")]);
    assert!(found.detail.contains("hibernated"), "{}", found.detail);
}

/// A btrfs super-block with a checksum of a kind that is not verified, so that none is needed.
fn btrfs(label: &[u8]) -> FsVerdict {
    let at = 64 << 10;
    let place = (at as u64).to_le_bytes();
    only(&[(at + 0x30, &place), (at + 0x40, b"_BHRfS_M"), (at + 0xc4, &[1, 0]), (at + 0x12b, label)])
}

#[test]
fn a_label_can_not_steer_a_terminal() {
    assert_eq!(btrfs(b"home \xff\x1b[2J").label.as_deref(), Some("home \u{fffd}\u{fffd}[2J"));
    assert_eq!(btrfs(b"   ").label, None);
}

#[test]
fn verdicts_are_written_as_the_protocol_spells_them() {
    let json = serde_json::to_value(btrfs(b"home")).unwrap();
    let expected = serde_json::json!({
        "label": "home", "offset": 0, "size": 256 << 10, "kind": "btrfs", "verdict": "clean",
        "detail": "no log tree (log_root is 0)", "unknowable": FsKind::Btrfs.unknowable(),
    });
    assert_eq!(json, expected);
    assert_eq!(serde_json::to_value(FsKind::MdRaid).unwrap(), "md-raid");
    assert_eq!(serde_json::from_value::<FsVerdict>(json).unwrap(), btrfs(b"home"));
}

#[test]
fn a_disk_that_can_not_be_read_is_an_error() {
    let storage = Arc::new(FaultStorage::new(MemStorage::new(1 << 20)));
    let disk = RawDisk::new(Arc::clone(&storage) as Arc<dyn Storage>, true).unwrap();
    storage.fail_reads(1);
    assert!(probe(&disk).is_err());
    assert!(probe(&disk).is_ok());
}

#[test]
fn a_disk_without_a_sector_has_no_signature() {
    let disk = RawDisk::new(Arc::new(MemStorage::new(100)), true).unwrap();
    assert_eq!(probe(&disk).unwrap()[0].kind, FsKind::Unknown);
}

/// Nothing was said of such a disk at all.
#[test]
fn a_table_without_partitions_is_told() {
    let header = *b"EFI PART\0\0\x01\0\x5c\0\0\0";
    let mut rest = vec![0; 76];
    rest[8..16].copy_from_slice(&1_u64.to_le_bytes());
    rest[56..64].copy_from_slice(&2_u64.to_le_bytes());
    rest[64..72].copy_from_slice(&[4_u32, 128].map(u32::to_le_bytes).concat());
    rest[72..].copy_from_slice(&crc32fast::hash(&[0; 512]).to_le_bytes());
    let sum = crc32fast::hash(&[&header, &rest[..]].concat());
    rest[..4].copy_from_slice(&sum.to_le_bytes());
    let protective: &[u8] = &[0, 0, 0, 0, 0xee, 0, 0, 0, 1, 0, 0, 0, 0xff, 1, 0, 0];
    let found = only(&[(446, protective), (510, &[0x55, 0xaa]), (512, &header), (528, &rest)]);
    assert_eq!(
        (found.verdict, found.detail.as_str()),
        (Verdict::Unknown, "a partition table without partitions")
    );
}
