//! XFS: the super-block; what decides is in the log ([`super::xfs_log`]).
//!
//! Source: "XFS Algorithms & Data Structures", Superblocks; Linux `fs/xfs/libxfs/xfs_format.h`.

use block::Result;

use super::checksum::crc32c;
use super::verdict::{Finding, FsKind, Verdict};
use super::volume::{Block, Volume};
use super::xfs_log::{self, Log};

const BLOCK_SIZE: usize = 4;
const LOG_START: usize = 48;
const AG_BLOCKS: usize = 84;
const AG_COUNT: usize = 88;
const LOG_BLOCKS: usize = 96;
const VERSION: usize = 100;
const SECTOR_SIZE: usize = 102;
const LABEL: usize = 108;
const AG_BLOCK_BITS: usize = 124;
const IN_PROGRESS: usize = 126;
const INCOMPAT: usize = 216;
const CHECKSUM: usize = 224;

const INCOMPAT_NEEDS_REPAIR: u32 = 0x10;
const CHECKED_VERSION: u16 = 5;

pub(super) fn probe(volume: &Volume<'_>) -> Result<Option<Finding>> {
    let Some(block) = volume.read(0, 512)?.filter(|block| block.has(0, b"XFSB")) else { return Ok(None) };
    let (verdict, detail) = judge(volume, &block)?;
    Ok(Some(Finding::new(FsKind::Xfs, verdict, detail).labelled(block.label(LABEL, 12))))
}

fn judge(volume: &Volume<'_>, block: &Block) -> Result<(Verdict, String)> {
    let version = block.be16(VERSION) & 0xf;
    if version >= CHECKED_VERSION && !is_sum_right(volume, block)? {
        return Ok((Verdict::Dirty, "the super-block's checksum is wrong".into()));
    }
    if block.u8(IN_PROGRESS) != 0 {
        return Ok((Verdict::Dirty, "mkfs or a copy of the file system has not ended".into()));
    }
    if version >= CHECKED_VERSION && block.be32(INCOMPAT) & INCOMPAT_NEEDS_REPAIR != 0 {
        return Ok((Verdict::Dirty, "it asks for xfs_repair".into()));
    }
    if block.be64(LOG_START) == 0 {
        return Ok((Verdict::Unknown, "its log is on another device".into()));
    }
    let Some((start, len)) = log_range(block) else {
        return Ok((Verdict::Unknown, "the super-block's sizes make no sense".into()));
    };
    let Some(log) = volume.part(start, len) else {
        return Ok((Verdict::Unknown, "the log ends past the end of the partition".into()));
    };
    let (verdict, detail) = match xfs_log::read(&log)? {
        Log::Unmounted => (Verdict::Clean, "the log ends with an unmount record"),
        Log::Empty => (Verdict::Clean, "the log is empty"),
        Log::Covered => (
            Verdict::Clean,
            "the log is covered, as a freeze leaves it: recovery would only write the super-block again \
             (xfs_repair -n calls it dirty all the same)",
        ),
        Log::Pending => (Verdict::Replay, "the log holds transactions to be replayed"),
        Log::Unsettled => {
            (Verdict::Replay, "the log ends within a write, recovery finds its last whole record")
        }
        Log::Foreign => {
            (Verdict::Unknown, "the log was written by a machine of another byte order, which must replay it")
        }
    };
    Ok((verdict, detail.into()))
}

/// The super-block fills a sector of the file system, and its sum is made with its own field as zero.
fn is_sum_right(volume: &Volume<'_>, block: &Block) -> Result<bool> {
    let size = usize::from(block.be16(SECTOR_SIZE));
    let whole = volume.read(0, size)?;
    Ok(whole.is_some_and(|whole| {
        let sum = crc32c(&[whole.bytes(0, CHECKSUM), &[0; 4], whole.bytes(CHECKSUM + 4, size)]);
        size >= 512 && sum == whole.le32(CHECKSUM)
    }))
}

/// The log's first byte and its length. The start is a block's number with the allocation group in the higher bits.
fn log_range(block: &Block) -> Option<(u64, u64)> {
    let (size, bits) = (u64::from(block.be32(BLOCK_SIZE)), u32::from(block.u8(AG_BLOCK_BITS)));
    if !size.is_power_of_two() || !(512..=64 * 1024).contains(&size) || bits > 31 {
        return None;
    }
    let start = block.be64(LOG_START);
    let (group, within) = (start >> bits, start & ((1 << bits) - 1));
    if group >= u64::from(block.be32(AG_COUNT)) {
        return None;
    }
    let first = group * u64::from(block.be32(AG_BLOCKS)) + within;
    Some((first.checked_mul(size)?, u64::from(block.be32(LOG_BLOCKS)) * size))
}
