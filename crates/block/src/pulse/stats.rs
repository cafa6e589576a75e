//! What a disk has been asked for, by kind.
//!
//! # Invariants
//! - Each worker counts in memory that nobody else writes, with plain stores; whoever asks adds the workers up.
//! - No count ever falls.
//! - Times are of a sample: a timed request stands for all of its kind that ended since the last timed one. So the
//!   buckets hold as many requests as have ended, but for those since the last timed one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of latencies: up to 4 µs, up to 8 µs, and so on; the last one holds all that took longer than 17 s.
pub const LATENCY_BUCKETS: usize = 24;

/// The first bucket ends at two to the power of this many nanoseconds.
const FIRST_BUCKET: u32 = 12;

/// What a request asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// To read.
    Read,
    /// To write.
    Write,
    /// To flush.
    Flush,
    /// To discard.
    Discard,
    /// To write zeroes.
    WriteZeroes,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes];

    /// Its name in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It was carried out.
    Done,
    /// It could not be.
    Failed,
    /// It could not be by anybody: it names what is not there, or asks for what is not offered.
    Invalid,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ended {
    /// What it asked for.
    pub kind: Kind,
    /// The first byte of the disk that it named.
    pub offset: u64,
    /// How many bytes of the disk; none for a flush.
    pub len: u64,
    /// How it ended.
    pub outcome: Outcome,
}

/// What a disk has been asked for since it was opened.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Stats {
    /// By kind, in the order of [`Kind::ALL`].
    kinds: [Tally; Kind::ALL.len()],
    /// One past the last byte of the disk that was written.
    pub highest_written: u64,
}

/// What a disk has been asked for of one kind.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    /// Requests that were carried out.
    pub done: u64,
    /// Bytes of the disk that those named.
    pub bytes: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that made no sense.
    pub invalid: u64,
    /// How long all of them took together, by a sample.
    pub time: Duration,
    /// How many took how long, by a sample: see [`Tally::bound`].
    pub buckets: [u64; LATENCY_BUCKETS],
}

impl Stats {
    /// Of one kind.
    pub fn of(&self, kind: Kind) -> Tally {
        self.kinds[kind as usize]
    }

    pub(super) fn add(&mut self, counts: &Counts) {
        for (tally, counts) in self.kinds.iter_mut().zip(&counts.kinds) {
            tally.done += counts.done.load(Ordering::Relaxed);
            tally.bytes += counts.bytes.load(Ordering::Relaxed);
            tally.failed += counts.failed.load(Ordering::Relaxed);
            tally.invalid += counts.invalid.load(Ordering::Relaxed);
            tally.time += Duration::from_nanos(counts.nanos.load(Ordering::Relaxed));
            for (sum, bucket) in tally.buckets.iter_mut().zip(&counts.buckets) {
                *sum += bucket.load(Ordering::Relaxed);
            }
        }
        self.highest_written = self.highest_written.max(counts.highest_written.load(Ordering::Relaxed));
    }
}

impl Tally {
    /// Where a bucket ends: it holds what took no longer, and longer than the bucket before. `None` for the last one,
    /// which holds all the rest.
    pub fn bound(bucket: usize) -> Option<Duration> {
        (bucket + 1 < LATENCY_BUCKETS).then(|| Duration::from_nanos(1 << (FIRST_BUCKET as usize + bucket)))
    }
}

/// One worker's counts. Only that worker writes them.
#[derive(Debug, Default)]
pub(super) struct Counts {
    kinds: [OfKind; Kind::ALL.len()],
    highest_written: AtomicU64,
}

#[derive(Debug, Default)]
struct OfKind {
    done: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    nanos: AtomicU64,
    /// Of those that have ended, how many the timed ones stand for.
    timed: AtomicU64,
    buckets: [AtomicU64; LATENCY_BUCKETS],
}

impl Counts {
    /// A request has ended.
    pub(super) fn count(&self, ended: Ended) {
        let counts = &self.kinds[ended.kind as usize];
        match ended.outcome {
            Outcome::Done => {
                add(&counts.done, 1);
                add(&counts.bytes, ended.len);
                let end = ended.offset.saturating_add(ended.len);
                if matches!(ended.kind, Kind::Write | Kind::WriteZeroes)
                    && end > self.highest_written.load(Ordering::Relaxed)
                {
                    self.highest_written.store(end, Ordering::Relaxed);
                }
            }
            Outcome::Failed => add(&counts.failed, 1),
            Outcome::Invalid => add(&counts.invalid, 1),
        }
    }

    /// The request that was counted last was timed, and took so long.
    pub(super) fn time(&self, kind: Kind, nanos: u64) {
        let counts = &self.kinds[kind as usize];
        let ended =
            [&counts.done, &counts.failed, &counts.invalid].map(|count| count.load(Ordering::Relaxed));
        let ended: u64 = ended.iter().sum();
        let stands_for = ended - counts.timed.load(Ordering::Relaxed);
        counts.timed.store(ended, Ordering::Relaxed);
        add(&counts.nanos, nanos.saturating_mul(stands_for));
        if let Some(bucket) = counts.buckets.get(bucket_of(nanos)) {
            add(bucket, stands_for);
        }
    }

    /// Takes over the counts of a worker that is gone.
    pub(super) fn take_over(&self, gone: &Self) {
        for (to, from) in self.kinds.iter().zip(&gone.kinds) {
            let pairs = [
                (&to.done, &from.done),
                (&to.bytes, &from.bytes),
                (&to.failed, &from.failed),
                (&to.invalid, &from.invalid),
                (&to.nanos, &from.nanos),
            ];
            for (to, from) in pairs.into_iter().chain(to.buckets.iter().zip(&from.buckets)) {
                add(to, from.load(Ordering::Relaxed));
            }
        }
        self.highest_written.fetch_max(gone.highest_written.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// The bucket of what took so long.
fn bucket_of(nanos: u64) -> usize {
    let powers = u64::BITS - nanos.saturating_sub(1).leading_zeros();
    (powers.saturating_sub(FIRST_BUCKET) as usize).min(LATENCY_BUCKETS - 1)
}

/// Nobody else writes it: no locked instruction is needed.
fn add(count: &AtomicU64, by: u64) {
    count.store(count.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_answered_is_counted_by_kind_and_outcome() {
        let counts = Counts::default();
        let ended = |kind, offset, outcome| Ended { kind, offset, len: 4096, outcome };
        counts.count(ended(Kind::Write, 8192, Outcome::Done));
        counts.count(ended(Kind::Write, 0, Outcome::Done));
        counts.count(ended(Kind::Write, 1 << 30, Outcome::Failed));
        counts.count(ended(Kind::Read, 1 << 40, Outcome::Invalid));
        let mut stats = Stats::default();
        stats.add(&counts);
        let (read, write) = (stats.of(Kind::Read), stats.of(Kind::Write));
        assert_eq!((write.done, write.bytes, write.failed, write.invalid), (2, 8192, 1, 0));
        assert_eq!((read.done, read.bytes, read.failed, read.invalid), (0, 0, 0, 1));
        assert_eq!(stats.highest_written, 12288, "what failed was not written");
    }

    #[test]
    fn a_timed_request_stands_for_those_before_it() {
        let counts = Counts::default();
        let ended = Ended { kind: Kind::Read, offset: 0, len: 512, outcome: Outcome::Done };
        (0..64).for_each(|_| counts.count(ended));
        counts.time(Kind::Read, 5000);
        (0..10).for_each(|_| counts.count(ended));
        counts.time(Kind::Read, 100);
        let mut stats = Stats::default();
        stats.add(&counts);
        let read = stats.of(Kind::Read);
        assert_eq!(read.time, Duration::from_nanos(64 * 5000 + 10 * 100));
        assert_eq!(read.buckets[..3], [10, 64, 0]);
        assert_eq!(read.buckets.iter().sum::<u64>(), read.done);
    }

    #[test]
    fn a_bucket_ends_where_it_says() {
        for bucket in 0..LATENCY_BUCKETS {
            match Tally::bound(bucket).map(|bound| bound.as_nanos() as u64) {
                Some(bound) => {
                    assert_eq!((bucket_of(bound), bucket_of(bound + 1)), (bucket, bucket + 1));
                }
                None => assert_eq!(bucket_of(u64::MAX), bucket),
            }
        }
        assert_eq!(bucket_of(0), 0);
    }
}
