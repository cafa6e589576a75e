//! What cuts did since the daemon began, from its events.

use std::time::Duration;

use block::{LATENCY_BUCKETS, Tally};
use snapshot::{Event, Grade};

/// Times of something, in the buckets of [`Tally`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times {
    pub(super) count: u64,
    pub(super) seconds: f64,
    pub(super) buckets: [u64; LATENCY_BUCKETS],
}

impl Times {
    fn add(&mut self, milliseconds: f64) {
        let seconds = milliseconds / 1000.0;
        self.count += 1;
        self.seconds += seconds;
        let fits = |bucket: &usize| Tally::bound(*bucket).is_none_or(|bound| seconds <= bound.as_secs_f64());
        if let Some(bucket) = (0..LATENCY_BUCKETS).find(fits).and_then(|at| self.buckets.get_mut(at)) {
            *bucket += 1;
        }
    }

    /// The same of requests.
    pub(super) fn of(tally: &Tally) -> Self {
        let Tally { time, buckets, .. } = *tally;
        Self { count: buckets.iter().sum(), seconds: Duration::as_secs_f64(&time), buckets }
    }
}

/// Counts of cuts.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    /// Snapshots taken of grade `filesystem`.
    pub(super) frozen: u64,
    /// Of grade `crash`.
    pub(super) crash: u64,
    pub(super) failed: u64,
    pub(super) gate: Times,
    pub(super) freeze: Times,
    pub(super) wait: Times,
    pub(super) thaws_owed: u64,
    pub(super) io_errors: u64,
}

impl Cuts {
    pub(super) fn count(&mut self, event: &Event) {
        match event {
            Event::Created { snapshot } => {
                match snapshot.grade {
                    Grade::Filesystem => self.frozen += 1,
                    Grade::Crash => self.crash += 1,
                }
                self.gate.add(snapshot.timing.gate_closed);
                self.wait.add(snapshot.timing.longest_wait);
                if let Some(frozen) = snapshot.timing.frozen {
                    self.freeze.add(frozen);
                }
            }
            Event::Failed { .. } => self.failed += 1,
            Event::ThawOwed { .. } => self.thaws_owed += 1,
            Event::IoError { .. } => self.io_errors += 1,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_in_the_bucket_that_holds_them() {
        let mut times = Times::default();
        [0.0, 0.004, 0.0042, 1e9].into_iter().for_each(|milliseconds| times.add(milliseconds));
        assert_eq!((times.buckets[0], times.buckets[1], times.buckets[LATENCY_BUCKETS - 1]), (2, 1, 1));
        assert_eq!(times.count, 4);
    }
}
