//! Partition tables: which, and what they have in common.

use block::Result;

use super::volume::{Block, Volume};
use super::{gpt, mbr};

/// The unit of both tables' addresses. Our disks are 512-byte-sector disks to the guest; a table made for sectors of
/// another size is not found.
pub(super) const SECTOR: u64 = block::SECTOR;

/// More than this of a hostile table is not looked at, and the probe says so.
pub(super) const MAX_PARTITIONS: usize = 128;

/// What a table says.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) partitions: Vec<Partition>,
    /// What the reader of the verdicts should know of the table itself, if something is wrong with it.
    pub(super) complaint: Option<String>,
}

impl Table {
    /// Adds a partition, or the complaint that there are too many; whether there is room for more.
    pub(super) fn push(&mut self, partition: Partition) -> bool {
        if self.partitions.len() == MAX_PARTITIONS {
            self.complaint = Some(format!("only the first {MAX_PARTITIONS} partitions were looked at"));
            return false;
        }
        self.partitions.push(partition);
        true
    }
}

/// One entry, as it says itself: its range may lie anywhere.
#[derive(Debug)]
pub(super) struct Partition {
    pub(super) number: u32,
    pub(super) name: Option<String>,
    /// The first byte.
    pub(super) offset: u64,
    /// Bytes; saturated, for no disk is that large.
    pub(super) size: u64,
    /// Set where the partition's type says what it holds, and that it is not a file system.
    pub(super) reserved: Option<&'static str>,
}

/// The disk's partition table, GPT before MBR, `None` if there is none.
pub(super) fn read(disk: &Volume<'_>) -> Result<Option<Table>> {
    let Some(sector) = disk.read(0, SECTOR as usize)? else { return Ok(None) };
    let Some(entries) = mbr::entries(&sector) else { return Ok(None) };
    if entries.iter().any(mbr::Entry::is_protective) {
        return gpt::read(disk).map(Some);
    }
    mbr::read(disk, &entries)
}

/// Whether the sector ends with the signature of a boot sector, an MBR or an EBR.
pub(super) fn is_signed(sector: &Block) -> bool {
    sector.has(510, &[0x55, 0xaa])
}
