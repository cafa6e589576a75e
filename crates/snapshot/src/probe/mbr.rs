//! Master boot records, with extended and logical partitions.
//!
//! Source: Linux `block/partitions/msdos.c`, which has to read what all others write. A logical partition is described
//! by a record of its own (EBR): the first entry counts from that record, the second leads to the next record and
//! counts from the start of the extended partition.

use block::Result;

use super::table::{Partition, SECTOR, Table, is_signed};
use super::volume::{Block, Volume};
use super::{fat, ntfs};

const ENTRIES: usize = 446;
const ENTRY_SIZE: usize = 16;
/// The first number of a logical partition.
const FIRST_LOGICAL: u32 = 5;
/// Records followed in one extended partition: a chain may lead back to itself.
const MAX_RECORDS: usize = 128;

const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
const PROTECTIVE: u8 = 0xee;

/// One of the four entries; addresses and lengths in sectors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    kind: u8,
    start: u64,
    sectors: u64,
}

impl Entry {
    /// Whether it stands for a GPT.
    pub(super) fn is_protective(&self) -> bool {
        self.kind == PROTECTIVE
    }

    fn is_used(&self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    fn is_extended(&self) -> bool {
        EXTENDED.contains(&self.kind)
    }

    fn partition(&self, number: u32, base: u64) -> Partition {
        Partition {
            number,
            name: None,
            // 32-bit numbers of sectors: no sum or product of these overflows.
            offset: (base + self.start) * SECTOR,
            size: self.sectors * SECTOR,
            reserved: None,
        }
    }
}

/// The four entries, `None` if the sector can be no MBR: a boot flag is 0 or 0x80, and boot code of a file system that
/// begins in this sector seldom is.
pub(super) fn entries(sector: &Block) -> Option<[Entry; 4]> {
    let entry = |index: usize| {
        let at = ENTRIES + index * ENTRY_SIZE;
        let (start, sectors) = (sector.le32(at + 8).into(), sector.le32(at + 12).into());
        (sector.u8(at) & 0x7f == 0).then(|| Entry { kind: sector.u8(at + 4), start, sectors })
    };
    is_signed(sector).then_some(())?;
    Some([entry(0)?, entry(1)?, entry(2)?, entry(3)?])
}

/// The partitions, `None` if no entry is in use, one of them makes no sense, or the sector is a file system's.
pub(super) fn read(disk: &Volume<'_>, entries: &[Entry; 4]) -> Result<Option<Table>> {
    let mut used = entries.iter().filter(|entry| entry.is_used()).peekable();
    if used.peek().is_none() || used.any(|entry| entry.start == 0) {
        return Ok(None);
    }
    if fat::probe(disk)?.is_some() || ntfs::probe(disk)?.is_some() {
        return Ok(None);
    }
    let mut table = Table::default();
    for (number, entry) in (1..).zip(entries) {
        if entry.is_used() && !entry.is_extended() {
            table.push(entry.partition(number, 0));
        }
    }
    let mut number = FIRST_LOGICAL;
    for extended in entries.iter().filter(|entry| entry.is_used() && entry.is_extended()) {
        number = read_logical(disk, extended.start, number, &mut table)?;
    }
    Ok(Some(table))
}

/// Follows the records of the extended partition at sector `base`; the number of the next logical one.
fn read_logical(disk: &Volume<'_>, base: u64, mut number: u32, table: &mut Table) -> Result<u32> {
    let mut record = base;
    for _ in 0..MAX_RECORDS {
        let sector = disk.read(record * SECTOR, SECTOR as usize)?;
        let Some(entries) = sector.and_then(|sector| entries(&sector)) else {
            table.complaint = Some(format!("the chain of logical partitions breaks at sector {record}"));
            return Ok(number);
        };
        for entry in entries.iter().filter(|entry| entry.is_used() && !entry.is_extended()) {
            if !table.push(entry.partition(number, record)) {
                return Ok(number);
            }
            number += 1;
        }
        let Some(next) = entries.iter().find(|entry| entry.is_used() && entry.is_extended()) else {
            return Ok(number);
        };
        record = base + next.start;
    }
    table.complaint = Some(format!("more than {MAX_RECORDS} records in a chain of logical partitions"));
    Ok(number)
}
