//! Btrfs against btrfs-progs.

use snapshot::probe::{FsKind, Verdict};

use crate::disk::Image;
use crate::expect;
use crate::tools::{ask, run};

const SUPER_BLOCK: u64 = 64 << 10;
const LOG_ROOT: usize = 0x60;

pub(crate) fn make() -> Image {
    let image = Image::new(128 << 20);
    run("mkfs.btrfs", &["-q", "-L", "home", image.path()]);
    image
}

/// CRC-32C, written down once more: the probe's own must not judge itself.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut sum = u32::MAX;
    for byte in bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 };
        }
    }
    !sum
}

fn set_log_root(image: &Image, log_root: u64) {
    let mut block = image.read(SUPER_BLOCK, 4096);
    block[LOG_ROOT..LOG_ROOT + 8].copy_from_slice(&log_root.to_le_bytes());
    let sum = crc32c(&block[32..]);
    block[..4].copy_from_slice(&sum.to_le_bytes());
    image.write(SUPER_BLOCK, &block);
}

fn dump(image: &Image) -> (String, String) {
    let said = run("btrfs", &["inspect-internal", "dump-super", image.path()]);
    (said.field("log_root\t"), said.field("csum\t"))
}

#[test]
fn a_new_one_is_clean_and_btrfs_check_agrees() {
    let image = make();
    let found = expect(&image, FsKind::Btrfs, Verdict::Clean);
    assert_eq!(found.label.as_deref(), Some("home"));
    assert_eq!(dump(&image).0, "0");
    assert_eq!(ask("btrfs", &["check", image.path()]).status, 0);
}

#[test]
fn a_log_tree_needs_replay_until_it_is_dropped() {
    let image = make();
    set_log_root(&image, 30_687_232);
    let (log_root, sum) = dump(&image);
    assert_eq!(log_root, "30687232");
    assert!(sum.ends_with("[match]"), "{sum}");
    expect(&image, FsKind::Btrfs, Verdict::Replay);
    set_log_root(&image, 0);
    expect(&image, FsKind::Btrfs, Verdict::Clean);
}

#[test]
fn a_damaged_super_block_is_dirty() {
    let image = make();
    image.write(SUPER_BLOCK + 0x12b, b"other");
    assert!(dump(&image).1.ends_with("[DON'T MATCH]"));
    expect(&image, FsKind::Btrfs, Verdict::Dirty);
}

#[test]
fn one_of_several_devices_says_so() {
    let (first, second) = (Image::new(128 << 20), Image::new(128 << 20));
    run("mkfs.btrfs", &["-q", first.path(), second.path()]);
    let found = expect(&second, FsKind::Btrfs, Verdict::Clean);
    assert!(found.detail.contains("one of 2 devices"), "{}", found.detail);
}
