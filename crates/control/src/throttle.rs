//! A bound on how often an event is sent.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The time between two events of one kind, as QEMU has it for the events that it limits.
const INTERVAL: Duration = Duration::from_secs(1);

/// Events that tell of a state that lasts, so that the last one within an interval is the one that matters. Those
/// that tell of a step are few by nature and all sent.
const LIMITED: &[&str] = &["FRAZIL_STALL", "FRAZIL_THAW_OWED"];

/// After the one the other is not true any more.
const ENDS: (&str, &str) = ("FRAZIL_THAW_CONFIRMED", "FRAZIL_THAW_OWED");

/// Holds back events that come too often: all but the last within a second are dropped, and that one is delayed
/// (`docs/interop/qmp-spec.rst`).
#[derive(Debug)]
pub(crate) struct Throttle<T> {
    /// By event name: when the next may be sent, and what waits for that.
    held: BTreeMap<&'static str, (Instant, Option<T>)>,
}

impl<T> Default for Throttle<T> {
    fn default() -> Self {
        Self { held: BTreeMap::new() }
    }
}

impl<T> Throttle<T> {
    /// An event has happened: gives it back if it is to be sent now.
    pub(crate) fn offer(&mut self, name: &'static str, event: T, now: Instant) -> Option<T> {
        if name == ENDS.0
            && let Some((_, waiting)) = self.held.get_mut(ENDS.1)
        {
            *waiting = None;
        }
        if !LIMITED.contains(&name) {
            return Some(event);
        }
        match self.held.get_mut(name) {
            Some((_, waiting)) => {
                *waiting = Some(event);
                None
            }
            None => {
                self.held.insert(name, (now + INTERVAL, None));
                Some(event)
            }
        }
    }

    /// When to ask [`due`](Self::due) again.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.held.values().map(|(due, _)| *due).min()
    }

    /// All that waits.
    pub(crate) fn waiting(&mut self) -> Vec<T> {
        self.held.values_mut().filter_map(|(_, waiting)| waiting.take()).collect()
    }

    /// What has waited long enough.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<T> {
        let mut out = Vec::new();
        self.held.retain(|_, (due, waiting)| {
            if *due > now {
                return true;
            }
            let Some(event) = waiting.take() else { return false };
            out.push(event);
            *due = now + INTERVAL;
            true
        });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_in_a_second_the_first_and_the_last_are_sent() {
        let mut throttle: Throttle<u32> = Throttle::default();
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(throttle.next(), None);
        assert_eq!(throttle.offer("FRAZIL_STALL", 1, at(0)), Some(1));
        assert_eq!(throttle.offer("FRAZIL_STALL", 2, at(1)), None);
        assert_eq!(throttle.offer("FRAZIL_THAW_OWED", 10, at(1)), Some(10));
        assert_eq!(throttle.offer("FRAZIL_STALL", 3, at(2)), None);
        assert_eq!(throttle.next(), Some(at(1000)));
        assert!(throttle.due(at(999)).is_empty());
        assert_eq!(throttle.due(at(1000)), [3]);
        assert_eq!(throttle.offer("FRAZIL_STALL", 4, at(1500)), None);
        assert_eq!(throttle.due(at(2000)), [4]);
        assert!(throttle.due(at(3000)).is_empty());
        assert_eq!(throttle.next(), None, "an idle server must not wake up");
        assert_eq!(throttle.offer("FRAZIL_STALL", 5, at(3001)), Some(5));
    }

    #[test]
    fn what_is_not_true_any_more_is_not_sent() {
        let mut throttle: Throttle<u32> = Throttle::default();
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(throttle.offer("FRAZIL_THAW_OWED", 1, at(0)), Some(1));
        assert_eq!(throttle.offer("FRAZIL_THAW_OWED", 2, at(100)), None);
        assert_eq!(throttle.offer("FRAZIL_STALL", 3, at(100)), Some(3));
        assert_eq!(throttle.offer("FRAZIL_STALL", 4, at(100)), None);
        assert_eq!(throttle.offer("FRAZIL_THAW_CONFIRMED", 5, at(300)), Some(5));
        assert_eq!(throttle.waiting(), [4]);
        assert!(throttle.due(at(2000)).is_empty());
    }

    #[test]
    fn steps_are_all_sent() {
        let mut throttle = Throttle::default();
        let now = Instant::now();
        for i in 0..20 {
            assert_eq!(throttle.offer("FRAZIL_SNAPSHOT_STEP", i, now), Some(i));
        }
    }
}
