//! The map: what has been found out of a disk's segments, within a bound of memory.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::SEGMENT;
use super::runs::Runs;
use crate::ByteRange;

/// How many parts the map has at most, so that workers seldom meet at a lock.
const MAX_SHARDS: u64 = 64;
/// What a shard is given at least: the runs of a segment that is all in crumbs of 512 bytes fit in, twice.
const MIN_SHARD_BYTES: u64 = 128 * 1024;
/// What a segment costs beside its runs: its place in the table and in the queue, and what an allocator adds.
const SEGMENT_OVERHEAD: u64 = 128;

/// A segment's number.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Segment(u64);

impl Segment {
    /// The one with the byte at `offset`.
    pub(super) fn at(offset: u64) -> Self {
        Self(offset / SEGMENT)
    }

    /// Its bytes; past the end of the disk too, where it ends in mid-segment.
    pub(super) fn range(self) -> ByteRange {
        let offset = self.0 * SEGMENT;
        ByteRange { offset, len: SEGMENT.min(u64::MAX - offset) }
    }

    /// The bytes of the aligned group of `count` segments that it is in.
    pub(super) fn group(self, count: u64) -> ByteRange {
        let offset = self.0 / count * count * SEGMENT;
        ByteRange { offset, len: (count * SEGMENT).min(u64::MAX - offset) }
    }
}

/// Segments, in shards with a lock and a share of the memory each.
pub(super) struct Map {
    budget: u64,
    shards: Box<[RwLock<Shard>]>,
}

impl Map {
    /// An empty map that takes at most `budget` bytes; with 0 it keeps nothing.
    pub(super) fn new(budget: u64) -> Self {
        let count = (budget / MIN_SHARD_BYTES).clamp(1, MAX_SHARDS);
        let shard = || RwLock::new(Shard { budget: budget / count, ..Shard::default() });
        Self { budget, shards: (0..count).map(|_| shard()).collect() }
    }

    /// Bytes it takes at most.
    pub(super) fn budget(&self) -> u64 {
        self.budget
    }

    /// Hands what is known of a segment to `look`: of how many layers, and their runs. A shard is locked meanwhile.
    pub(super) fn with<T>(&self, segment: Segment, look: impl FnOnce(usize, &Runs) -> T) -> Option<T> {
        let shard = self.read(segment);
        let entry = shard.entries.get(&segment)?;
        // Only looked at, where it is set already, the line stays in the caches of all processors.
        if !entry.used.load(Ordering::Relaxed) {
            entry.used.store(true, Ordering::Relaxed);
        }
        Some(look(entry.resolved, &entry.runs))
    }

    /// Whether anything is known of a segment.
    pub(super) fn knows(&self, segment: Segment) -> bool {
        self.read(segment).entries.contains_key(&segment)
    }

    /// Keeps what was found of a segment in so many layers, unless more is known already.
    pub(super) fn insert(&self, segment: Segment, resolved: usize, runs: Runs) {
        self.write(segment).insert(segment, resolved, runs);
    }

    /// Bytes that are taken now.
    #[cfg(test)]
    pub(super) fn taken(&self) -> u64 {
        let taken = |shard: &RwLock<Shard>| shard.read().unwrap_or_else(PoisonError::into_inner).taken;
        self.shards.iter().map(taken).sum()
    }

    fn shard(&self, segment: Segment) -> &RwLock<Shard> {
        &self.shards[(segment.0 % self.shards.len() as u64) as usize]
    }

    fn read(&self, segment: Segment) -> RwLockReadGuard<'_, Shard> {
        self.shard(segment).read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, segment: Segment) -> RwLockWriteGuard<'_, Shard> {
        self.shard(segment).write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Each on cache lines of its own: taking one's lock writes to it.
#[derive(Default)]
#[repr(align(128))]
struct Shard {
    budget: u64,
    /// Bytes that the entries take.
    taken: u64,
    entries: HashMap<Segment, Entry, Spread>,
    /// The clock: every entry once, the next to be looked at first.
    clock: VecDeque<Segment>,
}

struct Entry {
    /// How many layers, from the base on, have been asked.
    resolved: usize,
    /// Whether anybody has asked since the clock's hand last came by.
    used: AtomicBool,
    runs: Runs,
}

/// Makes a hash of a segment's number at the price of a multiplication. A guest that picks numbers which meet makes only
/// its own reads slow, and not many fit a shard.
#[derive(Clone, Copy, Debug, Default)]
struct Spread(u64);

impl BuildHasher for Spread {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        Self(0)
    }
}

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    /// Both halves of the product, for the table goes by the lowest and the highest bits, and numbers in one shard have
    /// the lowest in common.
    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product as u64) ^ (product >> 64) as u64;
    }
}

fn cost(runs: &Runs) -> u64 {
    runs.memory() + SEGMENT_OVERHEAD
}

impl Shard {
    fn insert(&mut self, segment: Segment, resolved: usize, runs: Runs) {
        debug_assert!(runs.range() == segment.range(), "the runs of a segment are all of it");
        let known = self.entries.get(&segment).is_some_and(|known| known.resolved >= resolved);
        if known || cost(&runs) > self.budget {
            return;
        }
        self.make_room(cost(&runs));
        self.taken += cost(&runs);
        let entry = Entry { resolved, used: AtomicBool::new(false), runs };
        match self.entries.insert(segment, entry) {
            Some(older) => self.taken -= cost(&older.runs),
            None => self.clock.push_back(segment),
        }
    }

    /// Takes out entries until `more` bytes fit, which are not more than the budget. A round of the hand clears all
    /// marks, so there are two at most.
    fn make_room(&mut self, more: u64) {
        while self.taken + more > self.budget
            && let Some(segment) = self.clock.pop_front()
        {
            let used = self.entries.get_mut(&segment).map(|entry| std::mem::take(entry.used.get_mut()));
            if used == Some(true) {
                self.clock.push_back(segment);
            } else if let Some(entry) = self.entries.remove(&segment) {
                self.taken -= cost(&entry.runs);
            }
        }
    }
}
