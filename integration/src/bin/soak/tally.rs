//! What happened in all rounds, as it is told at the end.

use std::fmt;
use std::time::Duration;

use crate::health::Health;

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) time: Duration,
    pub(crate) rounds: u64,
    pub(crate) snapshots: u64,
    /// Snapshots that were refused, for the guest's agent took too long.
    pub(crate) refused: u64,
    /// Snapshots that a kill kept from being taken.
    pub(crate) unfinished: u64,
    pub(crate) deletes: u64,
    pub(crate) increments: u64,
    pub(crate) pulled: u64,
    pub(crate) proofs: u64,
    /// From a kill to the control socket's first answer.
    pub(crate) restarts: Vec<Duration>,
    /// From the start after a kill until each writer in the guest had synced anew.
    pub(crate) back: Vec<Duration>,
    /// Milliseconds.
    pub(crate) frozen: Vec<f64>,
    seen: Option<(Health, Health)>,
}

impl Tally {
    /// Remembers the least and the most that the daemon took.
    pub(crate) fn saw(&mut self, now: &Health) {
        let (least, most) = self.seen.get_or_insert((*now, *now));
        for (fold, into) in [(u64::min as fn(u64, u64) -> u64, least), (u64::max, most)] {
            into.memory_kib = fold(into.memory_kib, now.memory_kib);
            into.descriptors = fold(into.descriptors, now.descriptors);
            into.threads = fold(into.threads, now.threads);
            into.layers = fold(into.layers, now.layers);
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let minutes = self.time.as_secs_f64() / 60.0;
        writeln!(f, "nothing lost in {minutes:.0} minutes, {} rounds", self.rounds)?;
        writeln!(
            f,
            "snapshots      {} ({} more not taken for a kill, {} for an agent that was late), deleted {}",
            self.snapshots, self.unfinished, self.refused, self.deletes
        )?;
        writeln!(f, "frozen, ms     {}", spread(self.frozen.clone()))?;
        writeln!(f, "increments     {}, {} MiB over NBD", self.increments, self.pulled >> 20)?;
        writeln!(f, "kills          {}", self.restarts.len())?;
        let millis = |times: &[Duration]| spread(times.iter().map(|time| time.as_secs_f64() * 1e3).collect());
        writeln!(f, "to serving, ms {}", millis(&self.restarts))?;
        writeln!(f, "guest back, ms {}", millis(&self.back))?;
        writeln!(f, "proofs         {} with a second guest", self.proofs)?;
        if let Some((least, most)) = &self.seen {
            writeln!(f, "the daemon     from {least}")?;
            write!(f, "               to   {most}")?;
        }
        Ok(())
    }
}

fn spread(mut figures: Vec<f64>) -> String {
    figures.sort_by(f64::total_cmp);
    match (figures.get(figures.len() / 2), figures.last()) {
        (Some(median), Some(most)) => format!("median {median:.0}, most {most:.0}"),
        _ => "-".to_owned(),
    }
}
