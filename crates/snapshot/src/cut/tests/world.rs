//! A world in memory: a guest, its disks, the state directory, time. It checks at each call that the cut keeps its
//! invariants, and breaks at the calls that a test names.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::{Error, ErrorKind, Result, Wait};
use time::OffsetDateTime;

use super::super::ports::*;
use super::super::{CutPlan, CutPorts, Freezer, Limits};
use super::faults::{Call, Fault};
use crate::{Event, FreezeOwner, FreezePolicy, SnapshotDisk, SnapshotRecord};

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// Freezes both of its file systems.
    Linux,
    /// Freezes three of its four file systems.
    LinuxWithVfat,
    /// Thaws itself after 10 s, and refuses to thaw when it is not frozen.
    Windows,
}

impl Kind {
    fn mounts(self) -> &'static [&'static str] {
        match self {
            Self::Linux => &["/", "/srv"],
            Self::LinuxWithVfat => &["/", "/srv", "/boot", "/boot/efi"],
            Self::Windows => &["C:\\"],
        }
    }

    fn freezes(self) -> u64 {
        match self {
            Self::Linux => 2,
            Self::LinuxWithVfat => 3,
            Self::Windows => 1,
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Overlay {
    None,
    Prepared,
    Active,
}

#[derive(Debug)]
pub(super) struct State {
    /// For messages: which run of the test this is.
    pub(super) story: String,
    pub(super) kind: Kind,
    pub(super) trace: Vec<Call>,
    pub(super) faults: Vec<(usize, Fault)>,
    pub(super) events: Vec<Event>,
    pub(super) dead: Cell<bool>,
    pub(super) start: Instant,
    now: Instant,
    // The guest.
    pub(super) frozen: Option<Instant>,
    /// Commands in the channel that the agent has not read yet.
    pub(super) unread: VecDeque<Call>,
    /// So many connections fail before the agent reads again.
    pub(super) stuck: u32,
    in_step: bool,
    // The state directory.
    pub(super) debt: bool,
    pub(super) overlay: Overlay,
    pub(super) records: Vec<SnapshotRecord>,
    // The disks.
    pub(super) closed: bool,
    drained: bool,
    /// Whether all was frozen when the cut was made.
    pub(super) clean_at_pivot: Option<bool>,
}

/// Cloned freely; all clones are the same world.
#[derive(Clone)]
pub(super) struct World(Arc<Mutex<State>>);

impl World {
    pub(super) fn new(kind: Kind, faults: &[(usize, Fault)], story: impl fmt::Display) -> Self {
        let start = Instant::now();
        Self(Arc::new(Mutex::new(State {
            story: story.to_string(),
            kind,
            trace: Vec::new(),
            faults: faults.to_vec(),
            events: Vec::new(),
            dead: Cell::new(false),
            start,
            now: start,
            frozen: None,
            unread: VecDeque::new(),
            stuck: 0,
            in_step: false,
            debt: false,
            overlay: Overlay::None,
            records: Vec::new(),
            closed: false,
            drained: false,
            clean_at_pivot: None,
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pass(&self, time: Duration) {
        self.state().pass(time);
    }

    /// A new run of the daemon, which finds what the last one left.
    pub(super) fn restart(&self) {
        let mut state = self.state();
        state.dead.set(false);
        state.closed = false;
        state.in_step = false;
        state.faults.clear();
    }

    pub(super) fn freezer(&self) -> Arc<Freezer> {
        let limits = Limits::default();
        let (clock, events) = (Arc::new(self.clone()), Arc::new(self.clone()));
        Freezer::new(Box::new(self.clone()), Box::new(self.clone()), clock, events, limits)
    }

    pub(super) fn ports(&self, freezer: Option<Arc<Freezer>>) -> CutPorts {
        let (clock, events) = (Arc::new(self.clone()), Arc::new(self.clone()));
        CutPorts { gates: Box::new(self.clone()), freezer, clock, events }
    }

    pub(super) fn plan(policy: FreezePolicy, owner: FreezeOwner) -> CutPlan {
        CutPlan { name: Some("s1".to_owned()), policy, owner, limits: Limits::default() }
    }

    /// Enters a call; gives its fault, or `Kill` for all calls of a dead daemon.
    fn enter(&self, call: Call) -> (MutexGuard<'_, State>, Option<Fault>) {
        let mut state = self.state();
        if state.dead.get() {
            return (state, Some(Fault::Kill));
        }
        let index = state.trace.len();
        state.trace.push(call);
        state.pass(Duration::from_millis(1));
        state.check(call);
        let fault = state.faults.iter().find(|(at, _)| *at == index).map(|(_, fault)| *fault);
        match fault {
            Some(Fault::Kill) => {
                state.dead.set(true);
                if call.is_guest() {
                    state.unread.push_back(call);
                }
            }
            Some(Fault::ForeignThaw) => state.frozen = None,
            _ => {}
        }
        (state, fault)
    }

    /// A call that is no guest's and can fail.
    fn fallible(&self, call: Call, effect: impl FnOnce(&mut State)) -> Result<()> {
        let (mut state, fault) = self.enter(call);
        match fault {
            Some(Fault::Fails) => return Err(Error::new(ErrorKind::Io, format!("{call:?} fails"))),
            Some(Fault::Kill) => return Err(Error::new(ErrorKind::Io, "killed")),
            Some(Fault::Slow) => state.pass(Duration::from_secs(11)),
            _ => {}
        }
        effect(&mut state);
        Ok(())
    }

    fn ask<T>(
        &self,
        call: Call,
        deadline: Instant,
        answer: impl FnOnce(&mut State) -> GuestResult<T>,
    ) -> GuestResult<T> {
        let (mut state, fault) = self.enter(call);
        let patience = deadline.saturating_duration_since(state.now);
        if !state.dead.get() {
            let is_sane = patience > Duration::from_secs(1) && patience <= Duration::from_secs(10);
            state.must(is_sane, "a guest command has a deadline of a few seconds");
        }
        let timed_out = Err(GuestError::TimedOut(format!("{call:?}")));
        match fault {
            Some(Fault::Refused) => return Err(GuestError::Refused(format!("{call:?}"))),
            Some(Fault::Absent) => {
                state.in_step = false;
                return Err(GuestError::Absent(format!("{call:?}")));
            }
            Some(Fault::Lost) => {
                state.pass(patience);
                state.in_step = false;
                return timed_out;
            }
            Some(Fault::Late) => {
                state.pass(patience);
                state.in_step = false;
                state.stuck = 2;
                state.unread.push_back(call);
                return timed_out;
            }
            Some(Fault::AnswerLost) => {
                let _lost = answer(&mut state);
                state.in_step = false;
                return Err(GuestError::Other(format!("{call:?}: the channel broke")));
            }
            Some(Fault::Kill) => return Err(GuestError::Other("killed".to_owned())),
            Some(Fault::Slow) => state.pass(patience - Duration::from_millis(1)),
            Some(Fault::Fails | Fault::ForeignThaw) | None => {}
        }
        answer(&mut state)
    }
}

impl State {
    /// Panics with the whole story.
    pub(super) fn must(&self, holds: bool, what: &str) {
        if !holds {
            // So that what is dropped on the way out is not judged.
            self.dead.set(true);
            panic!("{what} ({})\n{self:#?}", self.story);
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        if self.kind == Kind::Windows
            && self.frozen.is_some_and(|since| self.now >= since + Duration::from_secs(10))
        {
            self.frozen = None;
        }
    }

    pub(super) fn may_freeze(&self) -> bool {
        self.frozen.is_some() || self.unread.contains(&Call::Freeze)
    }

    /// What must hold at each call.
    fn check(&self, call: Call) {
        use Call::*;
        self.must(!self.may_freeze() || self.debt, "a guest that may be frozen has its record");
        if self.closed {
            self.must(matches!(call, Drain | Pivot | Open), "inside the gate there is only drain and pivot");
        }
        if call.is_guest() {
            self.must(call == Connect || self.in_step, "a channel that is out of step is connected anew");
        }
        match call {
            Prepare => self.must(self.overlay == Overlay::None, "prepared once"),
            PreSync | Coverage | RecordDebt => {
                self.must(self.overlay == Overlay::Prepared, "prepare comes before the freeze");
            }
            Freeze => {
                self.must(self.debt, "the record comes before the freeze");
                self.must(self.overlay == Overlay::Prepared, "prepare comes before the freeze");
            }
            ClearDebt => self.must(!self.may_freeze(), "the record goes after the thaw"),
            Close => self.must(self.overlay == Overlay::Prepared, "prepare comes before the gate"),
            Drain => self.must(self.closed, "drain after close"),
            Pivot => {
                self.must(self.closed && self.drained, "pivot only when quiesced");
                self.must(self.overlay == Overlay::Prepared, "pivot once, after prepare");
            }
            Open => self.must(self.closed, "open after close"),
            UndoLayers => self.must(self.overlay == Overlay::Prepared, "undo only before the pivot"),
            Record | Seal => self.must(self.overlay == Overlay::Active, "seal after the pivot"),
            Connect | Status | Thaw => {}
        }
    }

    fn carry_out(&mut self, command: Call) -> u64 {
        match command {
            Call::Freeze => {
                self.frozen = Some(self.now);
                self.kind.freezes()
            }
            Call::Thaw => self.frozen.take().map_or(0, |_| self.kind.freezes()),
            _ => 0,
        }
    }
}

impl Guest for World {
    fn connect(&mut self, deadline: Instant) -> GuestResult<()> {
        self.ask(Call::Connect, deadline, |state| {
            if state.stuck > 0 {
                state.stuck -= 1;
                state.pass(deadline.saturating_duration_since(state.now));
                return Err(GuestError::TimedOut("stuck".to_owned()));
            }
            while let Some(command) = state.unread.pop_front() {
                state.carry_out(command);
            }
            state.in_step = true;
            Ok(())
        })
    }

    fn pre_sync(&mut self, deadline: Instant) -> GuestResult<()> {
        self.ask(Call::PreSync, deadline, |_| Ok(()))
    }

    fn coverage(&mut self, deadline: Instant) -> GuestResult<Coverage> {
        self.ask(Call::Coverage, deadline, |state| match state.frozen {
            Some(_) => Err(GuestError::Refused("frozen".to_owned())),
            None => Ok(Coverage {
                mounts: state.kind.mounts().iter().map(|&name| name.to_owned()).collect(),
                unfreezable: Vec::new(),
            }),
        })
    }

    fn freeze(&mut self, coverage: &Coverage, deadline: Instant) -> GuestResult<u64> {
        self.ask(Call::Freeze, deadline, |state| {
            state.must(coverage.mounts == state.kind.mounts(), "the freeze covers what is mounted");
            Ok(state.carry_out(Call::Freeze))
        })
    }

    fn status(&mut self, deadline: Instant) -> GuestResult<FreezeStatus> {
        self.ask(Call::Status, deadline, |state| match state.frozen {
            Some(_) => Ok(FreezeStatus::Frozen),
            None => Ok(FreezeStatus::Thawed),
        })
    }

    fn thaw(&mut self, deadline: Instant) -> GuestResult<u64> {
        self.ask(Call::Thaw, deadline, |state| match (state.kind, state.frozen) {
            (Kind::Windows, None) => Err(GuestError::Refused("not frozen".to_owned())),
            _ => Ok(state.carry_out(Call::Thaw)),
        })
    }
}

impl Debts for World {
    fn is_recorded(&self) -> Result<bool> {
        Ok(self.state().debt)
    }

    fn record(&self, snapshot: &str) -> Result<()> {
        assert_eq!(snapshot, "s1");
        self.fallible(Call::RecordDebt, |state| state.debt = true)
    }

    fn clear(&self) -> Result<()> {
        self.fallible(Call::ClearDebt, |state| state.debt = false)
    }
}

impl Layers for World {
    fn prepare(self: Box<Self>) -> Result<Box<dyn PreparedLayers>> {
        self.fallible(Call::Prepare, |state| state.overlay = Overlay::Prepared)?;
        Ok(self)
    }
}

impl PreparedLayers for World {
    fn undo(self: Box<Self>) -> Result<()> {
        self.fallible(Call::UndoLayers, |state| state.overlay = Overlay::None)
    }

    fn pivot(self: Box<Self>) -> Box<dyn PivotedLayers> {
        let _killed = self.fallible(Call::Pivot, |state| {
            let is_whole = state.kind.freezes() == state.kind.mounts().len() as u64;
            state.clean_at_pivot = Some(state.frozen.is_some() && is_whole);
            state.overlay = Overlay::Active;
        });
        self
    }
}

impl PivotedLayers for World {
    fn disks(&self) -> Vec<SnapshotDisk> {
        Vec::new()
    }

    fn record(&mut self, record: &SnapshotRecord) -> Result<()> {
        self.fallible(Call::Record, |state| state.records.push(record.clone()))
    }

    fn seal(&mut self) -> Result<()> {
        self.fallible(Call::Seal, |_| {})
    }
}

impl Gates for World {
    fn close(&self) -> Box<dyn ClosedGates> {
        let _killed = self.fallible(Call::Close, |state| {
            state.closed = true;
            state.drained = false;
        });
        Box::new(ClosedWorld(self.clone()))
    }
}

/// Opens when dropped, as real gates do.
struct ClosedWorld(World);

impl ClosedGates for ClosedWorld {
    fn drain(&self, deadline: Instant) -> Result<()> {
        self.0.fallible(Call::Drain, |state| {
            let left = deadline.saturating_duration_since(state.start);
            state.must(left < Duration::from_secs(3600), "a drain has a deadline");
            state.drained = true;
        })
    }

    fn open(self: Box<Self>) -> Wait {
        Wait { longest: Duration::from_millis(3), lanes: 1 }
    }
}

impl Drop for ClosedWorld {
    fn drop(&mut self) {
        let _killed = self.0.fallible(Call::Open, |state| state.closed = false);
    }
}

impl Clock for World {
    fn now(&self) -> Instant {
        self.state().now
    }

    fn wall(&self) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH
    }
}

impl Events for World {
    fn emit(&self, event: Event) {
        let mut state = self.state();
        if !state.dead.get() {
            let is_open = !state.closed;
            state.must(is_open, "no event is told inside the gate");
            state.events.push(event);
        }
    }
}
