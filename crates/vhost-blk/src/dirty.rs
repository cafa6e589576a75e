//! The log of the pages that this back-end writes to, for a guest that is being moved (vhost-user, "Migration").
//!
//! ```text
//!   SET_LOG_BASE ─▶ memory for a bit a page ─┐
//!   SET_FEATURES ─▶ LOG_ALL ─────────────────┼─▶ marks: data, status bytes
//!   SET_VRING_ADDR ─▶ the used ring's place ─┘   └────▶ and used rings
//! ```
//! The front-end sends a page once it is marked, again and again, until the guest stands still. So a page is marked
//! *after* it was written: a mark that was taken in between would be for the old bytes. Data and the status byte are
//! marked before the entry in the used ring.
//!
//! # Beginning and end
//! A write that is not marked, because the log was not on yet, must be over when the front-end hears that it is on. Marks are
//! made, and the log is looked for, under the lock of a ring. What the front-end asks for is noted here before its
//! message goes on to the framework, which takes the locks of all rings for SET_FEATURES, and that of the ring for
//! SET_VRING_ADDR, before it answers. A log that is replaced by another is only let go of with no mark being made in it.
//!
//! # What is believed
//! The memory is the front-end's: it is guarded as all of that is, and nothing is read from it. A page that it has no bit
//! for is not marked.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use block::{Error, ErrorKind, Result};
use vm_memory::{FileOffset, GuestAddress, MmapRegion, VolatileMemory};

use crate::maps::is_within;
use crate::request::Op;
use crate::slot::Slot;

/// Bytes for which there is one bit.
const PAGE: u64 = 4096;

/// The place of a used ring that is not logged.
const NOWHERE: u64 = u64::MAX;

/// Bytes of a used ring before its entries, and of an entry (virtio 1.3, section 2.7.8).
const USED_HEADER: u64 = 4;
const USED_ENTRY: u64 = 8;

/// A log that a front-end has given.
#[derive(Debug)]
pub(crate) struct Log(MmapRegion);

impl Log {
    /// Maps what a front-end has given, and does not touch it: it must be guarded before. [`ErrorKind::InvalidInput`] if
    /// that can not be.
    pub(crate) fn map(file: OwnedFd, offset: u64, size: u64) -> Result<Self> {
        let refuse = |story: String| Error::new(ErrorKind::InvalidInput, story);
        if size == 0 || !is_within(&file, offset, size) {
            return Err(refuse(format!(
                "a log of dirty pages of {size} bytes, which its file does not have"
            )));
        }
        let len = usize::try_from(size).map_err(|_| refuse(format!("a log of {size} bytes")))?;
        let region = MmapRegion::from_file(FileOffset::new(file.into(), offset), len);
        Ok(Self(region.map_err(|error| refuse(format!("a log that can not be mapped: {error}")))?))
    }

    /// Where it is mapped: its first address, and its bytes.
    pub(crate) fn range(&self) -> (usize, usize) {
        (self.0.as_ptr().addr(), self.0.size())
    }

    /// Marks the pages of these bytes of the guest's memory.
    fn mark(&self, addr: GuestAddress, len: u64) {
        let Some(last) = len.checked_sub(1).map(|rest| addr.0.saturating_add(rest) / PAGE) else { return };
        for page in addr.0 / PAGE..=last {
            let byte = usize::try_from(page / 8).unwrap_or(usize::MAX);
            let Ok(bits) = self.0.get_atomic_ref::<AtomicU8>(byte) else { return };
            bits.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}

/// What one session's front-end wants to be logged.
#[derive(Debug)]
pub(crate) struct Dirty {
    /// LOG_ALL was negotiated.
    all: AtomicBool,
    log: RwLock<Option<Arc<Log>>>,
    /// By queue: where its used ring is, in the log's addresses.
    used: Vec<AtomicU64>,
}

impl Dirty {
    pub(crate) fn new(queues: usize) -> Self {
        let used = (0..queues).map(|_| AtomicU64::new(NOWHERE)).collect();
        Self { all: AtomicBool::new(false), log: RwLock::default(), used }
    }

    /// Whether the guest's memory is logged, which is to say that it is being moved.
    pub(crate) fn is_on(&self) -> bool {
        self.all.load(Ordering::Acquire) && self.read().is_some()
    }

    /// What SET_FEATURES says.
    pub(crate) fn set_all(&self, on: bool) {
        self.all.store(on, Ordering::Release);
    }

    /// What SET_LOG_BASE brings. Nothing is marked in the log before it any more.
    pub(crate) fn set_log(&self, log: Arc<Log>) {
        *self.log.write().unwrap_or_else(PoisonError::into_inner) = Some(log);
    }

    /// What SET_VRING_ADDR says. The framework answers for a queue that there is not.
    pub(crate) fn set_used(&self, queue: usize, addr: Option<u64>) {
        if let Some(used) = self.used.get(queue) {
            used.store(addr.unwrap_or(NOWHERE), Ordering::Release);
        }
    }

    /// The means to mark what was written for queue `queue`, whose ring is locked, and has `size` entries; `None` while
    /// nothing is logged.
    pub(crate) fn marks(&self, queue: usize, size: u16) -> Option<Marks<'_>> {
        if !self.all.load(Ordering::Acquire) {
            return None;
        }
        let log = self.read();
        log.is_some().then(|| {
            let used = self.used.get(queue).map(|used| used.load(Ordering::Acquire));
            Marks { log, used: used.filter(|used| *used != NOWHERE), size }
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Option<Arc<Log>>> {
        self.log.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Marks the pages of one ring and its requests.
pub(crate) struct Marks<'a> {
    log: RwLockReadGuard<'a, Option<Arc<Log>>>,
    used: Option<u64>,
    size: u16,
}

impl Marks<'_> {
    /// A request has ended: its data, if it has any to be written, and its status.
    pub(crate) fn request(&self, slot: &Slot) {
        if matches!(slot.op, Some(Op::Read(_) | Op::Id)) {
            slot.buffer.places().for_each(|(addr, len)| self.mark(addr, len));
        }
        if let Some(addr) = slot.status_at {
            self.mark(addr, 1);
        }
    }

    /// An entry was put into the used ring, whose index is `next` now.
    pub(crate) fn entry(&self, next: u16) {
        let index = next.wrapping_sub(1).checked_rem(self.size).unwrap_or(0);
        self.ring(USED_HEADER + USED_ENTRY * u64::from(index), USED_ENTRY);
        self.ring(0, USED_HEADER);
    }

    /// The driver was told whether to kick: in the used ring's first word, or behind its entries.
    pub(crate) fn notification(&self) {
        self.ring(0, USED_HEADER);
        self.ring(USED_HEADER + USED_ENTRY * u64::from(self.size), 2);
    }

    fn ring(&self, offset: u64, len: u64) {
        if let Some(addr) = self.used.and_then(|used| used.checked_add(offset)) {
            self.mark(GuestAddress(addr), len);
        }
    }

    fn mark(&self, addr: GuestAddress, len: u64) {
        if let Some(log) = &*self.log {
            log.mark(addr, len);
        }
    }
}

#[cfg(test)]
mod tests;
