//! Changes of a header that a loss of power can not tear.
//!
//! All fields of the header are in the file's first sector, and a sector is written as a whole or not at all. So a
//! change of fields is one write inside it. Extensions and the backing file's name may lie further on: what is new
//! there goes where the old header has nothing, is synced, and only then does the first sector name it.
//!
//! None of these is for two threads at once. But for [`set_backing`] they do not sync: their callers have an order.

use block::{Context, Error, ErrorKind, Result, SECTOR, Storage};

use crate::bytes::be32;
use crate::entry::HostOffset;
use crate::extensions::{BACKING_FORMAT, Extensions, FEATURE_NAMES};
use crate::header::{Header, MAX_BACKING_NAME};

const NAME_AT: usize = 8;
const CAPACITY_AT: u64 = 24;
const REFCOUNT_TABLE_AT: u64 = 48;
const INCOMPATIBLE_AT: u64 = 72;
const AUTOCLEAR_AT: usize = 88;

/// Writes the disk's size and the place of its L1 table, all or none.
pub(crate) fn write_mapping(
    storage: &dyn Storage,
    capacity: u64,
    l1: HostOffset,
    l1_entries: u32,
) -> Result<()> {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&capacity.to_be_bytes());
    // Bytes 8 to 11 are `crypt_method`, which is none.
    bytes[12..16].copy_from_slice(&l1_entries.to_be_bytes());
    bytes[16..].copy_from_slice(&l1.0.to_be_bytes());
    storage.write_at(&bytes, CAPACITY_AT).context(|| "write the header")
}

/// Writes the place of the refcount table, all or none.
pub(crate) fn write_refcount_table(storage: &dyn Storage, at: HostOffset, clusters: u32) -> Result<()> {
    let bytes = [&at.0.to_be_bytes()[..], &clusters.to_be_bytes()].concat();
    storage.write_at(&bytes, REFCOUNT_TABLE_AT).context(|| "write the header")
}

/// Writes the incompatible feature bits of a version 3 image.
pub(crate) fn write_incompatible(storage: &dyn Storage, bits: u64) -> Result<()> {
    storage.write_at(&bits.to_be_bytes(), INCOMPATIBLE_AT).context(|| "write the header")
}

/// Writes the autoclear feature bits of a version 3 image.
pub(crate) fn write_autoclear(storage: &dyn Storage, bits: u64) -> Result<()> {
    storage.write_at(&bits.to_be_bytes(), AUTOCLEAR_AT as u64).context(|| "write the header")
}

/// Makes the image in `storage` name another backing file and its format, or none, and syncs. A loss of power leaves
/// the old names or the new ones. What the disk reads is the caller's care.
///
/// For an image that nobody has open for writing. The name is written as it is given: it has 1 to 1023 bytes.
///
/// Errors: as [`Header::read`]; [`ErrorKind::InvalidInput`] for a name that no header can have;
/// [`ErrorKind::Unsupported`] if extensions that Frazil does not know leave no room for it.
pub fn set_backing(storage: &dyn Storage, backing: Option<(&str, &str)>) -> Result<()> {
    write_backing(storage, backing, || storage.sync())
}

/// The same, with the caller's way to sync.
pub(crate) fn write_backing(
    storage: &dyn Storage,
    backing: Option<(&str, &str)>,
    sync: impl Fn() -> Result<()>,
) -> Result<()> {
    let header = Header::read(storage)?;
    header.check_intact()?;
    if let Some((name, format)) = backing {
        check_backing(name, format)?;
        if header.data_file_is_raw() {
            let story = "a backing file for an image whose data file is a raw image of its own";
            return Err(Error::new(ErrorKind::InvalidInput, story));
        }
    }
    let size = header.geometry().cluster_size() as usize;
    let there = storage.len()?.min(size as u64) as usize;
    let mut old = vec![0; size];
    storage.read_at(&mut old[..there], 0)?;
    let new = rewritten(&header, &old, backing)?;
    let write = || {
        // Behind the first sector only what the old header has no use for changes. All of it is written, for what looks unchanged
        // may be what an attempt before this one could not sync: in the page cache, and nowhere else.
        let is_used = |at: &usize| old[*at] != 0 || new[*at] != 0;
        if let Some(last) = (SECTOR as usize..size).rfind(is_used) {
            storage.write_at(&new[SECTOR as usize..=last], SECTOR)?;
            sync()?;
        }
        storage.write_at(&new[..SECTOR as usize], 0)?;
        sync()
    };
    write().context(|| "write the backing file's name")
}

/// Whether a header can have these.
pub(crate) fn check_backing(name: &str, format: &str) -> Result<()> {
    let invalid = |what: &str| Err(Error::new(ErrorKind::InvalidInput, what));
    if name.is_empty() || name.len() > MAX_BACKING_NAME || name.contains('\0') {
        return invalid("the backing file's name has not 1 to 1023 bytes");
    }
    match format {
        "raw" | "qcow2" => Ok(()),
        _ => invalid("the backing file's format is neither raw nor qcow2"),
    }
}

/// The first cluster with the new names: the first way to place them that can not be torn.
fn rewritten(header: &Header, old: &[u8], backing: Option<(&str, &str)>) -> Result<Vec<u8>> {
    let (name, format) = backing.unzip();
    let changed = header.extensions.with(BACKING_FORMAT, format.map(str::as_bytes));
    // Names of features only make messages nicer; they may have to make room.
    let smaller = changed.with(FEATURE_NAMES, None);
    // Without a backing file its format means nothing, and may stay.
    let unchanged = name.is_none().then_some(&header.extensions);
    let name_end = header.name_at + header.backing_file.as_ref().map_or(0, String::len);
    let old_end = name_end.max(header.extensions_end);
    for extensions in [Some(&changed), Some(&smaller), unchanged].into_iter().flatten() {
        for earliest in [0, old_end] {
            let new = place(header, old, extensions, name, earliest);
            if let Some(new) = new.filter(|new| is_atomic(header, old, new)) {
                return Ok(new);
            }
        }
    }
    let story = "the image's header has no room for another backing file's name: use `qemu-img rebase -u`";
    Err(Error::new(ErrorKind::Unsupported, story))
}

/// The first cluster with these extensions and the name behind them, at `earliest` or later, if there is room.
fn place(
    header: &Header,
    old: &[u8],
    extensions: &Extensions,
    name: Option<&str>,
    earliest: usize,
) -> Option<Vec<u8>> {
    let mut new = old.to_vec();
    let start = if header.version == 3 { be32(old, 100) as usize } else { 72 };
    let mut area = Vec::new();
    extensions.encode(&mut area);
    let end = start + area.len();
    new.get_mut(start..end)?.copy_from_slice(&area);
    new[NAME_AT..NAME_AT + 12].fill(0);
    if let Some(name) = name {
        let at = end.max(earliest);
        new.get_mut(at..at + name.len())?.copy_from_slice(name.as_bytes());
        new[NAME_AT..NAME_AT + 8].copy_from_slice(&(at as u64).to_be_bytes());
        new[NAME_AT + 8..NAME_AT + 12].copy_from_slice(&(name.len() as u32).to_be_bytes());
    }
    if header.version == 3 {
        // "May only write to an image with unknown auto-clear features if it clears the respective bits."
        new[AUTOCLEAR_AT..AUTOCLEAR_AT + 8].copy_from_slice(&header.kept_autoclear().to_be_bytes());
    }
    Some(new)
}

/// Whether `new` differs from `old` only in the first sector and where the old header has nothing.
fn is_atomic(header: &Header, old: &[u8], new: &[u8]) -> bool {
    let name_len = header.backing_file.as_ref().map_or(0, String::len);
    [0..header.extensions_end, header.name_at..header.name_at + name_len].into_iter().all(|used| {
        let used = used.start.max(SECTOR as usize)..used.end;
        old.get(used.clone()) == new.get(used)
    })
}

#[cfg(test)]
mod tests;
