//! The XFS log: where it ends, and what its recovery would write.
//!
//! Source: "XFS Algorithms & Data Structures", Journaling Log; Linux `fs/xfs/libxfs/xfs_log_format.h` for the fields,
//! `xlog_find_head`, `xlog_find_tail` and `xlog_check_unmount_rec` in `xfs_log_recover.c` for the search, and
//! `xfs_log_quiesce`, `xfs_log_cover` and `xfs_log_unmount_write` in `xfs_log.c` for what ends a log.
//!
//! ```text
//!  cycle  3 3 3 3 3 3 3 3 3 3 3 3 3 3 2 2 2 2 2 2 2      each 512-byte block begins with its cycle (a record's header
//!         ······▏record ▏record ▏rec▏ old blocks ···      with a magic number, then the cycle)
//!               ▲tail               ▲head
//! ```
//!
//! The log is a ring. Its **head** is where the cycle drops; the last record before it states the **tail**, from where
//! recovery replays. What ends a log:
//!
//! - *Unmount*: the last record holds one operation, flagged as the unmount record: nothing is replayed.
//! - *Freeze*, or some time without a change: all that was logged is in its place, and then the log is **covered**:
//!   records that hold nothing but the super-block are written until the tail is past everything else. A freeze leaves
//!   the log so on purpose, for recovery also frees deleted files that were still open. Kernels before 5.12 write an
//!   unmount record and then one with the super-block. Both are recognised by the same rule: between tail and head
//!   there is no operation but on the super-block, or unmount records.
//! - Anything else is to be replayed.
//!
//! A block's cycle tells that this very block was written, and sectors are written whole; so where all cycles between
//! tail and head are right there is no torn write, and the records' checksums need not be made.

use block::Result;

use super::volume::{Block, LONGEST_READ, Volume};

/// The log's own unit ("basic block"), whatever the file system's.
const BLOCK: usize = 512;
const MAGIC: u32 = 0xfeed_babe;

const CYCLE: usize = 4;
const RECORD_VERSION: usize = 8;
const LEN: usize = 12;
const LSN: usize = 16;
const TAIL_LSN: usize = 24;
const OPERATIONS: usize = 40;
const CYCLE_DATA: usize = 44;
const FORMAT: usize = 300;
const BUFFER_SIZE: usize = 320;

const VERSION_2: u32 = 2;
const FORMAT_LINUX_LITTLE_ENDIAN: u32 = 1;
/// Bytes of data whose first words one header block keeps.
const DATA_PER_HEADER: usize = 32 * 1024;
/// The longest record, without its header.
const MAX_RECORD: usize = 256 * 1024;
/// The most blocks a record has, header included.
const MAX_RECORD_BLOCKS: u64 = ((MAX_RECORD + MAX_RECORD / DATA_PER_HEADER * BLOCK) / BLOCK) as u64;
/// A covered log has two records between tail and head, three after an old kernel's freeze.
const MAX_COVERED_BLOCKS: u64 = 4 * MAX_RECORD_BLOCKS;

/// Within an operation's header of 12 bytes.
const OPERATION_SIZE: usize = 12;
const OPERATION_LEN: usize = 4;
const OPERATION_FLAGS: usize = 9;
const START: u8 = 0x01;
const CONTINUES: u8 = 0x04 | 0x08;
const UNMOUNT: u8 = 0x20;

const TRANSACTION_MAGIC: u32 = 0x5452_414e;
const TRANSACTION_SIZE: usize = 16;
/// A logged buffer, in its description: type, number of regions, and the buffer's disk address.
const BUFFER_ITEM: u16 = 0x123c;
const ITEM_REGIONS: usize = 2;
const ITEM_ADDRESS: usize = 8;

/// What the end of the log says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Log {
    /// Nothing was ever written.
    Empty,
    /// It ends with an unmount record.
    Unmounted,
    /// Recovery would write nothing but the super-block.
    Covered,
    /// There is something to replay.
    Pending,
    /// The end is not where a record ends: writes were in flight.
    Unsettled,
    /// Its transactions are in another byte order than ours.
    Foreign,
}

/// Reads the end of the log that fills `volume`.
pub(super) fn read(volume: &Volume<'_>) -> Result<Log> {
    let ring = Ring { volume, blocks: volume.size() / BLOCK as u64 };
    if ring.blocks < 2 || ring.cycle(0)? == 0 {
        return Ok(Log::Empty);
    }
    let head = ring.head()?;
    let Some((at, record)) = ring.last_record(head)? else { return Ok(Log::Unsettled) };
    if ring.after(at, record.blocks()) != head {
        return Ok(Log::Unsettled);
    }
    let (tail_cycle, tail) = record.tail;
    let distance = (head + ring.blocks - tail % ring.blocks) % ring.blocks;
    if record.operations == 1
        && let Some(bytes) = ring.bytes(at, record.header_blocks + 1)?
        && record.data(&bytes).u8(OPERATION_FLAGS) & UNMOUNT != 0
    {
        return Ok(Log::Unmounted);
    }
    if record.format != FORMAT_LINUX_LITTLE_ENDIAN {
        return Ok(Log::Foreign);
    }
    if tail >= ring.blocks || distance == 0 || distance > MAX_COVERED_BLOCKS {
        return Ok(Log::Pending);
    }
    ring.replay(tail, tail_cycle, distance)
}

/// The log's blocks; all numbers are numbers of blocks, below `blocks`.
struct Ring<'a> {
    volume: &'a Volume<'a>,
    blocks: u64,
}

impl Ring<'_> {
    /// The cycle of the block at `at`.
    fn cycle(&self, at: u64) -> Result<u32> {
        Ok(self.volume.read(at * BLOCK as u64, 8)?.map_or(0, |block| cycle_of(&block)))
    }

    fn after(&self, at: u64, blocks: u64) -> u64 {
        (at + blocks) % self.blocks
    }

    /// The first block of the older cycle, block 0 if all are of one: there the next record will be written.
    fn head(&self) -> Result<u64> {
        let newest = self.cycle(0)?;
        let (mut new, mut old) = (0, self.blocks);
        // Invariant: the block `new` is of the newest cycle; `old` is not, or is one past the last.
        while old - new > 1 {
            let middle = new + (old - new) / 2;
            if self.cycle(middle)? == newest { new = middle } else { old = middle }
        }
        Ok(old % self.blocks)
    }

    /// The last record that begins before `head`, and where it begins; `None` if none is near enough to end there.
    fn last_record(&self, head: u64) -> Result<Option<(u64, Record)>> {
        const STEP: u64 = (LONGEST_READ / BLOCK) as u64;
        let mut end = if head == 0 { self.blocks } else { head };
        let mut searched = 0;
        while searched < MAX_RECORD_BLOCKS.min(self.blocks) {
            let count = STEP.min(end);
            let start = end - count;
            let Some(bytes) = self.volume.read(start * BLOCK as u64, count as usize * BLOCK)? else {
                return Ok(None);
            };
            let found = (start..end).rev().find_map(|at| {
                let block = bytes.part((at - start) as usize * BLOCK, BLOCK);
                Record::parse(&block, at).map(|record| (at, record))
            });
            if found.is_some() {
                return Ok(found);
            }
            searched += count;
            end = if start == 0 { self.blocks } else { start };
        }
        Ok(None)
    }

    /// `count` blocks from `at` on, around the end of the ring.
    fn bytes(&self, mut at: u64, count: u64) -> Result<Option<Block>> {
        let mut bytes = Vec::new();
        let mut left = count.min(MAX_COVERED_BLOCKS);
        while left > 0 {
            let step = left.min(self.blocks - at).min((LONGEST_READ / BLOCK) as u64);
            let Some(part) = self.volume.read(at * BLOCK as u64, step as usize * BLOCK)? else {
                return Ok(None);
            };
            bytes.extend(part.0);
            left -= step;
            at = self.after(at, step);
        }
        Ok(Some(Block(bytes)))
    }

    /// Looks at what recovery would write, from `tail`, written in `cycle`, for `distance` blocks to the head.
    fn replay(&self, tail: u64, cycle: u32, distance: u64) -> Result<Log> {
        let Some(bytes) = self.bytes(tail, distance)? else { return Ok(Log::Pending) };
        let mut covering = Covering::default();
        let mut at = 0;
        while at < distance {
            let rest = bytes.part(at as usize * BLOCK, LONGEST_READ);
            let Some(record) = Record::parse(&rest, self.after(tail, at)) else { return Ok(Log::Unsettled) };
            let end = at + record.blocks();
            let is_written = |block: u64| {
                let expected = cycle.wrapping_add(u32::from(tail + block >= self.blocks));
                cycle_of(&bytes.part(block as usize * BLOCK, 8)) == expected
            };
            if end > distance || !(at..end).all(is_written) {
                return Ok(Log::Unsettled);
            }
            if !covering.takes(&record.data(&rest), record.operations) {
                return Ok(Log::Pending);
            }
            at = end;
        }
        Ok(Log::Covered)
    }
}

/// The cycle in a block's first bytes.
fn cycle_of(block: &Block) -> u32 {
    if block.be32(0) == MAGIC { block.be32(CYCLE) } else { block.be32(0) }
}

/// A record's header.
#[derive(Clone, Copy, Debug)]
struct Record {
    header_blocks: u64,
    /// Bytes of data, not longer than [`MAX_RECORD`].
    len: usize,
    /// Cycle and block from where recovery starts if this is the last record.
    tail: (u32, u64),
    operations: u32,
    format: u32,
}

impl Record {
    /// The header that begins `block`, the log's block `at`; `None` if it is none, or not one of this place.
    fn parse(block: &Block, at: u64) -> Option<Self> {
        let len = block.be32(LEN) as usize;
        let version = block.be32(RECORD_VERSION);
        let is_header = block.be32(0) == MAGIC
            && (1..=3).contains(&version)
            && (1..=MAX_RECORD).contains(&len)
            && u64::from(block.be32(LSN + 4)) == at
            && block.be32(LSN) == block.be32(CYCLE);
        let buffer = if version & VERSION_2 != 0 { block.be32(BUFFER_SIZE) as usize } else { 0 };
        (is_header && buffer <= MAX_RECORD).then(|| Self {
            header_blocks: buffer.div_ceil(DATA_PER_HEADER).max(1) as u64,
            len,
            tail: (block.be32(TAIL_LSN), block.be32(TAIL_LSN + 4).into()),
            operations: block.be32(OPERATIONS),
            format: block.be32(FORMAT),
        })
    }

    fn blocks(&self) -> u64 {
        self.header_blocks + self.len.div_ceil(BLOCK) as u64
    }

    /// The first data of the record that `bytes` begin with, as much as the first header block keeps words of: those
    /// that cycles stand in the place of are put back.
    fn data(&self, bytes: &Block) -> Block {
        let at = self.header_blocks as usize * BLOCK;
        let mut data = bytes.bytes(at, self.len.min(DATA_PER_HEADER)).to_vec();
        for (index, block) in data.chunks_exact_mut(BLOCK).enumerate() {
            if let Some(word) = block.first_chunk_mut::<4>() {
                *word = bytes.be32(CYCLE_DATA + 4 * index).to_be_bytes();
            }
        }
        Block(data)
    }
}

/// Follows operations through the records as long as they write nothing but the super-block.
#[derive(Debug, Default)]
struct Covering {
    /// The next data is a transaction's header.
    in_start: bool,
    /// Regions left of the super-block's item.
    regions: u16,
}

impl Covering {
    /// Whether the first `count` operations of `data` are such.
    fn takes(&mut self, data: &Block, count: u32) -> bool {
        let mut at = 0;
        for _ in 0..count {
            let (len, flags) = (data.be32(at + OPERATION_LEN) as usize, data.u8(at + OPERATION_FLAGS));
            at += OPERATION_SIZE;
            // Covering transactions are small and forced out one by one: none is ever continued in another record.
            if flags & CONTINUES != 0 || len > data.0.len() || at + len > data.0.len() {
                return false;
            }
            if flags & START != 0 {
                self.in_start = true;
            }
            if len > 0 && flags & UNMOUNT == 0 && !self.takes_region(&data.part(at, len)) {
                return false;
            }
            at += len;
        }
        true
    }

    fn takes_region(&mut self, region: &Block) -> bool {
        if std::mem::take(&mut self.in_start) {
            return region.0.len() == TRANSACTION_SIZE && region.le32(0) == TRANSACTION_MAGIC;
        }
        if let Some(left) = self.regions.checked_sub(1) {
            self.regions = left;
            return true;
        }
        // The super-block is the only buffer at address 0.
        self.regions = region.le16(ITEM_REGIONS).saturating_sub(1);
        region.0.len() > ITEM_ADDRESS + 8 && region.le16(0) == BUFFER_ITEM && region.le64(ITEM_ADDRESS) == 0
    }
}
