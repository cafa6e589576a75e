//! Persistent dirty bitmaps: those that an image carries are kept up while it is written, and saved when it is closed.
//!
//! # Lifecycle
//!
//! ```text
//!   open: directory, tables and data read ─▶ begin: IN_USE set, synced ─▶ mark … ─▶ store: data, tables, IN_USE cleared
//!                                                            │ killed: IN_USE stays, nobody ever trusts it again
//! ```
//!
//! # Invariants
//!
//! - What follows writes (`auto`) is *in use* on stable storage before the first write. So a bitmap that is not in use is
//!   true.
//! - The directory keeps its size and its place. Of its entries only flags and tables change, each in a write inside one
//!   sector, so a loss of power tears none.
//! - As long as a bitmap is in use its data means nothing and is written in place. Its table always makes sense: what it
//!   names is counted before.
//! - Bitmaps that were in use when the image was opened, or that Frazil does not know, are kept as they are. One that
//!   should follow writes and that Frazil does not know is marked as in use.

mod directory;
mod store;

use std::sync::{Mutex, MutexGuard, PoisonError};

use block::{ByteRange, Context, DirtyBitmap, Error, ErrorKind, Result, Storage};

use crate::entry::HostOffset;
use crate::header::Header;
pub(crate) use directory::{Directory, TableEntry};
use directory::{FLAGS_AT, IN_USE};
pub(crate) use store::Room;

/// How much memory the bitmaps of an image may take together, in bytes.
const MAX_BYTES: u64 = 512 << 20;
/// Entries of a table that are read at a time.
const BATCH: u32 = 8192;

/// The bitmaps of an image that is open for writing.
#[derive(Debug)]
pub(crate) struct Bitmaps {
    /// Those that follow writes.
    tracked: Vec<DirtyBitmap>,
    state: Mutex<State>,
}

/// What changes of them on disk.
#[derive(Debug)]
struct State {
    header: Header,
    directory: Directory,
    /// Of each tracked bitmap, in their order: its entry in the directory, and its table.
    tracked: Vec<(usize, Vec<TableEntry>)>,
    /// Entries of the directory whose bitmaps do not follow writes, but have to grow with the disk.
    outgrown: Vec<usize>,
    /// What was named before, and is to be given back: clusters, and how many.
    freed: Vec<(HostOffset, u64)>,
}

impl Bitmaps {
    /// Reads and checks the bitmaps of an image, and tells `found` where they are, in clusters. `None` if it has none.
    /// Nothing is written: before the disk is, comes [`begin`](Self::begin).
    pub(crate) fn open(
        storage: &dyn Storage,
        header: &Header,
        mut found: impl FnMut(HostOffset, u64) -> Result<()>,
    ) -> Result<Option<Self>> {
        let Some(directory) = Directory::read(storage, header)? else { return Ok(None) };
        let clusters = |bytes: u64| bytes.div_ceil(header.geometry().cluster_size());
        found(directory.at, clusters(directory.len))?;
        let (mut bitmaps, mut tracked) = (Vec::new(), Vec::new());
        let mut room = MAX_BYTES;
        for (index, entry) in directory.entries.iter().enumerate() {
            found(entry.table, clusters(entry.table_bytes()))?;
            if entry.unusable.is_some() || entry.is_in_use() || !entry.is_auto() {
                continue;
            }
            let size = entry.data_bytes(header.capacity);
            room = room.checked_sub(size).ok_or_else(|| {
                Error::new(ErrorKind::Unsupported, "dirty bitmaps that take more than 512 MiB of memory")
            })?;
            let bitmap = DirtyBitmap::new(header.capacity, entry.granularity_bits)?;
            let mut table = Vec::new();
            for from in (0..entry.table_entries).step_by(BATCH as usize) {
                let to = entry.table_entries.min(from + BATCH);
                table.extend(entry.read_table(storage, header, from..to)?);
            }
            load(storage, header, &table, &bitmap, &mut found)
                .context(|| format!("read the bitmap '{}'", entry.name))?;
            bitmaps.push(bitmap);
            tracked.push((index, table));
        }
        let (outgrown, freed) = (Vec::new(), Vec::new());
        let state = State { header: header.clone(), directory, tracked, outgrown, freed };
        Ok(Some(Self { tracked: bitmaps, state: Mutex::new(state) }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says on stable storage that the bitmaps which follow writes are not true any more: before the first write.
    pub(crate) fn begin(&self, storage: &dyn Storage) -> Result<()> {
        match self.state().set_in_use(storage, |entry| entry.is_auto())? {
            true => storage.sync().context(|| "mark the dirty bitmaps as in use"),
            false => Ok(()),
        }
    }

    /// `range` of the disk is about to be written.
    pub(crate) fn mark(&self, range: ByteRange) {
        self.tracked.iter().for_each(|bitmap| bitmap.mark(range));
    }

    /// The disk is about to become larger. Tells whether something was written, and then the header must not say so before
    /// that is synced.
    pub(crate) fn grow(&self, storage: &dyn Storage, capacity: u64) -> Result<bool> {
        for bitmap in &self.tracked {
            bitmap.grow(capacity)?;
        }
        let mut state = self.state();
        let size = state.header.geometry().cluster_size();
        let entries = state.directory.entries.iter().enumerate();
        let grows = entries.filter(|(_, entry)| {
            let needed = entry.data_bytes(capacity).div_ceil(size);
            entry.unusable.is_none() && !entry.is_in_use() && needed != u64::from(entry.table_entries)
        });
        let grows: Vec<usize> = grows.map(|(index, _)| index).collect();
        let positions: Vec<u64> =
            grows.iter().map(|index| state.directory.entries[*index].position).collect();
        state.outgrown.extend(grows);
        state.set_in_use(storage, |entry| positions.contains(&entry.position))
    }

    /// Saves all bitmaps of a disk of `capacity`: nothing is written to it any more. What it needs it takes from `room`.
    /// After an error the bitmaps stay in use; it may be tried again.
    pub(crate) fn store(&self, storage: &dyn Storage, capacity: u64, room: &mut dyn Room) -> Result<()> {
        let mut state = self.state();
        state.header.capacity = capacity;
        state.store(storage, room, &self.tracked).context(|| "save the dirty bitmaps")
    }
}

impl State {
    /// Marks those that `which` chooses and that are not yet marked; whether there were any. The caller syncs.
    fn set_in_use(
        &mut self,
        storage: &dyn Storage,
        which: impl Fn(&directory::BitmapEntry) -> bool,
    ) -> Result<bool> {
        let mut written = false;
        for entry in self.directory.entries.iter_mut().filter(|entry| !entry.is_in_use() && which(entry)) {
            let flags = entry.flags | IN_USE;
            storage.write_at(&flags.to_be_bytes(), entry.position + FLAGS_AT)?;
            (entry.flags, written) = (flags, true);
        }
        Ok(written)
    }
}

/// Reads the data that `table` names into `bitmap`.
fn load(
    storage: &dyn Storage,
    header: &Header,
    table: &[TableEntry],
    bitmap: &DirtyBitmap,
    found: &mut impl FnMut(HostOffset, u64) -> Result<()>,
) -> Result<()> {
    let size = header.geometry().cluster_size();
    let mut bytes = vec![0; size as usize];
    for (index, entry) in (0..).zip(table) {
        match entry {
            TableEntry::Zeroes => continue,
            TableEntry::Ones => bytes.fill(0xff),
            TableEntry::At(at) => {
                found(*at, 1)?;
                storage.read_at(&mut bytes, at.0)?;
            }
        }
        bitmap.merge_bytes(index * size, &bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
