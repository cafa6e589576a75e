//! How long each step may take, and what is told when it takes long.

use std::time::Duration;

use crate::Step;

/// The deadlines of a cut. Each wait has one; none is endless.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// To connect to the agent and get into step with it, and for its quick answers (file systems, status). An idle
    /// agent takes about 0.1 s; one that takes 20 times as long is not there.
    pub connect: Duration,
    /// For writing out the guest's dirty memory ahead of the freeze. The guest runs, so only the caller's patience
    /// bounds it; what is left over is written inside the freeze.
    pub pre_sync: Duration,
    /// From the freeze command to the pivot. Windows (VSS) thaws itself after 10 s, so what is cut later may not be
    /// frozen any more; it is counted from the command and not from the reply, as only the guest knows when its own
    /// clock started. It is also the freeze's deadline: a later reply is worth nothing.
    pub freeze: Duration,
    /// For the requests in flight when the gate closes. A host disk that holds a request longer is in trouble, and
    /// the guest's own timers (30 s in Linux) must not run out before its closed gate.
    pub drain: Duration,
    /// For one try to thaw.
    pub thaw: Duration,
    /// The pause after the first failed try to thaw; it doubles with each.
    pub first_pause: Duration,
    /// The longest pause between tries: a guest whose agent comes back is not to wait longer for its thaw.
    pub longest_pause: Duration,
    /// A freeze or thaw that takes longer raises a stall event: applications in the guest feel it.
    pub slow_guest: Duration,
    /// A drain that takes longer raises a stall event: an idle disk needs microseconds, a loaded one milliseconds.
    pub slow_drain: Duration,
    /// A gate that was closed for longer raises a stall event.
    pub slow_gate: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(2),
            pre_sync: Duration::from_secs(10),
            freeze: Duration::from_secs(10),
            drain: Duration::from_secs(5),
            thaw: Duration::from_secs(5),
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(5),
            slow_guest: Duration::from_secs(2),
            slow_drain: Duration::from_millis(100),
            slow_gate: Duration::from_millis(50),
        }
    }
}

impl Limits {
    /// The pause after `tries` failed tries to thaw: 0.1, 0.2, 0.4 … 5 s by default.
    pub(super) fn pause(&self, tries: u64) -> Duration {
        let doublings = u32::try_from(tries.saturating_sub(1)).unwrap_or(u32::MAX);
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        self.first_pause.saturating_mul(factor).min(self.longest_pause)
    }

    /// From when on `step` counts as a stall. What runs beside the guest never does, and closing, pivot and opening
    /// are parts of the time that the gate is closed, which is watched as a whole.
    pub(super) fn slow(&self, step: Step) -> Option<Duration> {
        match step {
            Step::Freeze | Step::Thaw => Some(self.slow_guest),
            Step::Drain => Some(self.slow_drain),
            Step::Prepare | Step::PreSync | Step::Gate | Step::Pivot | Step::Open | Step::Seal => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let limits = Limits::default();
        let pauses: Vec<_> = (1..=8).map(|tries| limits.pause(tries).as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(limits.pause(0), limits.first_pause);
        assert_eq!(limits.pause(u64::MAX), limits.longest_pause);
    }
}
