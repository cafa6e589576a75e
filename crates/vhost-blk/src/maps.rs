//! What a front-end has given us to map, and the guards on it.
//!
//! A map of the guest's memory is guarded (see [`sigbus`]) before a worker may see it, and until no
//! worker holds on to it any more: only then does its memory go, unless a later map has it too. The same goes for
//! in-flight records and logs of dirty pages. As long as any of it is mapped it is charged, see [`allowance`](crate::allowance).

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Context, Error, ErrorKind, Result};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{fstat, fstatfs};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::allowance::{Allowance, Charge};
use crate::dirty::Log;
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
    allowance: Allowance,
    /// Readable once memory of the front-end's was found to be gone.
    gone: OwnedFd,
}

/// Dropped in this order: no guard is left on memory that is not mapped any more, and no memory that is not charged.
#[derive(Debug, Default)]
struct Kept {
    /// By where the memory is mapped, and for how many bytes.
    guards: BTreeMap<(usize, usize), Guarded>,
    /// The last one is the current one.
    maps: Vec<Arc<Memory>>,
    records: Vec<Arc<Record>>,
    logs: Vec<Arc<Log>>,
    /// As the guards.
    charges: BTreeMap<(usize, usize), Charge>,
    /// What is about to be mapped.
    announced: Vec<Charge>,
}

impl Maps {
    pub(crate) fn new(allowance: Allowance) -> Result<Self> {
        let gone = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(std::io::Error::from);
        let gone = gone.context(|| "create an event descriptor")?;
        Ok(Self { current: SharedMemory::new(Memory::new()), kept: Mutex::default(), allowance, gone })
    }

    /// The map that the workers take.
    pub(crate) fn current(&self) -> SharedMemory {
        self.current.clone()
    }

    /// Readable once memory that is guarded here was found to be gone: the session must end.
    pub(crate) fn gone(&self) -> BorrowedFd<'_> {
        self.gone.as_fd()
    }

    /// Charges pieces of so many bytes, which are to be mapped by this session's front-end; an error if that is more than
    /// it may have. What comes of it is found here, by its length, when it is to be guarded; or the session ends.
    pub(crate) fn announce(&self, lens: impl Iterator<Item = u64>) -> Result<()> {
        let mut kept = self.kept();
        for len in lens {
            let charge = self.allowance.charge(len).or_else(|_| {
                kept.prune();
                self.allowance.charge(len)
            });
            kept.announced.push(charge?);
        }
        Ok(())
    }

    /// Takes back what was announced, where there is no framework to map it.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn renounce(&self) {
        self.kept().announced.clear();
    }

    /// The front-end has another memory table. Whoever had it mapped has looked at its files ([`is_within`]).
    pub(crate) fn publish(&self, memory: &Memory) -> Result<()> {
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

    /// Guards a log of dirty pages; until nobody else holds it.
    pub(crate) fn keep_log(&self, log: &Arc<Log>) -> Result<()> {
        let mut kept = self.kept();
        self.guard(&mut kept, log.range())?;
        kept.logs.push(Arc::clone(log));
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
            let announced = kept.announced.iter().position(|charge| charge.len() == range.1 as u64);
            let charge = announced.map(|index| kept.announced.swap_remove(index));
            let charge =
                charge.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "memory that was not announced"))?;
            kept.guards.insert(range, sigbus::guard(range.0, range.1, self.gone())?);
            kept.charges.insert(range, charge);
        }
        Ok(())
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn prune(&mut self) {
        let (maps, records, logs) = (self.maps.len(), self.records.len(), self.logs.len());
        let unused_maps: Vec<_> =
            self.maps.extract_if(..maps.saturating_sub(1), |map| Arc::strong_count(map) == 1).collect();
        let unused_records: Vec<_> =
            self.records.extract_if(..records, |record| Arc::strong_count(record) == 1).collect();
        let unused_logs: Vec<_> = self.logs.extract_if(..logs, |log| Arc::strong_count(log) == 1).collect();
        let Self { guards, maps, records, logs, charges, .. } = self;
        let used: BTreeSet<_> = maps
            .iter()
            .flat_map(|map| ranges(map))
            .chain(records.iter().map(|record| record.range()))
            .chain(logs.iter().map(|log| log.range()))
            .collect();
        guards.retain(|range, _| used.contains(range));
        drop((unused_maps, unused_records, unused_logs));
        charges.retain(|range, _| used.contains(range));
    }
}

/// Whether `len` bytes from `start` on can be mapped, and with zeroes in their place later: there are as many, for now (a
/// file can be shrunk any time), and in whole pages where those are huge. The kernel maps a piece of a huge page as if it
/// were all of it, and then refuses to put something in that piece's place, or even to unmap it.
pub(crate) fn is_within(file: impl AsFd, start: u64, len: u64) -> bool {
    let file = file.as_fd();
    let (Some(end), Ok(found), Ok(system)) = (start.checked_add(len), fstat(file), fstatfs(file)) else {
        return false;
    };
    let huge = system.f_type == libc::HUGETLBFS_MAGIC;
    end <= found.st_size.cast_unsigned() && (!huge || len.is_multiple_of(system.f_bsize.cast_unsigned()))
}

fn ranges(memory: &Memory) -> impl Iterator<Item = (usize, usize)> {
    memory.iter().filter_map(|region| {
        let start = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        Some((start.addr(), usize::try_from(region.len()).ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::iter;
    use vm_memory::GuestAddress;

    const MIB: u64 = 1 << 20;

    fn file(flags: MemfdFlags) -> OwnedFd {
        let file = memfd_create("memory", flags).unwrap();
        ftruncate(&file, 4 * MIB).unwrap();
        file
    }

    #[test]
    fn memory_lies_within_its_file() {
        let file = file(MemfdFlags::CLOEXEC);
        for (start, len) in [(0, 4 * MIB), (4096, 4 * MIB - 4096), (0, 4097)] {
            assert!(is_within(&file, start, len), "{len} from {start} on");
        }
        for (start, len) in [(0, 4 * MIB + 1), (4096, 4 * MIB), (u64::MAX, 1), (1, u64::MAX)] {
            assert!(!is_within(&file, start, len), "{len} from {start} on");
        }
    }

    /// A piece of a huge page could not be replaced when its file was shrunk: the signal was the end of all disks.
    #[test]
    fn huge_pages_are_mapped_whole() {
        let file = file(MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
        assert!(is_within(&file, 0, 4 * MIB) && is_within(&file, 2 * MIB, 2 * MIB));
        assert!(!is_within(&file, 0, 3 * MIB) && !is_within(&file, 0, 4096));
    }

    /// A ring that is idle lets go of nothing more: memory that the last request held went on counting.
    #[test]
    fn what_nobody_holds_makes_room_for_what_is_announced() {
        let maps = Maps::new(Allowance::share(1)).unwrap();
        let give = |at| {
            maps.announce(iter::once(MIB)).unwrap();
            maps.publish(&Memory::from_ranges(&[(GuestAddress(at), MIB as usize)]).unwrap()).unwrap();
        };
        give(0);
        let held = maps.current().memory().into_inner();
        give(MIB);
        let _rest = maps.allowance.charge((112 << 40) - 2 * MIB).unwrap();
        assert!(maps.announce(iter::once(MIB)).is_err());
        drop(held);
        maps.announce(iter::once(MIB)).unwrap();
    }
}
