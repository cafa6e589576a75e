//! What a worker and the session's threads tell each other: how many requests are in flight, and whether to take more.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::Result;

use crate::wake::Bell;

/// A worker that has not ended by then may be held up by its front-end.
const HELD_UP: Duration = Duration::from_millis(100);

/// What of a worker the session's thread may look at.
#[derive(Debug)]
pub(crate) struct QueueState {
    pub(crate) bell: Arc<Bell>,
    /// Requests popped whose used ring entries are not yet written.
    in_flight: AtomicUsize,
    /// Take no more requests, for good.
    closing: AtomicBool,
    /// The worker has seen `closing`, and nothing is in flight.
    closed: Mutex<bool>,
    idle: Condvar,
    /// How many wait for `idle`: telling nobody would still cost a system call.
    waiting: AtomicUsize,
}

impl QueueState {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            bell: Arc::new(Bell::new()?),
            in_flight: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            closed: Mutex::new(false),
            idle: Condvar::new(),
            waiting: AtomicUsize::new(0),
        })
    }

    /// Waits until what was popped has been answered. The caller has made sure that no more is popped: the vring is
    /// not ready. Requests in flight always end, so this does too, also while the gate is closed: those that are parked
    /// are answered with an error. `free` as in [`wait_closed`](Self::wait_closed).
    pub(crate) fn wait_idle(&self, free: impl Fn()) {
        // Before the look at what is in flight: either this sees it at zero, or who brings it there sees this.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        if self.in_flight.load(Ordering::SeqCst) != 0 {
            self.bell.ring();
        }
        let mut closed = self.lock();
        while self.in_flight.load(Ordering::SeqCst) != 0 {
            let waited = self.idle.wait_timeout(closed, HELD_UP).unwrap_or_else(PoisonError::into_inner);
            closed = waited.0;
            if waited.1.timed_out() {
                free();
            }
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// Asks the worker to take no more requests.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.bell.ring();
    }

    /// Waits until the worker has closed. Now and then `free` is called, to free it from where a front-end may hold it up.
    pub(crate) fn wait_closed(&self, free: impl Fn()) {
        let mut closed = self.lock();
        while !*closed {
            let waited = self.idle.wait_timeout(closed, HELD_UP).unwrap_or_else(PoisonError::into_inner);
            closed = waited.0;
            if waited.1.timed_out() {
                free();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no more requests are to be taken.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Whether somebody waits for what is in flight, so that nothing may stay parked.
    pub(crate) fn is_stopping(&self) -> bool {
        self.is_closing() || self.waiting.load(Ordering::SeqCst) != 0
    }

    /// So many were popped.
    pub(crate) fn popped(&self, count: usize) {
        self.in_flight.fetch_add(count, Ordering::SeqCst);
    }

    /// Requests popped and not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// So many were answered.
    pub(crate) fn answered(&self, count: usize) {
        let left = self.in_flight.fetch_sub(count, Ordering::SeqCst) - count;
        if left == 0 && self.waiting.load(Ordering::SeqCst) != 0 {
            // The lock orders this with a waiter that has looked but not yet slept.
            drop(self.lock());
            self.idle.notify_all();
        }
    }

    /// The worker has nothing to do: if it is to close, it has.
    pub(crate) fn rest(&self) {
        if self.is_closing() && self.in_flight.load(Ordering::SeqCst) == 0 {
            *self.lock() = true;
            self.idle.notify_all();
        }
    }
}
