//! The parked requests of one worker: see [`block::Parking`].
//!
//! ```text
//!   failed ─▶ add ─▶ waiting ──(a second, or told to)──▶ wave ─▶ take ─▶ tried ─▶ ended
//!                       ▲                                          │
//!                       └──────────────────────────────────────────┘
//! ```
//!
//! A *wave* tries each request that was waiting when it began, once. What fails again waits for the next one, so a host
//! that stays full costs a try a second for each.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use block::{Bay, Context, ErrorKind, Result};
use vmm_sys_util::timerfd::TimerFd;

use crate::config::MAX_QUEUE_SIZE;
use crate::slot::Slot;

/// The time between two tries.
const EVERY: Duration = Duration::from_secs(1);

/// As many as an honest driver can have in flight at once.
const MAX_PARKED: usize = MAX_QUEUE_SIZE as usize;

/// The requests of one worker that wait for the host.
pub(crate) struct Lot {
    bay: Bay,
    waiting: VecDeque<Slot>,
    /// How many at the front of `waiting` are still to be tried in the wave under way.
    wave: usize,
    /// How many were taken to be tried and have neither ended nor come back.
    tried: usize,
    /// When the next wave begins; `None` while nothing waits for it.
    due: Option<Instant>,
    /// Wakes the worker then. It is never read, only set again or cleared, which makes it unreadable too.
    timer: TimerFd,
}

impl Lot {
    pub(crate) fn new(bay: Bay) -> Result<Self> {
        let timer = TimerFd::new().map_err(std::io::Error::from).context(|| "create a timer")?;
        Ok(Self { bay, waiting: VecDeque::new(), wave: 0, tried: 0, due: None, timer })
    }

    /// The timer, to be watched by the worker.
    pub(crate) fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// How many wait. They are in flight, but not in the engine's slots.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_PARKED
    }

    /// Parks a request that failed so; there is room.
    pub(crate) fn add(&mut self, mut slot: Slot, kind: ErrorKind) {
        if slot.tries > 0 {
            self.tried -= 1;
        }
        slot.park();
        self.waiting.push_back(slot);
        self.tell(Some(kind));
        if self.due.is_none() {
            self.due = Some(Instant::now() + EVERY);
            // Without it they wait for the next event, of which there will be one.
            let _ = self.timer.reset(EVERY, None);
        }
    }

    /// Whether there is one to be tried now.
    pub(crate) fn is_due(&mut self) -> bool {
        if self.wave == 0 && !self.waiting.is_empty() {
            let resumed = self.bay.is_resumed();
            if resumed || self.due.is_some_and(|due| due <= Instant::now()) {
                self.wave = self.waiting.len();
                self.due = None;
                let _ = self.timer.clear();
            }
        }
        self.wave > 0
    }

    /// The next one of the wave. What becomes of it is told by [`add`](Self::add) or [`ended`](Self::ended).
    pub(crate) fn take(&mut self) -> Option<Slot> {
        self.wave = self.wave.checked_sub(1)?;
        let mut slot = self.waiting.pop_front()?;
        slot.tries = slot.tries.saturating_add(1);
        self.tried += 1;
        Some(slot)
    }

    /// One that was tried has been answered. `true` if that was the last of all.
    pub(crate) fn ended(&mut self) -> bool {
        self.tried -= 1;
        self.tell(None);
        self.tried == 0 && self.waiting.is_empty()
    }

    /// All that wait, for those whose ring is being stopped.
    pub(crate) fn empty(&mut self) -> VecDeque<Slot> {
        (self.wave, self.due) = (0, None);
        let _ = self.timer.clear();
        let all = std::mem::take(&mut self.waiting);
        self.tell(None);
        all
    }

    fn tell(&self, kind: Option<ErrorKind>) {
        self.bay.tell(self.waiting.len() + self.tried, kind);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::task::Waker;

    use block::{IoStatus, Parking};

    #[test]
    fn a_wave_tries_each_once_and_what_comes_back_waits_for_the_next() {
        let parking = Arc::new(Parking::default());
        let mut lot = Lot::new(parking.bay(Waker::noop().clone())).unwrap();
        assert!(!lot.is_due() && lot.take().is_none());
        (0..3).for_each(|_| lot.add(Slot::default(), ErrorKind::NoSpace));
        assert!(!lot.is_due(), "the first try came too early");
        assert_eq!((parking.parked(), parking.status()), (3, IoStatus::NoSpace));
        parking.resume();
        assert!(lot.is_due());
        let tried: Vec<Slot> = std::iter::from_fn(|| lot.take()).collect();
        assert_eq!((tried.len(), parking.parked()), (3, 3), "what is being tried is parked still");
        let mut tried = tried.into_iter();
        assert!(!lot.ended());
        lot.add(tried.next().unwrap(), ErrorKind::NoSpace);
        assert!(!lot.is_due(), "tried twice in one wave");
        assert!(!lot.ended());
        assert_eq!(parking.parked(), 1);
        std::thread::sleep(EVERY);
        assert!(lot.is_due());
        assert_eq!(lot.take().map(|slot| slot.tries), Some(2));
        assert!(lot.ended());
        assert_eq!(parking.status(), IoStatus::Ok);
    }
}
