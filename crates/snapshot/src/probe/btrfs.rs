//! Btrfs.
//!
//! Source: btrfs documentation, "On-disk format", super-block; `btrfs_sync_log` and `btrfs_commit_transaction` in Linux
//! `fs/btrfs`. All is copy-on-write beneath one super-block, so what it points to is consistent by itself; only an
//! fsync since the last commit leaves something to replay, the log tree that `log_root` points to. A commit, hence
//! a freeze, resets it to 0.

use block::Result;

use super::checksum::crc32c;
use super::verdict::{Finding, FsKind, Verdict};
use super::volume::{Block, Volume};

/// The first of the super-block's copies, and the only one that Linux mounts by.
const SUPER_BLOCK: u64 = 64 * 1024;
const SIZE: usize = 4096;

const CHECKSUM: usize = 0x00;
const CHECKSUM_LEN: usize = 0x20;
const BYTE_NUMBER: usize = 0x30;
const FLAGS: usize = 0x38;
const MAGIC: usize = 0x40;
const LOG_ROOT: usize = 0x60;
const DEVICES: usize = 0x88;
const CHECKSUM_TYPE: usize = 0xc4;
const LABEL: usize = 0x12b;

const CHECKSUM_CRC32C: u16 = 0;
const FLAG_ERROR: u64 = 1 << 2;

pub(super) fn probe(volume: &Volume<'_>) -> Result<Option<Finding>> {
    Ok(volume.read(SUPER_BLOCK, SIZE)?.and_then(|block| parse(&block)))
}

fn parse(block: &Block) -> Option<Finding> {
    if !block.has(MAGIC, b"_BHRfS_M") || block.le64(BYTE_NUMBER) != SUPER_BLOCK {
        return None;
    }
    let (verdict, mut detail) = judge(block);
    if block.le64(DEVICES) > 1 {
        detail.push_str(&format!("; one of {} devices, judged by this one alone", block.le64(DEVICES)));
    }
    Some(Finding::new(FsKind::Btrfs, verdict, detail).labelled(block.label(LABEL, 256)))
}

fn judge(block: &Block) -> (Verdict, String) {
    let sum = crc32c(&[block.bytes(CHECKSUM_LEN, SIZE)]);
    if block.le16(CHECKSUM_TYPE) == CHECKSUM_CRC32C && sum != block.le32(CHECKSUM) {
        return (Verdict::Dirty, "the super-block's checksum is wrong".into());
    }
    if block.le64(FLAGS) & FLAG_ERROR != 0 {
        return (Verdict::Dirty, "errors are noted in the super-block".into());
    }
    match block.le64(LOG_ROOT) {
        0 => (Verdict::Clean, "no log tree (log_root is 0)".into()),
        root => (Verdict::Replay, format!("a log tree is to be replayed (log_root {root})")),
    }
}
