//! The steps, each a type that owns the one before.
//!
//! ```text
//!   Cut ─▶ Prepared ─▶ Quieted ─▶ Quiesced (in Held) ─▶ Pivoted ─▶ Opened ─▶ SnapshotRecord
//!             ▲  undo     ▲  undo     │ undo
//!             └───────────┴───────────┘
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Context, Error, ErrorKind, Result};
use time::OffsetDateTime;

use crate::{Event, FreezeOwner, FreezePolicy, SnapshotRecord, Step, millis};

use super::freezer::{Freeze, Freezer};
use super::grade::{FreezeOutcome, ThawOutcome};
use super::ports::{ClosedGates, Layers, PivotedLayers, PreparedLayers};
use super::run::{CutPlan, CutPorts, Failure, Run};

/// A cut that is to be made.
pub struct Cut {
    run: Run,
}

impl Cut {
    /// Nothing happens yet.
    pub fn new(plan: CutPlan, ports: CutPorts) -> Self {
        Self { run: Run::new(plan, ports) }
    }

    /// All in one: [`Cut::prepare`] and [`Held::release`].
    pub fn take(self, layers: Box<dyn Layers>) -> Result<SnapshotRecord> {
        self.prepare(layers)?.release()
    }

    /// PREPARE to DRAIN. On success the guest is frozen, as far as the policy asks and the guest can, and its disks are
    /// quiesced: the caller releases or aborts soon, and aborts when its lease ends. On failure all is undone.
    pub fn prepare(mut self, layers: Box<dyn Layers>) -> Result<Held> {
        let run = &mut self.run;
        let agent = agent(run);
        if let Err(unasked) = &agent
            && let Err(error) = run.check(unasked, None, Some(ErrorKind::InvalidInput))
        {
            return Err(self.run.fail(Failure::new(Step::Freeze, error)));
        }
        let start = run.now();
        let layers = match layers.prepare() {
            Ok(layers) => layers,
            Err(error) => return Err(self.run.fail(Failure::new(Step::Prepare, error))),
        };
        run.ended(Step::Prepare, start);
        run.tell();
        let prepared = Prepared { run: self.run, layers };
        let quieted = match agent {
            Ok(freezer) => prepared.freeze(&freezer)?,
            Err(outcome) => Quieted { prepared, freeze: None, outcome },
        };
        Ok(Held { quiesced: Some(quieted.quiesce()?) })
    }
}

/// The way to the agent, or why it is not asked.
fn agent(run: &Run) -> std::result::Result<Arc<Freezer>, FreezeOutcome> {
    match (run.plan.owner, run.plan.policy) {
        (FreezeOwner::External | FreezeOwner::None, _) | (FreezeOwner::Frazil, FreezePolicy::Never) => {
            Err(FreezeOutcome::NotAsked)
        }
        (FreezeOwner::Frazil, FreezePolicy::Require | FreezePolicy::Prefer) => {
            let unknown = || FreezeOutcome::NotFrozen { reason: "no guest agent is configured".to_owned() };
            run.ports.freezer.clone().ok_or_else(unknown)
        }
    }
}

/// The overlays are there, empty, in the manifest; the layers beneath are still active.
struct Prepared {
    run: Run,
    layers: Box<dyn PreparedLayers>,
}

impl Prepared {
    /// Freezes, or goes on without if the policy allows.
    fn freeze(mut self, freezer: &Arc<Freezer>) -> Result<Quieted> {
        let attempt = freezer.freeze(self.run.plan.called());
        for (step, took) in [(Step::PreSync, attempt.pre_sync), (Step::Freeze, attempt.freeze)] {
            if let Some(took) = took {
                self.run.took(step, took);
            }
        }
        self.run.tell();
        let (freeze, outcome, cause) = match attempt.outcome {
            Ok(freeze) => {
                let coverage = freeze.coverage.clone();
                let outcome = FreezeOutcome::Frozen { count: freeze.count, coverage };
                (Some(freeze), outcome, None)
            }
            Err(error) => {
                let reason = error.to_string();
                (None, FreezeOutcome::NotFrozen { reason }, Some(error.kind()))
            }
        };
        let quieted = Quieted { prepared: self, freeze, outcome };
        match quieted.check(cause) {
            Ok(()) => Ok(quieted),
            Err(error) => Err(quieted.undo(Failure::new(Step::Freeze, error)).error),
        }
    }

    fn undo(self, mut failure: Failure) -> Undone {
        if let Err(error) = self.layers.undo() {
            failure.left(format!("its empty overlays stay behind: {error}"));
        }
        let is_whole = failure.is_undone();
        Undone { error: self.run.fail(failure), is_whole }
    }
}

/// What is left of a cut that failed or was aborted.
struct Undone {
    error: Error,
    /// Whether everything is as it was before the cut.
    is_whole: bool,
}

/// The guest's file systems are as quiet as they will get.
struct Quieted {
    prepared: Prepared,
    freeze: Option<Freeze>,
    outcome: FreezeOutcome,
}

impl Quieted {
    fn check(&self, cause: Option<ErrorKind>) -> Result<()> {
        let run = &self.prepared.run;
        run.check(&self.outcome, self.freeze.as_ref().map(|freeze| run.since(freeze.since)), cause)
    }

    /// Closes the gates and waits for what is in flight.
    fn quiesce(mut self) -> Result<Quiesced> {
        let run = &mut self.prepared.run;
        let closed_at = run.now();
        let closed = run.ports.gates.close();
        run.ended(Step::Gate, closed_at);
        let start = run.now();
        let drained = closed.drain(start + run.plan.limits.drain);
        run.ended(Step::Drain, start);
        let quiesced = Quiesced { quieted: self, closed, closed_at };
        match drained {
            Ok(()) => Ok(quiesced),
            Err(error) => Err(quiesced.undo(Failure::new(Step::Drain, error)).error),
        }
    }

    fn undo(self, mut failure: Failure) -> Undone {
        if let Some(Err(error)) = self.freeze.map(Freeze::thaw) {
            failure.left(format!("the guest's thaw is not confirmed, and tried again: {error}"));
        }
        self.prepared.undo(failure)
    }
}

/// No request is in flight and none is taken.
struct Quiesced {
    quieted: Quieted,
    closed: Box<dyn ClosedGates>,
    closed_at: Instant,
}

impl Quiesced {
    /// The last chance to undo, then the cut.
    fn pivot(self) -> Result<Pivoted> {
        if let Err(error) = self.quieted.check(None) {
            return Err(self.undo(Failure::new(Step::Pivot, error)).error);
        }
        let Self { quieted: Quieted { prepared: Prepared { mut run, layers }, freeze, outcome }, .. } = self;
        let start = run.now();
        let layers = layers.pivot();
        run.ended(Step::Pivot, start);
        let (cut_at, time) = (run.now(), run.ports.clock.wall());
        Ok(Pivoted {
            run,
            layers,
            freeze,
            outcome,
            closed: self.closed,
            closed_at: self.closed_at,
            cut_at,
            time,
        })
    }

    fn undo(self, failure: Failure) -> Undone {
        // The guest first: frozen or not, what it waits for are its disks.
        self.closed.open();
        self.quieted.undo(failure)
    }
}

/// A cut that waits for its release, with the guest frozen and the gates closed.
///
/// Dropping it aborts. Both wait for the guest's thaw, up to [`Limits::thaw`](super::Limits::thaw), after the gates are
/// open.
#[must_use = "dropping it aborts the cut"]
pub struct Held {
    /// Taken once, by whichever way it ends.
    quiesced: Option<Quiesced>,
}

impl Held {
    /// The snapshot's name.
    pub fn name(&self) -> &str {
        self.quiesced.as_ref().map_or("", |quiesced| quiesced.quieted.prepared.run.plan.called())
    }

    /// PIVOT to SEAL. Fails only before the pivot, when a required freeze was held for too long; all is undone then.
    /// After it the snapshot stands, whatever happens: a record that is not `sealed` tells why in its reason.
    pub fn release(mut self) -> Result<SnapshotRecord> {
        let over = || Error::new(ErrorKind::NotFound, "this cut is over");
        Ok(self.quiesced.take().ok_or_else(over)?.pivot()?.open().thaw().seal())
    }

    /// Undoes everything; `why` goes into the event. An error says what could not be undone: a thaw, which the collector
    /// goes on trying, or the removal of empty overlays.
    pub fn abort(mut self, why: &str) -> Result<()> {
        self.end(why)
    }

    fn end(&mut self, why: &str) -> Result<()> {
        let Some(quiesced) = self.quiesced.take() else { return Ok(()) };
        let aborted = Error::new(ErrorKind::Busy, format!("aborted: {why}"));
        let Undone { error, is_whole } = quiesced.undo(Failure::new(Step::Pivot, aborted));
        if is_whole { Ok(()) } else { Err(error) }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // What could not be undone was told by event and log.
        let _told = self.end("the one who held it went away");
    }
}

/// The overlays are active: the snapshot stands.
struct Pivoted {
    run: Run,
    layers: Box<dyn PivotedLayers>,
    freeze: Option<Freeze>,
    outcome: FreezeOutcome,
    closed: Box<dyn ClosedGates>,
    closed_at: Instant,
    cut_at: Instant,
    time: OffsetDateTime,
}

impl Pivoted {
    fn open(self) -> Opened {
        let Self { mut run, layers, freeze, outcome, closed, closed_at, cut_at, time } = self;
        let start = run.now();
        let wait = closed.open();
        run.ended(Step::Open, start);
        let shut = run.since(closed_at);
        run.timing.gate_closed = millis(shut);
        run.timing.longest_wait = millis(wait.longest);
        Opened { run, layers, freeze, outcome, cut_at, time, shut }
    }
}

/// Requests flow; the guest's file systems are still frozen.
struct Opened {
    run: Run,
    layers: Box<dyn PivotedLayers>,
    freeze: Option<Freeze>,
    outcome: FreezeOutcome,
    cut_at: Instant,
    time: OffsetDateTime,
    shut: Duration,
}

impl Opened {
    fn thaw(self) -> Thawed {
        let Self { mut run, layers, freeze, outcome, cut_at, time, shut } = self;
        let mut frozen_for = None;
        let thaw = freeze.map(|freeze| {
            let since = freeze.since;
            frozen_for = Some(cut_at.saturating_duration_since(since));
            let start = run.now();
            let thawed = freeze.thaw();
            run.ended(Step::Thaw, start);
            match thawed {
                Ok(count) => {
                    run.timing.frozen = Some(millis(run.since(since)));
                    ThawOutcome::Thawed { count }
                }
                Err(error) => ThawOutcome::Unconfirmed { reason: error.to_string() },
            }
        });
        run.tell();
        if shut > run.plan.limits.slow_gate {
            run.stalled(Step::Gate, shut);
        }
        let (grade, reason) = run.grade(&outcome, thaw.as_ref(), frozen_for);
        let record = SnapshotRecord {
            name: run.plan.called().to_owned(),
            time,
            grade,
            reason,
            frozen_count: match outcome {
                FreezeOutcome::Frozen { count, .. } => Some(count),
                FreezeOutcome::NotAsked | FreezeOutcome::NotFrozen { .. } => None,
            },
            thawed_count: match thaw {
                Some(ThawOutcome::Thawed { count }) => Some(count),
                Some(ThawOutcome::Unconfirmed { .. }) | None => None,
            },
            timing: run.timing,
            sealed: false,
            disks: layers.disks(),
        };
        Thawed { run, layers, record }
    }
}

/// The guest runs. What is left is to make the snapshot durable.
struct Thawed {
    run: Run,
    layers: Box<dyn PivotedLayers>,
    record: SnapshotRecord,
}

impl Thawed {
    fn seal(self) -> SnapshotRecord {
        let Self { mut run, mut layers, mut record } = self;
        // Before the slow sync, so that a daemon that dies in it remembers the grade.
        let recorded = layers.record(&record);
        run.emit(Event::Created { snapshot: Box::new(record.clone()) });
        let start = run.now();
        let sealed = layers.seal().context(|| "sync the layers beneath");
        run.ended(Step::Seal, start);
        run.tell();
        record.timing = run.timing;
        let durable = sealed.and_then(|()| {
            record.sealed = true;
            layers.record(&record).context(|| "record the snapshot")
        });
        match durable {
            Ok(()) => run.emit(Event::Sealed { name: record.name.clone() }),
            Err(error) => {
                tracing::error!(snapshot = record.name, %error, "a snapshot is not on stable storage");
                record.sealed = false;
                record.reason = format!("{}; not sealed at first: {error}", record.reason);
                // So that it can be read later as well; that this may fail too is part of the story told already.
                let _told = layers.record(&record);
            }
        }
        if let Err(error) = recorded {
            tracing::warn!(snapshot = record.name, %error, "a snapshot's first record failed");
        }
        record
    }
}
