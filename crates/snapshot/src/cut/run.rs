//! What goes along through all steps of one cut: the plan, the ports, the measured times.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Error, ErrorKind};

use crate::{Event, FreezeOwner, FreezePolicy, Grade, Step, Timing, millis};

use super::freezer::Freezer;
use super::grade::{FreezeOutcome, Overrun, ThawOutcome, grade};
use super::limits::Limits;
use super::ports::{Clock, Events, Gates};

/// What is to be cut, the request's defaults filled in.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CutPlan {
    /// The snapshot's name; the caller has checked it. None if it makes no snapshot.
    pub name: Option<String>,
    /// What to do about the agent.
    pub policy: FreezePolicy,
    /// Who freezes. Any but [`FreezeOwner::Frazil`] means that the agent is left alone.
    pub owner: FreezeOwner,
    /// The deadlines.
    pub limits: Limits,
}

impl CutPlan {
    /// What the snapshot is called in records and events.
    pub(super) fn called(&self) -> &str {
        self.name.as_deref().unwrap_or("without a name")
    }
}

/// The world of one cut, but for its layers.
pub struct CutPorts {
    /// The gates of the disks to cut.
    pub gates: Box<dyn Gates>,
    /// The way to the agent, if one is configured.
    pub freezer: Option<Arc<Freezer>>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Who listens.
    pub events: Arc<dyn Events>,
}

/// Goes from step to step.
pub(super) struct Run {
    pub(super) plan: CutPlan,
    pub(super) ports: CutPorts,
    pub(super) timing: Timing,
    /// Steps that were measured and not yet told: a listener must not hold up a closed gate.
    untold: Vec<(Step, Duration)>,
}

/// Why a cut is undone.
pub(super) struct Failure {
    step: Step,
    error: Error,
    /// What could not be undone.
    left: Vec<String>,
}

impl Failure {
    pub(super) fn new(step: Step, error: Error) -> Self {
        Self { step, error, left: Vec::new() }
    }

    pub(super) fn left(&mut self, what: String) {
        tracing::error!(what, "a failed cut could not be undone wholly");
        self.left.push(what);
    }

    pub(super) fn is_undone(&self) -> bool {
        self.left.is_empty()
    }
}

impl Run {
    pub(super) fn new(plan: CutPlan, ports: CutPorts) -> Self {
        // Room for all steps, so that telling one inside the gate allocates nothing.
        Self { plan, ports, timing: Timing::default(), untold: Vec::with_capacity(16) }
    }

    pub(super) fn now(&self) -> Instant {
        self.ports.clock.now()
    }

    pub(super) fn since(&self, start: Instant) -> Duration {
        self.now().saturating_duration_since(start)
    }

    /// Notes how long a step took that has just ended.
    pub(super) fn ended(&mut self, step: Step, start: Instant) {
        let took = self.since(start);
        self.took(step, took);
    }

    pub(super) fn took(&mut self, step: Step, took: Duration) {
        let time = millis(took);
        match step {
            Step::Prepare => self.timing.prepare = time,
            Step::PreSync => self.timing.pre_sync = Some(time),
            Step::Freeze => self.timing.freeze = Some(time),
            Step::Gate => self.timing.gate = time,
            Step::Drain => self.timing.drain = time,
            Step::Pivot => self.timing.pivot = time,
            Step::Open => self.timing.open = time,
            Step::Thaw => self.timing.thaw = Some(time),
            Step::Seal => self.timing.seal = time,
        }
        self.untold.push((step, took));
    }

    /// Tells the steps since the last time. Never inside the gate.
    pub(super) fn tell(&mut self) {
        let limits = self.plan.limits;
        for (step, took) in std::mem::take(&mut self.untold) {
            tracing::debug!(snapshot = self.plan.called(), ?step, ?took, "step");
            self.emit(Event::Step { name: self.plan.called().to_owned(), step, milliseconds: millis(took) });
            if limits.slow(step).is_some_and(|slow| took > slow) {
                self.stalled(step, took);
            }
        }
        self.untold.reserve(16);
    }

    pub(super) fn stalled(&self, step: Step, took: Duration) {
        tracing::warn!(snapshot = self.plan.called(), ?step, ?took, "a cut stalls the guest");
        self.emit(Event::Stall { name: self.plan.called().to_owned(), step, milliseconds: millis(took) });
    }

    pub(super) fn emit(&self, event: Event) {
        self.ports.events.emit(event);
    }

    pub(super) fn grade(
        &self,
        freeze: &FreezeOutcome,
        thaw: Option<&ThawOutcome>,
        frozen_for: Option<Duration>,
    ) -> (Grade, String) {
        let limit = self.plan.limits.freeze;
        let overrun = frozen_for.filter(|held| *held > limit).map(|held| Overrun { held, limit });
        grade(self.plan.policy, self.plan.owner, freeze, thaw, overrun)
    }

    /// Under policy `require`, fails if the grade is already known to be another than `filesystem`. `cause` is why there
    /// is no freeze, if there is none.
    pub(super) fn check(
        &self,
        freeze: &FreezeOutcome,
        frozen_for: Option<Duration>,
        cause: Option<ErrorKind>,
    ) -> block::Result<()> {
        if self.plan.policy != FreezePolicy::Require {
            return Ok(());
        }
        match self.grade(freeze, None, frozen_for) {
            (Grade::Filesystem, _) => Ok(()),
            (Grade::Crash, reason) => {
                let story = format!("a freeze is required: {reason}");
                Err(Error::new(cause.unwrap_or(ErrorKind::Busy), story))
            }
        }
    }

    /// The end of a cut that was undone.
    pub(super) fn fail(mut self, failure: Failure) -> Error {
        self.tell();
        let Failure { step, error, left } = failure;
        let story = match &self.plan.name {
            Some(name) => format!("snapshot {name} was not taken"),
            None => "the disks could not be cut".to_owned(),
        };
        let error = if left.is_empty() {
            error.context(story)
        } else {
            error.context(format!("{story} ({})", left.join("; ")))
        };
        self.emit(Event::Failed { name: self.plan.called().to_owned(), step, reason: error.to_string() });
        error
    }
}
