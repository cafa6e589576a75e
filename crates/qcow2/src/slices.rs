//! Entries in RAM: pieces of L2 tables, *slices*, as many as fit a given room.
//!
//! ```text
//!   slice number ──(low bits)──▶ set ── read lock ──▶ up to WAYS slices, one of them ours?
//! ```
//!
//! A slice can go at any time: the table on disk and the changes that are not in it yet make it again. So a hit is one
//! read lock and one look, and no lock is held while anything is read from the file.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::entry::{Entry, Geometry};

/// Slices of one set, at most.
const WAYS: u64 = 8;

#[derive(Debug)]
struct Slice {
    number: u64,
    /// Looked at since the clock's hand last came by.
    used: AtomicBool,
    entries: Box<[Entry]>,
}

#[derive(Debug, Default)]
struct Set {
    slices: Vec<Slice>,
    hand: usize,
}

/// The slices that are in RAM.
#[derive(Debug)]
pub(crate) struct Slices {
    sets: Box<[RwLock<Set>]>,
    ways: usize,
}

impl Slices {
    /// Room for about `bytes` of entries, at least one slice.
    pub(crate) fn new(geometry: Geometry, bytes: u64) -> Self {
        let slice = geometry.entries_per_slice() * size_of::<Entry>() as u64;
        let most = (bytes / slice).max(1);
        let wanted = geometry.clusters().div_ceil(geometry.entries_per_slice()).max(1);
        let sets = (most / WAYS).max(1).min(wanted.div_ceil(WAYS).next_power_of_two());
        // Rounded down, so the room is not exceeded.
        let sets = 1_u64 << sets.ilog2();
        let sets = std::iter::repeat_with(RwLock::default).take(sets as usize).collect();
        Self { sets, ways: most.min(WAYS) as usize }
    }

    fn set(&self, number: u64) -> Option<&RwLock<Set>> {
        // Their number is a power of two.
        self.sets.get(number as usize & (self.sets.len() - 1))
    }

    fn read(&self, number: u64) -> Option<RwLockReadGuard<'_, Set>> {
        self.set(number).map(|set| set.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, number: u64) -> Option<RwLockWriteGuard<'_, Set>> {
        self.set(number).map(|set| set.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at the entries of slice `number`, if they are here.
    pub(crate) fn look<R>(&self, number: u64, look: impl FnOnce(&[Entry]) -> R) -> Option<R> {
        let set = self.read(number)?;
        let slice = set.slices.iter().find(|slice| slice.number == number)?;
        if !slice.used.load(Ordering::Relaxed) {
            slice.used.store(true, Ordering::Relaxed);
        }
        Some(look(&slice.entries))
    }

    /// Changes one entry of slice `number`, if it is here.
    pub(crate) fn update(&self, number: u64, index: usize, entry: Entry) {
        let Some(mut set) = self.write(number) else { return };
        let slice = set.slices.iter_mut().find(|slice| slice.number == number);
        if let Some(place) = slice.and_then(|slice| slice.entries.get_mut(index)) {
            *place = entry;
        }
    }

    /// Lets go of all.
    pub(crate) fn clear(&self) {
        for set in &self.sets {
            set.write().unwrap_or_else(PoisonError::into_inner).slices = Vec::new();
        }
    }

    /// Keeps slice `number`, in another's place if there is no room.
    pub(crate) fn insert(&self, number: u64, entries: Box<[Entry]>) {
        let Some(mut set) = self.write(number) else { return };
        let Set { slices, hand } = &mut *set;
        let slice = Slice { number, used: AtomicBool::new(false), entries };
        if let Some(place) = slices.iter_mut().find(|slice| slice.number == number) {
            *place = slice;
        } else if slices.len() < self.ways {
            slices.push(slice);
        } else {
            // Twice around at most: the first time takes the marks away.
            for _ in 0..2 * slices.len() {
                *hand = (*hand + 1) % slices.len();
                if let Some(place) =
                    slices.get_mut(*hand).filter(|slice| !slice.used.swap(false, Ordering::Relaxed))
                {
                    *place = slice;
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Home, HostOffset, State};

    fn entry(n: u64) -> Entry {
        Entry { home: Home::own(HostOffset(n << 17)), state: State::new(1, 0) }
    }

    #[test]
    fn room_is_bounded_and_what_is_used_stays() {
        let geometry = Geometry::new(1 << 40, 17, true);
        let slice = geometry.entries_per_slice() * 16;
        let slices = Slices::new(geometry, 16 * slice);
        let entries = geometry.entries_per_slice() as usize;
        for number in 1..1000 {
            slices.look(1, |entries| assert_eq!(entries[0], entry(1)));
            slices.insert(number, vec![entry(number); entries].into());
        }
        let kept: usize = slices.sets.iter().map(|set| set.read().unwrap().slices.len()).sum();
        assert_eq!(kept, 16);
        assert!(slices.look(1, |_| ()).is_some(), "looked at all the time, and gone");
        slices.update(1, 2, entry(7));
        assert_eq!(slices.look(1, |entries| (entries[1], entries[2])), Some((entry(1), entry(7))));
    }

    #[test]
    fn there_is_always_room_for_one_and_never_more_than_the_disk_has() {
        let none = Slices::new(Geometry::new(1 << 40, 17, true), 0);
        (0..9).for_each(|number| none.insert(number, vec![entry(number)].into()));
        assert_eq!(none.look(8, |entries| entries[0]), Some(entry(8)));
        assert!(none.look(7, |_| ()).is_none());
        none.clear();
        assert!(none.look(8, |_| ()).is_none());
        assert_eq!(Slices::new(Geometry::new(1 << 20, 16, false), u64::MAX).sets.len(), 1);
    }
}
