//! The gate: whether a disk's workers may take requests from their rings.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::{Error, ErrorKind, Result};

/// Stands between a disk's virtqueues and their workers.
///
/// Open, it costs a worker one uncontended atomic exchange a request. Closed, requests stay in the guest's own rings;
/// nothing is queued here. A worker enters the gate through its own [`Lane`].
///
/// ```text
///   open ──close()──▶ closed ──drain()──▶ quiesced ──open(), drop──▶ open
/// ```
#[derive(Debug, Default)]
pub struct Gate {
    /// How many [`Closed`] there are. Zero is open. Changed with `lanes` locked, together with their marks.
    closers: AtomicUsize,
    lanes: Mutex<Vec<Arc<LaneState>>>,
    drained: Condvar,
}

#[derive(Debug)]
struct LaneState {
    /// Requests accepted whose used ring entry is not yet written, and [`CLOSED`]: in one word, so that a request is
    /// either counted or refused, and never for a moment both.
    word: AtomicU64,
    /// When the first request was refused since the gate closed.
    refused: Mutex<Option<Instant>>,
    waker: Waker,
}

/// The mark of a closed gate in a lane's word.
const CLOSED: u64 = 1 << 63;

/// What the guest felt of a closed gate.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Wait {
    /// How long the longest waiting request stood before the gate, from its refusal to the opening, as far as this hold
    /// made it wait.
    pub longest: Duration,
    /// How many lanes had requests waiting.
    pub lanes: usize,
}

impl Gate {
    /// A lane for one worker. `waker` is called when the gate opens, and the worker then looks at its ring again.
    pub fn lane(self: &Arc<Self>, waker: Waker) -> Lane {
        let mut lanes = self.lock();
        let word = AtomicU64::new(if self.is_closed() { CLOSED } else { 0 });
        let state = Arc::new(LaneState { word, refused: Mutex::new(None), waker });
        lanes.push(Arc::clone(&state));
        Lane { gate: Arc::clone(self), state }
    }

    /// Stops the taking of requests on every lane, at once. Those in flight go on.
    pub fn close(self: &Arc<Self>) -> Closed {
        let lanes = self.lock();
        if self.closers.fetch_add(1, Ordering::SeqCst) == 0 {
            for lane in lanes.iter() {
                lane.word.fetch_or(CLOSED, Ordering::SeqCst);
            }
        }
        Closed { gate: Arc::clone(self), since: Instant::now() }
    }

    /// Whether anybody holds it closed.
    pub fn is_closed(&self) -> bool {
        self.closers.load(Ordering::SeqCst) != 0
    }

    /// Requests in flight on all lanes.
    pub fn in_flight(&self) -> u64 {
        in_flight(&self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<LaneState>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_flight(lanes: &[Arc<LaneState>]) -> u64 {
    lanes.iter().map(|lane| lane.in_flight()).sum()
}

/// A worker's way through the gate. Dropping it takes the lane away; its requests must have left.
#[derive(Debug)]
pub struct Lane {
    gate: Arc<Gate>,
    state: Arc<LaneState>,
}

impl Lane {
    /// Asks to take one request that is known to wait in the ring. `false` if the gate is closed: leave it there.
    #[must_use = "a request that was refused must stay in the ring"]
    pub fn enter(&self) -> bool {
        let one_more = |word: u64| (word & CLOSED == 0).then_some(word + 1);
        let entered = self.state.word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).is_ok();
        if !entered {
            self.refuse();
        }
        entered
    }

    /// Notes since when a request waits. The gate may have opened since the look at it; who opens it takes the notes
    /// away after it has opened, under their lock. So either this note is taken away, or none is made: one that
    /// stayed would be counted at the next opening, as a wait from now until then.
    fn refuse(&self) {
        let mut refused = self.state.refused();
        if self.state.word.load(Ordering::SeqCst) & CLOSED != 0 {
            refused.get_or_insert_with(Instant::now);
        } else {
            // The opening's waker may have come before the refusal.
            self.state.waker.wake_by_ref();
        }
    }

    /// Reports `count` requests whose used ring entries have been written.
    pub fn leave(&self, count: u64) {
        let before = self.state.word.fetch_sub(count, Ordering::SeqCst);
        debug_assert!(before & !CLOSED >= count, "more requests left the gate than had entered");
        if before == CLOSED | count {
            // Taking the lock orders this with a drain that has looked but not yet slept.
            drop(self.gate.lock());
            self.gate.drained.notify_all();
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.gate.lock().retain(|state| !Arc::ptr_eq(state, &self.state));
        self.gate.drained.notify_all();
    }
}

impl LaneState {
    fn in_flight(&self) -> u64 {
        self.word.load(Ordering::SeqCst) & !CLOSED
    }

    fn refused(&self) -> MutexGuard<'_, Option<Instant>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A hold on a closed gate; it opens when the last hold is let go.
#[derive(Debug)]
#[must_use = "dropping it opens the gate"]
pub struct Closed {
    gate: Arc<Gate>,
    since: Instant,
}

impl Closed {
    /// Waits until no request is in flight: from then on the disk is quiesced. Fails at the deadline, with the gate
    /// still closed.
    pub fn drain(&self, deadline: Instant) -> Result<()> {
        let mut lanes = self.gate.lock();
        loop {
            let left = in_flight(&lanes);
            if left == 0 {
                return Ok(());
            }
            let now = Instant::now();
            if now >= deadline {
                let story = format!("{left} requests were still in flight at the drain's deadline");
                return Err(Error::new(ErrorKind::TimedOut, story));
            }
            lanes = match self.gate.drained.wait_timeout(lanes, deadline - now) {
                Ok((lanes, _)) => lanes,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Lets go, and tells how long requests waited for this hold: those of a disk that was stopped before had nothing to wait
    /// for.
    pub fn open(self) -> Wait {
        let gate = Arc::clone(&self.gate);
        // Read before the gate opens: afterwards the refusals could be another closing's.
        let wait = gate.wait(self.since, Instant::now());
        drop(self);
        wait
    }
}

impl Gate {
    fn wait(&self, since: Instant, now: Instant) -> Wait {
        let mut wait = Wait::default();
        for refused in self.lock().iter().filter_map(|lane| *lane.refused()) {
            wait.longest = wait.longest.max(now.saturating_duration_since(refused.max(since)));
            wait.lanes += 1;
        }
        wait
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        let lanes = self.gate.lock();
        if self.gate.closers.fetch_sub(1, Ordering::SeqCst) == 1 {
            for lane in lanes.iter() {
                lane.word.fetch_and(!CLOSED, Ordering::SeqCst);
                *lane.refused() = None;
                lane.waker.wake_by_ref();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[test]
    fn closed_refuses_and_opens_again() {
        let gate = Arc::new(Gate::default());
        let lane = gate.lane(Waker::noop().clone());
        assert!(lane.enter());
        let closed = gate.close();
        assert!(!lane.enter());
        assert_eq!(closed.drain(soon()).unwrap_err().kind(), ErrorKind::TimedOut);
        lane.leave(1);
        closed.drain(soon()).unwrap();
        thread::sleep(Duration::from_millis(2));
        let wait = closed.open();
        assert!(wait.longest >= Duration::from_millis(2), "{wait:?}");
        assert_eq!(wait.lanes, 1);
        assert!(lane.enter());
        lane.leave(1);
    }

    #[test]
    fn two_holds_keep_it_closed_until_the_last() {
        let gate = Arc::new(Gate::default());
        let lane = gate.lane(Waker::noop().clone());
        let (first, second) = (gate.close(), gate.close());
        drop(first);
        assert!(!lane.enter());
        drop(second);
        assert!(lane.enter());
        lane.leave(1);
    }

    #[test]
    fn a_hold_within_another_tells_its_own_time() {
        let gate = Arc::new(Gate::default());
        let lane = gate.lane(Waker::noop().clone());
        let outer = gate.close();
        assert!(!lane.enter());
        thread::sleep(Duration::from_millis(50));
        let inner = gate.close();
        assert!(inner.open().longest < Duration::from_millis(50));
        assert!(outer.open().longest >= Duration::from_millis(50));
    }

    #[test]
    fn a_lane_that_goes_away_does_not_hold_up_a_drain() {
        let gate = Arc::new(Gate::default());
        let lane = gate.lane(Waker::noop().clone());
        let closed = gate.close();
        drop(lane);
        closed.drain(soon()).unwrap();
        assert_eq!(closed.open(), Wait::default());
    }

    /// The gate opens between a worker's look at it and the refusal; hours later there is another cut.
    #[test]
    fn a_refusal_that_comes_after_the_opening_is_no_wait_of_the_next_closing() {
        let (gate, woken) = (Arc::new(Gate::default()), Arc::new(Woken::default()));
        let lane = gate.lane(Waker::from(Arc::clone(&woken)));
        lane.refuse();
        assert!(woken.0.load(Ordering::SeqCst), "nobody would look at the request again");
        assert_eq!(gate.close().open(), Wait::default());
    }

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    /// Workers enter and leave as fast as they can; whoever is quiesced must never see one inside.
    #[test]
    fn nobody_is_inside_while_quiesced() {
        let gate = Arc::new(Gate::default());
        let (stop, inside) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let (lane, stop) = (gate.lane(Waker::noop().clone()), Arc::clone(&stop));
                let inside = Arc::clone(&inside);
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        if lane.enter() {
                            inside.fetch_add(1, Ordering::Relaxed);
                            inside.fetch_sub(1, Ordering::Relaxed);
                            lane.leave(1);
                        }
                    }
                })
            })
            .collect();
        for _ in 0..500 {
            let closed = gate.close();
            closed.drain(Instant::now() + Duration::from_secs(10)).unwrap();
            assert_eq!(inside.load(Ordering::Relaxed), 0);
            for _ in 0..100 {
                assert_eq!(gate.in_flight(), 0, "a refusal was counted");
            }
            drop(closed);
        }
        stop.store(true, Ordering::Relaxed);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    }
}
