//! GUID partition tables.
//!
//! Source: UEFI specification 2.10, section 5.3. The header in the second sector counts, if its sum and that of its
//! entries are right; else the one in the last sector.

use block::Result;

use super::checksum::crc32;
use super::table::{Partition, SECTOR, Table};
use super::volume::{Block, LONGEST_READ, Volume};

const HEADER_SIZE: usize = 12;
const HEADER_CRC: usize = 16;
const OWN_SECTOR: usize = 24;
const ENTRIES_SECTOR: usize = 72;
const ENTRIES: usize = 80;
const ENTRY_SIZE: usize = 84;
const ENTRIES_CRC: usize = 88;
/// Within an entry.
const FIRST: usize = 32;
const LAST: usize = 40;
const NAME: usize = 56;
const NAME_LEN: usize = 72;

/// Types (in their order of bytes on disk) whose content is not a file system.
const RESERVED: [([u8; 16], &str); 2] = [
    (*b"Hah!IdontNeedEFI", "a boot loader's partition (BIOS boot)"),
    (
        [0x16, 0xe3, 0xc9, 0xe3, 0x5c, 0x0b, 0xb8, 0x4d, 0x81, 0x7d, 0xf9, 0x2d, 0xf0, 0x02, 0x15, 0xae],
        "reserved by Windows (MSR)",
    ),
];

pub(super) fn read(disk: &Volume<'_>) -> Result<Table> {
    let last = (disk.size() / SECTOR).saturating_sub(1);
    if let Some(table) = read_copy(disk, 1)? {
        return Ok(table);
    }
    let Some(mut table) = read_copy(disk, last)? else {
        let complaint = "a protective MBR, but neither copy of the GPT is valid";
        return Ok(Table { complaint: Some(complaint.into()), ..Table::default() });
    };
    table
        .complaint
        .get_or_insert_with(|| "the first copy of the GPT is not valid, the second was used".into());
    Ok(table)
}

fn read_copy(disk: &Volume<'_>, sector: u64) -> Result<Option<Table>> {
    let Some(header) = disk.read(sector * SECTOR, SECTOR as usize)?.filter(|header| is_valid(header, sector))
    else {
        return Ok(None);
    };
    let (count, size) = (header.le32(ENTRIES) as usize, header.le32(ENTRY_SIZE) as usize);
    let plausible = size >= 128 && size.is_multiple_of(8) && count > 0;
    let len = count.checked_mul(size).filter(|len| plausible && *len <= LONGEST_READ);
    let at = header.le64(ENTRIES_SECTOR).checked_mul(SECTOR);
    let (Some(at), Some(len)) = (at, len) else { return Ok(None) };
    let entries = disk.read(at, len)?.filter(|entries| crc32(&[&entries.0]) == header.le32(ENTRIES_CRC));
    Ok(entries.map(|entries| parse(&entries, size)))
}

fn is_valid(header: &Block, sector: u64) -> bool {
    let size = header.le32(HEADER_SIZE) as usize;
    header.has(0, b"EFI PART")
        && (92..=SECTOR as usize).contains(&size)
        && header.le64(OWN_SECTOR) == sector
        // The sum is made with its own field as zero.
        && crc32(&[header.bytes(0, HEADER_CRC), &[0; 4], header.bytes(HEADER_CRC + 4, size - HEADER_CRC - 4)])
            == header.le32(HEADER_CRC)
}

fn parse(entries: &Block, size: usize) -> Table {
    let mut table = Table::default();
    for (number, entry) in (1..).zip(entries.0.chunks_exact(size)) {
        let entry = Block(entry.to_vec());
        if entry.has(0, &[0; 16]) {
            continue;
        }
        let (first, last) = (entry.le64(FIRST), entry.le64(LAST));
        let sectors = last.checked_sub(first).map_or(0, |sectors| sectors.saturating_add(1));
        let room = table.push(Partition {
            number,
            name: entry.label_utf16(NAME, NAME_LEN),
            offset: first.saturating_mul(SECTOR),
            size: sectors.saturating_mul(SECTOR),
            reserved: RESERVED.iter().find(|(guid, _)| entry.has(0, guid)).map(|(_, text)| *text),
        });
        if !room {
            break;
        }
    }
    table
}
