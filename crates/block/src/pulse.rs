//! The pulse: how long a disk's requests take just now, for those who work beside the guest and must not be felt; and
//! what it has been asked for in all, for those who watch.
//!
//! ```text
//!   worker ─▶ Beat ─┐  counts, each worker in cache lines of its own
//!   worker ─▶ Beat ─┼─▶ Pulse ─▶ Reading ─▶ a job that slows down
//!   worker ─▶ Beat ─┘  every 64th      └──▶ Stats ─▶ statistics, metrics
//!                      request is timed
//! ```
//!
//! # Invariants
//! - A worker waits for nobody here, and writes to memory that it shares only when a timed request has ended.
//! - A timed request counts from when it was taken from its ring to its used ring entry: the guest's wait before a closed
//!   gate is not in it.

mod stats;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use stats::{Ended, Kind, LATENCY_BUCKETS, Outcome, Stats, Tally};

/// Of so many requests one is timed. Reading the clock costs a tenth of what a small request does.
const TIMED: u64 = 64;

/// A sample's weight in the mean is one in so many.
const WEIGHT: u64 = 8;

/// The latency of one disk's requests. Its workers feed it, each through its own [`Beat`]; anybody may read it.
#[derive(Debug)]
pub struct Pulse {
    /// What times are counted from.
    epoch: Instant,
    /// The moving mean in nanoseconds; zero before the first sample.
    mean: AtomicU64,
    samples: AtomicU64,
    workers: Mutex<Workers>,
}

#[derive(Debug, Default)]
struct Workers {
    counts: Vec<Arc<Counts>>,
    /// What those who are gone have counted.
    gone: Counts,
}

/// One worker's counts. Nobody else writes them; the alignment keeps those of two workers out of one another's cache
/// lines (128 bytes, for lines are fetched in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counts {
    begun: AtomicU64,
    completed: AtomicU64,
    /// When the request began that is being timed, in nanoseconds since the epoch, at least 1; 0 if there is none.
    timing: AtomicU64,
    stats: stats::Counts,
}

/// What the pulse says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Reading {
    /// A moving mean over the last timed requests, or the age of one that is still under way if that is more; zero before
    /// the first one. It stays as it is while the guest asks for nothing: see `samples`.
    pub latency: Duration,
    /// How many requests have been timed: what `latency` says is news only if this has grown.
    pub samples: u64,
    /// Requests answered since the disk was opened.
    pub completed: u64,
    /// Requests taken from the rings and not answered.
    pub in_flight: u64,
}

impl Default for Pulse {
    fn default() -> Self {
        let (mean, samples) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { epoch: Instant::now(), mean, samples, workers: Mutex::default() }
    }
}

impl Pulse {
    /// A worker's own end of it.
    pub fn beat(self: &Arc<Self>) -> Beat {
        let counts = Arc::<Counts>::default();
        self.workers().counts.push(Arc::clone(&counts));
        Beat { pulse: Arc::clone(self), counts, until_timed: 0, timed: None }
    }

    /// What it says now. Takes a lock that workers take only when they come and go.
    pub fn read(&self) -> Reading {
        let mean = Duration::from_nanos(self.mean.load(Ordering::Relaxed));
        let samples = self.samples.load(Ordering::Relaxed);
        let workers = self.workers();
        let mut reading = Reading { latency: mean, samples, completed: 0, in_flight: 0 };
        reading.completed = workers.gone.completed.load(Ordering::Relaxed);
        let now = self.now();
        for counts in &workers.counts {
            // Completed first: a request that ends in between is in flight still, and never less than none.
            let completed = counts.completed.load(Ordering::Acquire);
            reading.completed += completed;
            reading.in_flight += counts.begun.load(Ordering::Acquire).saturating_sub(completed);
            let began = counts.timing.load(Ordering::Relaxed);
            if began != 0 {
                reading.latency = reading.latency.max(Duration::from_nanos(now.saturating_sub(began)));
            }
        }
        reading
    }

    /// What the disk has been asked for since it was opened. Takes the same lock.
    pub fn stats(&self) -> Stats {
        let workers = self.workers();
        let mut stats = Stats::default();
        stats.add(&workers.gone.stats);
        workers.counts.iter().for_each(|counts| stats.add(&counts.stats));
        stats
    }

    /// Nanoseconds since the epoch, at least 1.
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1)
    }

    fn sample(&self, nanos: u64) {
        let mean = |mean: u64| match mean {
            0 => Some(nanos.max(1)),
            // Not by a difference, which could be negative; and rounded up, so that it is never zero again.
            mean => Some((mean / WEIGHT * (WEIGHT - 1)).saturating_add(nanos / WEIGHT).saturating_add(1)),
        };
        let _ = self.mean.fetch_update(Ordering::Relaxed, Ordering::Relaxed, mean);
        self.samples.fetch_add(1, Ordering::Relaxed);
    }

    fn workers(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker's end of a [`Pulse`]. Requests go by numbers of the worker's choice, of which no two are in flight at once.
/// Dropping it takes its counts into the whole.
#[derive(Debug)]
pub struct Beat {
    pulse: Arc<Pulse>,
    counts: Arc<Counts>,
    /// Requests until the next one is timed.
    until_timed: u64,
    /// The one that is being timed.
    timed: Option<u16>,
}

impl Beat {
    /// Request `number` has been taken from the ring.
    pub fn begun(&mut self, number: u16) {
        // Nobody else writes it: no locked instruction is needed.
        let begun = self.counts.begun.load(Ordering::Relaxed);
        self.counts.begun.store(begun.wrapping_add(1), Ordering::Release);
        if self.until_timed > 0 {
            self.until_timed -= 1;
        } else if self.timed.is_none() {
            self.timed = Some(number);
            self.counts.timing.store(self.pulse.now(), Ordering::Relaxed);
            self.until_timed = TIMED - 1;
        }
    }

    /// Request `number` has been answered; `ended` is `None` if it was none that is counted by its kind.
    pub fn ended(&mut self, number: u16, ended: Option<Ended>) {
        let completed = self.counts.completed.load(Ordering::Relaxed);
        self.counts.completed.store(completed.wrapping_add(1), Ordering::Release);
        if let Some(ended) = ended {
            self.counts.stats.count(ended);
        }
        if self.timed == Some(number) {
            let began = self.counts.timing.load(Ordering::Relaxed);
            let nanos = self.pulse.now().saturating_sub(began);
            self.pulse.sample(nanos);
            if let Some(ended) = ended {
                self.counts.stats.time(ended.kind, nanos);
            }
            self.untime(number);
        }
    }

    /// Request `number` waits for something that has nothing to do with how busy the host is: it is not timed.
    pub fn untime(&mut self, number: u16) {
        if self.timed == Some(number) {
            self.timed = None;
            self.counts.timing.store(0, Ordering::Relaxed);
        }
    }

    /// The worker has nothing to do. The next request is timed: one in 64 of a guest that asks now and then would be
    /// old news, and a worker that was asleep can spare the time.
    pub fn rest(&mut self) {
        self.until_timed = 0;
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        let mut workers = self.pulse.workers();
        workers.counts.retain(|counts| !Arc::ptr_eq(counts, &self.counts));
        workers.gone.stats.take_over(&self.counts.stats);
        workers.gone.completed.fetch_add(self.counts.completed.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_in_sixty_four_is_timed() {
        let pulse = Arc::new(Pulse::default());
        let mut beat = pulse.beat();
        for number in 0..640_u64 {
            beat.begun(number as u16);
            beat.ended(number as u16, None);
        }
        let reading = pulse.read();
        assert_eq!((reading.samples, reading.completed, reading.in_flight), (10, 640, 0));
        assert!(!reading.latency.is_zero());
        beat.rest();
        beat.begun(1);
        beat.ended(1, None);
        assert_eq!(pulse.read().samples, 11, "a guest that asks now and then is timed each time");
    }

    #[test]
    fn the_mean_follows_the_samples() {
        let pulse = Pulse::default();
        pulse.sample(1_000_000);
        assert_eq!(pulse.read().latency, Duration::from_millis(1));
        (0..100).for_each(|_| pulse.sample(8_000_000));
        let slow = pulse.read().latency;
        assert!((Duration::from_millis(7)..=Duration::from_millis(9)).contains(&slow), "{slow:?}");
        pulse.sample(0);
        assert!(pulse.read().latency < slow);
        (0..10_000).for_each(|_| pulse.sample(u64::MAX));
        (0..10_000).for_each(|_| pulse.sample(1));
        assert!(pulse.read().latency < Duration::from_micros(1));
    }

    /// A host that answers nothing gives no samples either.
    #[test]
    fn a_request_that_does_not_end_is_seen() {
        let pulse = Arc::new(Pulse::default());
        let mut beat = pulse.beat();
        beat.begun(3);
        std::thread::sleep(Duration::from_millis(5));
        let stuck = pulse.read();
        assert!(stuck.latency >= Duration::from_millis(5) && stuck.in_flight == 1, "{stuck:?}");
        beat.untime(3);
        assert_eq!(pulse.read().latency, Duration::ZERO);
        beat.ended(3, None);
        assert_eq!(pulse.read().samples, 0);
    }

    #[test]
    fn what_a_session_answered_stays_counted() {
        let pulse = Arc::new(Pulse::default());
        let (mut first, mut second) = (pulse.beat(), pulse.beat());
        first.begun(0);
        second.begun(0);
        first.ended(0, Some(Ended { kind: Kind::Flush, offset: 0, len: 0, outcome: Outcome::Done }));
        drop(first);
        let reading = pulse.read();
        assert_eq!((reading.completed, reading.in_flight), (1, 1));
        let flushes = pulse.stats().of(Kind::Flush);
        assert_eq!((flushes.done, flushes.buckets.iter().sum()), (1, 1), "the first one was timed");
    }
}
