//! The mapping in RAM: one slot for each L1 entry, its L2 table loaded when somebody first needs it.
//!
//! Readers take no lock. An entry's home is stored before any state that says there is data in it (release), and
//! readers load the state first (acquire), so whoever sees `allocated` sees the home it is in. Homes never change once
//! set; states only go forward.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use block::{Context, Error, ErrorKind, Result, Storage};

use crate::bytes::be64;
use crate::entry::{COPIED, Geometry, GuestCluster, Home, HostOffset, State, decode};
use crate::metadata::Metadata;

/// "Bit 9 - 55: Bits 9-55 of the offset of the L2 table"; all others but bit 63 are reserved.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// One L2 entry.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    home: AtomicU64,
    state: AtomicU64,
}

impl Entry {
    /// The state; what it says of data is to be looked for in the [`home`](Self::home) read *after* it.
    pub(crate) fn state(&self) -> State {
        State(self.state.load(Ordering::Acquire))
    }

    pub(crate) fn home(&self) -> Home {
        Home(self.home.load(Ordering::Relaxed))
    }

    /// Only under the writer's lock, or by the flush that settles what it has written.
    pub(crate) fn set_home(&self, home: Home) {
        self.home.store(home.0, Ordering::Release);
    }

    /// Only under the writer's lock.
    pub(crate) fn set_state(&self, state: State) {
        self.state.store(state.0, Ordering::Release);
    }
}

/// An L2 table.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) entries: Box<[Entry]>,
    /// Where it is, or will be, in the file; zero until a flush first writes it. Only flushes change it.
    pub(crate) home: AtomicU64,
    /// Whether the L1 table on disk may name it. A flush that begins to link a table may fail, and from then on nothing
    /// may be written to the table that is not safe in a linked one.
    pub(crate) exposed: AtomicBool,
}

#[derive(Debug, Default)]
struct Slot {
    /// The table's place as the L1 table on disk has it, zero if it has none. Changed by the flush that links it.
    linked: AtomicU64,
    table: OnceLock<Table>,
}

/// All tables of an image.
pub(crate) struct Tables {
    geometry: Geometry,
    slots: Box<[Slot]>,
    /// Held while a table is read, so that it is read once.
    loading: Mutex<()>,
    /// What no data cluster may overlap, for images opened for writing: a malformed image must not let a guest write
    /// the image's own tables.
    metadata: Option<Metadata>,
    /// Bytes of the file when it was opened, up to the end of its last cluster: entries on disk point below it.
    limit: u64,
}

impl Tables {
    /// Reads and checks the L1 table. With `metadata`, the image is opened for writing, and gets to know its tables.
    pub(crate) fn open(
        storage: &dyn Storage,
        geometry: Geometry,
        l1: HostOffset,
        mut metadata: Option<Metadata>,
    ) -> Result<Self> {
        let limit = storage.len()?.next_multiple_of(geometry.cluster_size());
        let mut bytes = vec![0; geometry.tables() as usize * 8];
        storage.read_at(&mut bytes, l1.0).context(|| "read the L1 table")?;
        let slots = bytes.chunks_exact(8).map(|word| {
            let word = be64(word, 0);
            let at = word & L1_OFFSET;
            let inside = geometry.is_aligned(at) && at < limit;
            if word & !(L1_OFFSET | COPIED) != 0 || !inside {
                return Err(Error::new(ErrorKind::Corrupt, "an L1 entry points to no L2 table"));
            }
            if let (Some(metadata), true) = (&mut metadata, at != 0) {
                metadata.add(HostOffset(at), 1)?;
                if word & COPIED == 0 {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        "an L2 table is shared though there are no snapshots",
                    ));
                }
            }
            Ok(Slot { linked: AtomicU64::new(at), table: OnceLock::new() })
        });
        let slots = slots.collect::<Result<Box<[Slot]>>>()?;
        Ok(Self { geometry, slots, loading: Mutex::new(()), metadata, limit })
    }

    /// The entry of `cluster`, loading its table; `None` if it has no table, and so nothing of it is in this layer.
    pub(crate) fn entry(&self, storage: &dyn Storage, cluster: GuestCluster) -> Result<Option<&Entry>> {
        let (slot, index) = self.geometry.position(cluster);
        let slot = self.slot(slot)?;
        let table = match slot.table.get() {
            Some(table) => table,
            None if slot.linked.load(Ordering::Acquire) == 0 => return Ok(None),
            None => self.load(storage, slot)?,
        };
        Ok(table.entries.get(index))
    }

    /// As [`entry`](Self::entry), making an empty table in RAM if there is none.
    pub(crate) fn entry_for_write(&self, storage: &dyn Storage, cluster: GuestCluster) -> Result<&Entry> {
        let (slot, index) = self.geometry.position(cluster);
        let slot = self.slot(slot)?;
        let table = match slot.table.get() {
            Some(table) => table,
            None => self.load(storage, slot)?,
        };
        table.entries.get(index).ok_or_else(out_of_range)
    }

    /// An L2 table that has been loaded or made, by its L1 index, and whether the L1 table on disk links it.
    pub(crate) fn loaded(&self, index: usize) -> Result<(&Table, bool)> {
        let slot = self.slot(index)?;
        let table = slot.table.get().ok_or_else(out_of_range)?;
        Ok((table, slot.linked.load(Ordering::Acquire) != 0))
    }

    /// The L1 table on disk now links table `index`, durably.
    pub(crate) fn set_linked(&self, index: usize, at: HostOffset) -> Result<()> {
        self.slot(index)?.linked.store(at.0, Ordering::Release);
        Ok(())
    }

    /// The L1 entry that links a table at `at`.
    pub(crate) fn l1_entry(at: HostOffset) -> u64 {
        at.0 | COPIED
    }

    /// Whether a cluster at `at` can be a guest's: not in the middle of others, and off the image's own tables. If it
    /// `holds_data`, the file had it already when it was opened.
    pub(crate) fn can_be_data(&self, at: HostOffset, holds_data: bool) -> bool {
        let inside = at.0 < self.limit || !holds_data;
        self.geometry.is_aligned(at.0) && inside && !self.is_metadata(at)
    }

    fn is_metadata(&self, at: HostOffset) -> bool {
        self.metadata.as_ref().is_some_and(|metadata| metadata.contains(at))
    }

    fn slot(&self, index: usize) -> Result<&Slot> {
        self.slots.get(index).ok_or_else(out_of_range)
    }

    fn load<'a>(&self, storage: &dyn Storage, slot: &'a Slot) -> Result<&'a Table> {
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = slot.table.get() {
            return Ok(table);
        }
        let at = slot.linked.load(Ordering::Acquire);
        let entries = match at {
            0 => std::iter::repeat_with(Entry::default)
                .take(self.geometry.entries_per_table() as usize)
                .collect(),
            _ => self.read(storage, HostOffset(at)).context(|| format!("read the L2 table at {at:#x}"))?,
        };
        Ok(slot.table.get_or_init(|| Table {
            entries,
            home: AtomicU64::new(at),
            exposed: AtomicBool::new(at != 0),
        }))
    }

    fn read(&self, storage: &dyn Storage, at: HostOffset) -> Result<Box<[Entry]>> {
        let mut bytes = vec![0; self.geometry.cluster_size() as usize];
        storage.read_at(&mut bytes, at.0)?;
        let entries = bytes.chunks_exact(self.geometry.entry_size() as usize).map(|bytes| {
            let (home, state) = decode(self.geometry, bytes)?;
            // A compressed cluster's home has no offset; it is refused by who meets it.
            let offset = home.offset().unwrap_or(HostOffset(0));
            if offset.0 >= self.limit {
                return Err(Error::new(ErrorKind::Corrupt, "an L2 entry points past the end of the file"));
            }
            if offset.0 != 0 && self.is_metadata(offset) {
                return Err(Error::new(ErrorKind::Corrupt, "an L2 entry points to the image's own tables"));
            }
            Ok(Entry { home: AtomicU64::new(home.0), state: AtomicU64::new(state.0) })
        });
        entries.collect()
    }
}

fn out_of_range() -> Error {
    Error::new(ErrorKind::OutOfRange, "no L2 table maps this cluster")
}
