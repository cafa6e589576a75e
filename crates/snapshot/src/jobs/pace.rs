//! How fast a job may copy: as fast as it was told, and no faster than the guest does not notice.

use std::time::{Duration, Instant};

use block::Reading;

/// A limit is kept in slices of so long, as QEMU's is.
const SLICE: Duration = Duration::from_millis(100);

/// A limit in bytes a second, 0 for none. What was copied is owed, and paid off by time.
#[derive(Clone, Debug)]
pub(crate) struct Limit {
    speed: u64,
    /// Bytes copied ahead of the limit, as of `at`.
    owed: f64,
    at: Instant,
}

impl Limit {
    pub(crate) fn new(speed: u64, now: Instant) -> Self {
        Self { speed, owed: 0.0, at: now }
    }

    pub(crate) fn speed(&self) -> u64 {
        self.speed
    }

    /// Another limit from now on; what was copied under the old one is paid off at the new one.
    pub(crate) fn set(&mut self, speed: u64, now: Instant) {
        self.settle(now);
        self.speed = speed;
        if speed == 0 {
            self.owed = 0.0;
        }
    }

    /// So many bytes are being copied.
    pub(crate) fn take(&mut self, bytes: u64, now: Instant) {
        self.settle(now);
        if self.speed > 0 {
            self.owed += bytes as f64;
        }
    }

    /// How many bytes to copy before it is asked again how long to wait: what may be copied in [`SLICE`].
    pub(crate) fn slice(&self) -> u64 {
        match self.speed {
            0 => u64::MAX,
            speed => (speed as f64 * SLICE.as_secs_f64()) as u64,
        }
    }

    /// How long to wait before the next bytes.
    pub(crate) fn wait(&mut self, now: Instant) -> Duration {
        self.settle(now);
        match self.speed {
            0 => Duration::ZERO,
            // An hour is as good as for ever: whoever waits looks again.
            speed => Duration::from_secs_f64((self.owed / speed as f64).clamp(0.0, 3600.0)),
        }
    }

    fn settle(&mut self, now: Instant) {
        let paid = now.saturating_duration_since(self.at).as_secs_f64() * self.speed as f64;
        self.owed = (self.owed - paid).max(0.0);
        self.at = now;
    }
}

/// A latency so much above that without the job is the job's doing.
const NOTICEABLE: f64 = 1.5;
/// The rest after a piece, at least, once the guest has noticed; and at most.
const SHORTEST_REST: Duration = Duration::from_millis(1);
const LONGEST_REST: Duration = Duration::from_millis(250);
/// A rest so long tells what the latency is without the job.
const TELLING_REST: Duration = Duration::from_millis(50);
/// How often such a rest is taken while the guest is busy.
const LISTEN_EVERY: Duration = Duration::from_secs(2);

/// Backs off while the guest's latency is raised by the copying, and uses its idle time fully.
///
/// What the latency would be without the job can only be learned by not copying: so now and then, and at the beginning,
/// there is a rest long enough to tell.
#[derive(Debug)]
pub(crate) struct Courtesy {
    /// The latency without the job.
    alone: Option<Duration>,
    rest: Duration,
    /// What was read after the last piece.
    last: Reading,
    /// When the last rest that tells ended.
    listened: Option<Instant>,
    /// All the rests so far.
    total: Duration,
}

impl Courtesy {
    /// Before the first piece: a guest that asks for nothing from then on is not waited for, whatever it did before.
    pub(crate) fn new(last: Reading) -> Self {
        Self { alone: None, rest: Duration::ZERO, last, listened: None, total: Duration::ZERO }
    }

    /// A piece was copied: how long to rest.
    pub(crate) fn rest(&mut self, reading: Reading, now: Instant) -> Duration {
        let rest = self.next(reading, now);
        self.total += rest;
        rest
    }

    /// How long it has rested in all.
    pub(crate) fn total(&self) -> Duration {
        self.total
    }

    fn next(&mut self, reading: Reading, now: Instant) -> Duration {
        let is_idle = reading.completed == self.last.completed && reading.in_flight == 0;
        self.last = reading;
        if is_idle {
            self.rest = Duration::ZERO;
            return Duration::ZERO;
        }
        let due = self.listened.is_none_or(|at| now.saturating_duration_since(at) >= LISTEN_EVERY);
        let Some(alone) = self.alone else { return TELLING_REST };
        if reading.latency.as_secs_f64() > alone.as_secs_f64() * NOTICEABLE {
            self.rest = (self.rest * 2).clamp(SHORTEST_REST, LONGEST_REST);
        } else if self.rest <= SHORTEST_REST {
            self.rest = Duration::ZERO;
        } else {
            self.rest /= 2;
        }
        if due { self.rest.max(TELLING_REST) } else { self.rest }
    }

    /// The rest is over, and was `took` long.
    pub(crate) fn rested(&mut self, reading: Reading, took: Duration, now: Instant) {
        if took < TELLING_REST {
            return;
        }
        self.listened = Some(now);
        if reading.samples != self.last.samples {
            self.alone = Some(reading.latency);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_limit_is_kept_over_time_and_a_new_one_at_once() {
        let start = Instant::now();
        let mut limit = Limit::new(MIB, start);
        assert_eq!(limit.wait(start), Duration::ZERO);
        limit.take(2 * MIB, start);
        assert_eq!(limit.wait(start), Duration::from_secs(2));
        let later = start + Duration::from_millis(500);
        assert_eq!(limit.wait(later), Duration::from_millis(1500));
        limit.set(3 * MIB, later);
        assert_eq!(limit.wait(later), Duration::from_millis(500));
        limit.set(0, later);
        assert_eq!(limit.wait(later), Duration::ZERO);
        limit.take(1 << 40, later);
        assert_eq!(limit.wait(later), Duration::ZERO);
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let start = Instant::now();
        let mut limit = Limit::new(MIB, start);
        let later = start + Duration::from_secs(100);
        limit.take(MIB, later);
        assert_eq!(limit.wait(later), Duration::from_secs(1));
    }

    /// A guest whose latency is `alone` seconds, and grows by `harm` of that while something is copied.
    struct Guest {
        alone: f64,
        latency: f64,
        completed: u64,
        now: Instant,
    }

    impl Guest {
        fn pass(&mut self, time: Duration, towards: f64) -> Reading {
            self.now += time;
            self.completed += 1;
            // An average that follows within some 10 ms.
            let weight = (time.as_secs_f64() / 0.01).min(1.0);
            self.latency += (towards - self.latency) * weight;
            let latency = Duration::from_secs_f64(self.latency);
            Reading { latency, samples: self.completed, completed: self.completed, in_flight: 0 }
        }
    }

    fn share_of_copying(alone: f64, harm: f64) -> f64 {
        let (piece, mut courtesy) = (Duration::from_millis(2), Courtesy::new(Reading::default()));
        let mut guest = Guest { alone, latency: alone, completed: 0, now: Instant::now() };
        let (mut copied, mut rested) = (0.0, 0.0);
        for round in 0..20_000 {
            let reading = guest.pass(piece, guest.alone * (1.0 + harm));
            let rest = courtesy.rest(reading, guest.now);
            let reading = guest.pass(rest, guest.alone);
            courtesy.rested(reading, rest, guest.now);
            if round > 1000 {
                copied += piece.as_secs_f64();
                rested += rest.as_secs_f64();
            }
        }
        copied / (copied + rested)
    }

    #[test]
    fn a_guest_that_notices_is_left_alone_most_of_the_time_and_one_that_does_not_hardly_ever() {
        assert!(share_of_copying(100e-6, 0.1) > 0.9);
        let harmful = share_of_copying(100e-6, 5.0);
        assert!(harmful < 0.5, "{harmful}");
        assert!(harmful > 0.001, "a job must come to an end: {harmful}");
    }

    #[test]
    fn idle_time_is_used_fully() {
        let mut courtesy = Courtesy::new(Reading::default());
        let mut now = Instant::now();
        let busy = Reading { latency: Duration::from_millis(1), samples: 5, completed: 5, in_flight: 0 };
        assert!(courtesy.rest(busy, now) >= TELLING_REST);
        for _ in 0..100 {
            now += Duration::from_millis(1);
            assert_eq!(courtesy.rest(busy, now), Duration::ZERO);
        }
    }
}
