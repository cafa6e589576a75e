//! What a front-end has given us to map, and the guards on it.
//!
//! A map of the guest's memory is guarded (see [`sigbus`]) before a worker may see it, and until no
//! worker holds on to it any more: only then does its memory go, unless a later map has it too. The same goes for
//! in-flight records.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Context, Error, ErrorKind, Result};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{FileOffset, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::guest::Memory;
use crate::inflight::Record;
use crate::sigbus::{self, Guarded};
use crate::vring::SharedMemory;

/// One session's maps.
#[derive(Debug)]
pub(crate) struct Maps {
    /// The map that the workers take, each change of it guarded. The framework has one of its own.
    current: SharedMemory,
    kept: Mutex<Kept>,
    /// Readable once memory of the front-end's was found to be gone.
    gone: OwnedFd,
}

#[derive(Debug, Default)]
struct Kept {
    /// By where the memory is mapped, and for how many bytes.
    guards: BTreeMap<(usize, usize), Guarded>,
    /// The last one is the current one.
    maps: Vec<Arc<Memory>>,
    records: Vec<Arc<Record>>,
}

impl Maps {
    pub(crate) fn new() -> Result<Self> {
        let gone = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(std::io::Error::from);
        let gone = gone.context(|| "create an event descriptor")?;
        Ok(Self { current: SharedMemory::new(Memory::new()), kept: Mutex::default(), gone })
    }

    /// The map that the workers take.
    pub(crate) fn current(&self) -> SharedMemory {
        self.current.clone()
    }

    /// Readable once memory that is guarded here was found to be gone: the session must end.
    pub(crate) fn gone(&self) -> BorrowedFd<'_> {
        self.gone.as_fd()
    }

    /// The front-end has another memory table. [`ErrorKind::InvalidInput`] if its files are too short for it.
    pub(crate) fn publish(&self, memory: &Memory) -> Result<()> {
        for region in memory.iter() {
            if !region.file_offset().is_some_and(|file| is_within(file, region.len())) {
                return Err(Error::new(ErrorKind::InvalidInput, "memory that is longer than its file"));
            }
        }
        let mut kept = self.kept();
        for range in ranges(memory) {
            self.guard(&mut kept, range)?;
        }
        self.current.lock().unwrap_or_else(PoisonError::into_inner).replace(memory.clone());
        kept.maps.push(self.current.memory().into_inner());
        kept.prune();
        Ok(())
    }

    /// Guards a record; until nobody else holds it.
    pub(crate) fn keep(&self, record: &Arc<Record>) -> Result<()> {
        let mut kept = self.kept();
        self.guard(&mut kept, record.range())?;
        kept.records.push(Arc::clone(record));
        kept.prune();
        Ok(())
    }

    /// Lets go of what nobody else holds any more; `true` if nothing but the current map is left to let go of.
    pub(crate) fn prune(&self) -> bool {
        let mut kept = self.kept();
        kept.prune();
        kept.maps.len() <= 1
    }

    fn guard(&self, kept: &mut Kept, range: (usize, usize)) -> Result<()> {
        if range.1 > 0 && !kept.guards.contains_key(&range) {
            kept.guards.insert(range, sigbus::guard(range.0, range.1, self.gone())?);
        }
        Ok(())
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn prune(&mut self) {
        let (maps, records) = (self.maps.len(), self.records.len());
        // What is unused is unmapped when these go out of scope: after its guards.
        let _maps: Vec<_> =
            self.maps.extract_if(..maps.saturating_sub(1), |map| Arc::strong_count(map) == 1).collect();
        let _records: Vec<_> =
            self.records.extract_if(..records, |record| Arc::strong_count(record) == 1).collect();
        let Self { guards, maps, records } = self;
        let used: Vec<_> = maps
            .iter()
            .flat_map(|map| ranges(map))
            .chain(records.iter().map(|record| record.range()))
            .collect();
        guards.retain(|range, _| used.contains(range));
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // Before the memory they guard.
        self.guards.clear();
    }
}

/// Whether there are `len` bytes from there on, for now: a file can be shrunk any time.
pub(crate) fn is_within(file: &FileOffset, len: u64) -> bool {
    let end = file.start().checked_add(len);
    let found = file.file().metadata().map(|metadata| metadata.len());
    matches!((end, found), (Some(end), Ok(found)) if end <= found)
}

fn ranges(memory: &Memory) -> impl Iterator<Item = (usize, usize)> {
    memory.iter().filter_map(|region| {
        let start = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        Some((start.addr(), usize::try_from(region.len()).ok()?))
    })
}
