//! The record of what is in flight, which the front-end keeps while this process dies and comes back (vhost-user,
//! "Inflight I/O tracking", split virtqueues).
//!
//! ```text
//!   ┌─ queue 0 ───────────────────────────────────────────────────┬─ queue 1 ─┬ … ┬────────────┐
//!   │ features version desc_num last_batch_head used_idx │ desc[] │           │   │ write cache│
//!   └─────────────────────────────────────────────────────────────┴───────────┴───┴────────────┘
//!          64       16       16          16          16     desc: inflight 8, -, next 16, counter 64
//! ```
//! # Lifecycle
//! A front-end asks for the memory ([`create`]), keeps it, and gives it back each time that it connects
//! ([`Record::map`]). A ring that is started takes its part of it ([`QueueRecord::recover`]); what the record says is in
//! flight is submitted again before anything new is.
//!
//! # Order of stores
//! A process that is killed has made all stores up to some point of its program and none after it. So the order of the
//! program is what counts, and each store releases those before it:
//! - a request is marked before it is begun, its counter before its mark;
//! - one is answered between [`QueueRecord::answering`], which says which one, and [`QueueRecord::answered`], which
//!   takes the mark away and then notes the index of the used ring. In between that index and the ring's own differ,
//!   and whoever finds them so takes the mark away himself. Each answer is a batch of one.
//!
//! # What is believed
//! Nothing. The memory is the front-end's: any number in it may be any other at the next look. Each is read once, an
//! index is checked before its use, and every walk is bounded. The worst that a wrong record does is that requests of
//! the disk's own guest are carried out again, or not at all.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Context, Error, ErrorKind, Result};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{AtomicInteger, FileOffset, MmapRegion, VolatileMemory};

use crate::cache::CacheMode;
use crate::config::MAX_QUEUE_SIZE;
use crate::maps::is_within;

/// The one version there is. 0 is memory that no back-end has used yet.
const VERSION: u16 = 1;

const HEADER: usize = 16;
const DESC: usize = 16;

/// Queues begin at multiples of it, so that they share no cache line.
const ALIGNMENT: usize = 64;

/// Offsets in a queue's header.
const FEATURES_AT: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;

/// Offsets in a descriptor's state.
const INFLIGHT_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// What the message GET_INFLIGHT_FD asks for, or SET_INFLIGHT_FD brings.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Shape {
    /// Bytes of the memory, from `offset` on in its file.
    pub(crate) size: u64,
    pub(crate) offset: u64,
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
}

impl Shape {
    /// Bytes of a queue's part.
    fn stride(&self) -> usize {
        (HEADER + DESC * usize::from(self.queue_size)).next_multiple_of(ALIGNMENT)
    }

    /// Where the write cache is noted.
    fn cache_at(&self) -> usize {
        self.stride() * usize::from(self.queues)
    }

    /// Bytes that a record of these queues takes.
    fn needed(&self) -> usize {
        self.cache_at() + ALIGNMENT
    }

    fn check(&self, max_queues: usize) -> Result<()> {
        let Self { queues, queue_size, .. } = *self;
        match (1..=max_queues).contains(&usize::from(queues)) && (1..=MAX_QUEUE_SIZE).contains(&queue_size) {
            true => Ok(()),
            false => Err(invalid(format!("an in-flight record of {queues} queues of {queue_size}"))),
        }
    }
}

fn invalid(story: String) -> Error {
    Error::new(ErrorKind::InvalidInput, story)
}

/// Memory for a record of `asked.queues` queues, and its shape. It can be neither shrunk nor grown.
pub(crate) fn create(asked: Shape, max_queues: usize) -> Result<(OwnedFd, Shape)> {
    asked.check(max_queues)?;
    let shape = Shape { size: asked.needed() as u64, offset: 0, ..asked };
    let create = || {
        let file = memfd_create("frazil-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, shape.size)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    };
    let file: io::Result<OwnedFd> = create().map_err(|errno: rustix::io::Errno| errno.into());
    Ok((file.context(|| "create an in-flight record")?, shape))
}

/// A record that a front-end has given.
#[derive(Debug)]
pub(crate) struct Record {
    region: MmapRegion,
    shape: Shape,
}

impl Record {
    /// Maps what a front-end has given, and does not touch it yet: it must be guarded before. [`ErrorKind::InvalidInput`]
    /// if it is too small, or too large.
    pub(crate) fn map(file: OwnedFd, shape: Shape, max_queues: usize) -> Result<Self> {
        shape.check(max_queues)?;
        // The tail may be missing: only our own records have it.
        if shape.size < shape.cache_at() as u64 || shape.size > shape.needed() as u64 * 2 + (1 << 20) {
            return Err(invalid(format!("an in-flight record of {} bytes", shape.size)));
        }
        if !is_within(&file, shape.offset, shape.size) {
            return Err(invalid("an in-flight record that is longer than its file".to_owned()));
        }
        let file = FileOffset::new(file.into(), shape.offset);
        let region = MmapRegion::from_file(file, shape.size as usize)
            .map_err(|error| invalid(format!("an in-flight record that can not be mapped: {error}")))?;
        Ok(Self { region, shape })
    }

    /// [`ErrorKind::InvalidInput`] if it is of a kind that we do not know.
    pub(crate) fn check(&self) -> Result<()> {
        for queue in 0..usize::from(self.shape.queues) {
            let at = queue * self.shape.stride();
            let (features, version) =
                (self.load::<AtomicU64>(at + FEATURES_AT), self.load16(at + VERSION_AT));
            let known =
                version == 0 || (version, self.load16(at + DESC_NUM_AT)) == (VERSION, self.shape.queue_size);
            if features != 0 || !known {
                return Err(invalid(format!(
                    "an in-flight record of version {version}, with features {features:#x}"
                )));
            }
        }
        Ok(())
    }

    /// Where it is mapped: its first address, and its bytes.
    pub(crate) fn range(&self) -> (usize, usize) {
        (self.region.as_ptr().addr(), self.region.size())
    }

    /// Whether the guest had its write cache on when this was last noted, if it ever was.
    pub(crate) fn writeback(&self) -> Option<bool> {
        match self.load::<AtomicU8>(self.shape.cache_at()) {
            1 => Some(false),
            2 => Some(true),
            _ => None,
        }
    }

    /// Notes how the guest has its write cache.
    pub(crate) fn set_writeback(&self, on: bool) {
        self.store::<AtomicU8>(self.shape.cache_at(), 1 + u8::from(on));
    }

    /// The part of queue `queue`, if it has one.
    pub(crate) fn queue(self: &Arc<Self>, queue: usize) -> Option<QueueRecord> {
        let base = queue * self.shape.stride();
        let found = queue < usize::from(self.shape.queues);
        found.then(|| QueueRecord { record: Arc::clone(self), base, counter: 0 })
    }

    /// 0 past the end, where only a tail that is missing is looked for.
    fn load<A: AtomicInteger>(&self, at: usize) -> A::V
    where
        A::V: Default,
    {
        self.region.get_atomic_ref::<A>(at).map(|atomic| atomic.load(Ordering::Acquire)).unwrap_or_default()
    }

    fn store<A: AtomicInteger>(&self, at: usize, value: A::V) {
        if let Ok(atomic) = self.region.get_atomic_ref::<A>(at) {
            atomic.store(value, Ordering::Release);
        }
    }

    fn load16(&self, at: usize) -> u16 {
        self.load::<AtomicU16>(at)
    }

    fn store16(&self, at: usize, value: u16) {
        self.store::<AtomicU16>(at, value);
    }
}

/// The record that a session's front-end has given, if any. A ring takes its part of it when it is started.
#[derive(Clone, Debug, Default)]
pub(crate) struct Records(Arc<Mutex<Option<Arc<Record>>>>);

impl Records {
    /// Rings that are started from now on go by this record.
    pub(crate) fn set(&self, record: Arc<Record>) {
        *self.lock() = Some(record);
    }

    /// The write cache is as the record says: as this guest had set it, in the life of another process maybe. A record that
    /// says nothing is told. Only for the session whose guest has the disk.
    pub(crate) fn adopt_cache(&self, cache: &CacheMode) {
        if let Some(record) = &*self.lock() {
            match record.writeback() {
                Some(on) => cache.set_writeback(on),
                None => record.set_writeback(cache.field()),
            }
        }
    }

    /// The guest sets its write cache, here and in the record at once.
    pub(crate) fn set_cache(&self, cache: &CacheMode, on: bool) {
        let record = self.lock();
        cache.set_writeback(on);
        record.iter().for_each(|record| record.set_writeback(on));
    }

    /// Queue `queue`'s part of the record, if it has one.
    pub(crate) fn queue(&self, queue: usize) -> Option<QueueRecord> {
        self.lock().as_ref()?.queue(queue)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Record>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One ring's part of a record, while the ring runs.
#[derive(Debug)]
pub(crate) struct QueueRecord {
    record: Arc<Record>,
    base: usize,
    /// That of the next request.
    counter: u64,
}

impl QueueRecord {
    /// Descriptors that it has room for. A ring with more can not be tracked.
    pub(crate) fn size(&self) -> u16 {
        self.record.shape.queue_size
    }

    /// The heads that are to be submitted again, in the order in which they were taken; `None` if the record is new, so
    /// that it is the front-end that knows where the ring goes on. `used_idx` is the used ring's own index.
    pub(crate) fn recover(&mut self, used_idx: u16) -> Option<Vec<u16>> {
        let Self { record, base, .. } = &*self;
        if (record.load16(base + VERSION_AT), record.load16(base + DESC_NUM_AT)) != (VERSION, self.size()) {
            (0..self.size()).for_each(|head| self.mark(head, false));
            record.store16(base + DESC_NUM_AT, self.size());
            record.store16(base + USED_IDX_AT, used_idx);
            // Last: from here on it counts.
            record.store16(base + VERSION_AT, VERSION);
            return None;
        }
        self.end_batch(used_idx);
        let mut again: Vec<_> = (0..self.size())
            .filter(|head| self.is_marked(*head))
            .map(|head| (self.counter_of(head), head))
            .collect();
        again.sort_unstable();
        self.counter = again.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some(again.into_iter().map(|(_, head)| head).collect())
    }

    /// The last batch reached the used ring, and not all of its marks were taken away.
    fn end_batch(&self, used_idx: u16) {
        let Self { record, base, .. } = self;
        let batch = used_idx.wrapping_sub(record.load16(base + USED_IDX_AT));
        let mut head = record.load16(base + LAST_BATCH_HEAD_AT);
        for _ in 0..batch.min(self.size()) {
            let Some(at) = self.at(head) else { break };
            self.mark(head, false);
            head = record.load16(at + NEXT_AT);
        }
        record.store16(base + USED_IDX_AT, used_idx);
    }

    /// A request has been taken from the available ring, and is about to be begun.
    pub(crate) fn taken(&mut self, head: u16) {
        if let Some(at) = self.at(head) {
            self.record.store::<AtomicU64>(at + COUNTER_AT, self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.mark(head, true);
        }
    }

    /// A request is about to be put into the used ring.
    pub(crate) fn answering(&self, head: u16) {
        if let Some(at) = self.at(head) {
            let last = self.base + LAST_BATCH_HEAD_AT;
            self.record.store16(at + NEXT_AT, self.record.load16(last));
            self.record.store16(last, head);
        }
    }

    /// It has been, and the used ring's index is this.
    pub(crate) fn answered(&self, head: u16, used_idx: u16) {
        self.mark(head, false);
        self.record.store16(self.base + USED_IDX_AT, used_idx);
    }

    /// Where a head's state is, if it has one.
    fn at(&self, head: u16) -> Option<usize> {
        (head < self.size()).then(|| self.base + HEADER + DESC * usize::from(head))
    }

    fn mark(&self, head: u16, inflight: bool) {
        if let Some(at) = self.at(head) {
            self.record.store::<AtomicU8>(at + INFLIGHT_AT, inflight.into());
        }
    }

    fn is_marked(&self, head: u16) -> bool {
        self.at(head).is_some_and(|at| self.record.load::<AtomicU8>(at + INFLIGHT_AT) == 1)
    }

    fn counter_of(&self, head: u16) -> u64 {
        self.at(head).map_or(0, |at| self.record.load::<AtomicU64>(at + COUNTER_AT))
    }
}

#[cfg(test)]
mod tests;
