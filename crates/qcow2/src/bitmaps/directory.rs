//! The bitmap directory and the tables that it names: the codec, with the limits that QEMU's `block/qcow2-bitmap.c` has.

use std::collections::HashSet;

use block::{Context, Error, ErrorKind, Result, Storage};

use crate::bytes::{be16, be32, be64};
use crate::entry::HostOffset;
use crate::extensions::BITMAPS;
use crate::header::{AUTOCLEAR_BITMAPS, Header};

/// QEMU's own bound (`QCOW2_MAX_BITMAPS`).
const MAX_BITMAPS: u32 = 65535;
/// QEMU's own bound (`QCOW2_MAX_BITMAP_DIRECTORY_SIZE`), in bytes.
const MAX_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS as u64;
/// QEMU's own bound (`BME_MAX_TABLE_SIZE`), in entries.
pub(super) const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// QEMU's own bound (`BME_MAX_PHYS_SIZE`) of a bitmap's data in bytes.
const MAX_DATA_BYTES: u64 = 0x2000_0000;
/// QEMU's own bound (`BME_MAX_NAME_SIZE`).
const MAX_NAME: usize = 1023;
/// The bytes of a directory entry before its variable parts.
const ENTRY_BYTES: usize = 24;
/// Where an entry's flags are.
pub(super) const FLAGS_AT: u64 = 12;
/// The length of the header extension's contents.
const EXTENSION_BYTES: usize = 24;

/// "The bitmap was not saved correctly and may be inconsistent."
pub(super) const IN_USE: u32 = 1;
/// "The bitmap must reflect all changes of the virtual disk by any application that would write."
pub(super) const AUTO: u32 = 1 << 1;
/// Extra data that is not known does not matter.
const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
/// The one type there is: dirty tracking.
const DIRTY_TRACKING: u8 = 1;

/// "Bit 9 - 55: Bits 9 - 55 of the host cluster offset."
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What the image says of one bitmap.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct BitmapEntry {
    pub(crate) name: String,
    pub(crate) table: HostOffset,
    pub(crate) table_entries: u32,
    pub(crate) flags: u32,
    /// Why Frazil does not know what the bitmap says: it is kept as it is.
    pub(crate) unusable: Option<&'static str>,
    pub(crate) granularity_bits: u32,
    /// Where the entry begins in the file.
    pub(crate) position: u64,
}

/// The bitmap directory of an image that vouches for it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Directory {
    pub(crate) at: HostOffset,
    /// Bytes.
    pub(crate) len: u64,
    pub(crate) entries: Vec<BitmapEntry>,
}

/// An entry of a bitmap's table: one cluster of its data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum TableEntry {
    Zeroes,
    Ones,
    At(HostOffset),
}

impl Directory {
    /// Reads and checks the directory. `None` if the image has no bitmaps, or does not vouch for them (the autoclear bit
    /// is not set): then they mean nothing, and not even their place may be believed.
    pub(crate) fn read(storage: &dyn Storage, header: &Header) -> Result<Option<Self>> {
        let extension = header.extensions.get(BITMAPS);
        let Some(extension) = extension.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0) else {
            return match header.autoclear & AUTOCLEAR_BITMAPS {
                0 => Ok(None),
                _ => Err(corrupt("the image vouches for bitmaps and has none")),
            };
        };
        let (count, reserved) = (be32(extension, 0), be32(extension, 4));
        let (len, at) = (be64(extension, 8), be64(extension, 16));
        let end = file_end(storage, header)?;
        if extension.len() != EXTENSION_BYTES
            || reserved != 0
            || !(1..=MAX_BITMAPS).contains(&count)
            || !(1..=MAX_DIRECTORY_BYTES).contains(&len)
            || !is_place(header, at, len, end)
        {
            return Err(corrupt("the bitmaps extension makes no sense"));
        }
        let mut bytes = vec![0; len as usize];
        // The directory may end with the file, in a cluster that is cut short.
        storage.read_at(&mut bytes, at).context(|| "read the bitmap directory")?;
        let entries = Self::decode(&bytes, count, at)?;
        for entry in &entries {
            entry.check(header, end)?;
        }
        Ok(Some(Self { at: HostOffset(at), len, entries }))
    }

    /// Decodes the directory's `bytes`, which are at `at` in the file and hold exactly `count` entries.
    fn decode(bytes: &[u8], count: u32, at: u64) -> Result<Vec<BitmapEntry>> {
        let broken = || corrupt("the bitmap directory is broken");
        let mut entries = Vec::new();
        let mut names = HashSet::new();
        let mut position = 0;
        while position < bytes.len() {
            let entry = bytes.get(position..).filter(|rest| rest.len() >= ENTRY_BYTES).ok_or_else(broken)?;
            let (name_len, extra) = (be16(entry, 18) as usize, be32(entry, 20) as usize);
            let name = entry.get(ENTRY_BYTES + extra..).and_then(|rest| rest.get(..name_len));
            let name = name.filter(|name| !name.is_empty()).ok_or_else(broken)?;
            let len = (ENTRY_BYTES + extra + name_len).next_multiple_of(8);
            if len > entry.len() || entries.len() == count as usize || !names.insert(name) {
                return Err(broken());
            }
            entries.push(BitmapEntry {
                name: String::from_utf8_lossy(name).into_owned(),
                table: HostOffset(be64(entry, 0)),
                table_entries: be32(entry, 8),
                flags: be32(entry, 12),
                unusable: unusable(entry, name),
                granularity_bits: u32::from(entry[17]),
                position: at + position as u64,
            });
            position += len;
        }
        match entries.len() == count as usize {
            true => Ok(entries),
            false => Err(broken()),
        }
    }
}

/// Why Frazil does not know what the bitmap of this directory entry says.
fn unusable(entry: &[u8], name: &[u8]) -> Option<&'static str> {
    let (flags, kind, granularity) = (be32(entry, 12), entry[16], entry[17]);
    let reasons = [
        (kind != DIRTY_TRACKING, "its type is not known"),
        (flags & !(IN_USE | AUTO | EXTRA_DATA_COMPATIBLE) != 0, "it has flags that are not known"),
        (be32(entry, 20) != 0 && flags & EXTRA_DATA_COMPATIBLE == 0, "it has extra data that is not known"),
        (!(9..=31).contains(&granularity), "its granularity is not 512 B to 2 GiB"),
        (name.len() > MAX_NAME, "its name is longer than 1023 bytes"),
        (std::str::from_utf8(name).is_err(), "its name is not UTF-8"),
    ];
    reasons.into_iter().find(|(found, _)| *found).map(|(_, reason)| reason)
}

impl BitmapEntry {
    pub(crate) fn is_in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    /// Whether it has to follow all writes.
    pub(crate) fn is_auto(&self) -> bool {
        self.flags & AUTO != 0
    }

    /// Bytes of its data for a disk of `capacity`.
    pub(crate) fn data_bytes(&self, capacity: u64) -> u64 {
        capacity.div_ceil(1 << self.granularity_bits).div_ceil(8)
    }

    /// The bytes of its table.
    pub(crate) fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }

    fn check(&self, header: &Header, file_end: u64) -> Result<()> {
        let wrong = |why: &str| Err(corrupt(&format!("bitmap '{}': {why}", self.name)));
        let bytes = self.table_bytes();
        if !(1..=MAX_TABLE_ENTRIES).contains(&self.table_entries)
            || !is_place(header, self.table.0, bytes, file_end)
        {
            return wrong("its table is too large, not aligned or not inside the file");
        }
        // "Metadata (such as the auto flag or bitmap size) may be outdated" if it is in use.
        if self.unusable.is_none() && !self.is_in_use() {
            let size = header.geometry().cluster_size();
            let data = self.data_bytes(header.capacity);
            if data > MAX_DATA_BYTES || data.div_ceil(size) != u64::from(self.table_entries) {
                return wrong("its table does not fit the disk's size");
            }
        }
        Ok(())
    }

    /// Reads and checks entries `from..to` of its table.
    pub(crate) fn read_table(
        &self,
        storage: &dyn Storage,
        header: &Header,
        entries: std::ops::Range<u32>,
    ) -> Result<Vec<TableEntry>> {
        let end = file_end(storage, header)?;
        let mut bytes = vec![0; (entries.end - entries.start) as usize * 8];
        let at = self.table.0 + u64::from(entries.start) * 8;
        storage.read_at(&mut bytes, at).context(|| format!("read the table of bitmap '{}'", self.name))?;
        bytes.chunks_exact(8).map(|word| TableEntry::decode(header, be64(word, 0), end)).collect()
    }
}

impl TableEntry {
    fn decode(header: &Header, word: u64, file_end: u64) -> Result<Self> {
        match word {
            0 => Ok(Self::Zeroes),
            1 => Ok(Self::Ones),
            at if at & !OFFSET == 0 && is_place(header, at, 1, file_end) => Ok(Self::At(HostOffset(at))),
            _ => Err(corrupt("an entry of a bitmap's table makes no sense")),
        }
    }

    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Zeroes => 0,
            Self::Ones => 1,
            Self::At(at) => at.0,
        }
    }
}

/// Whether `len` bytes can be at `at`: on a cluster, off the header, inside the file.
fn is_place(header: &Header, at: u64, len: u64, file_end: u64) -> bool {
    let inside = at.checked_add(len).is_some_and(|end| end <= file_end);
    at != 0 && header.geometry().is_aligned(at) && inside
}

/// The end of the file's last cluster, which may be cut short.
fn file_end(storage: &dyn Storage, header: &Header) -> Result<u64> {
    Ok(storage.len()?.next_multiple_of(header.geometry().cluster_size()))
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

#[cfg(test)]
mod tests;
