//! One job, as its thread and its clients see it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::{Error, IoStatus, Result};

use super::group::JobGroup;
use super::machine::{Machine, Verb, Wish};
use super::model::{BlockJobInfo, ClientId, JobEnd, JobInfo, JobStatus, JobType};
use super::pace::Limit;
use crate::cut::Events;
use crate::model::{ErrorAction, Event, IoOperation};

/// Why a job's work ended early.
#[derive(Debug)]
pub enum Halt {
    /// A client called it off.
    Cancelled,
    /// The daemon ends; the next run goes on with it.
    Stopped,
    /// It could not be done.
    Failed(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// What a job is, fixed when it is made.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) id: String,
    pub(crate) kind: JobType,
    /// Nobody asked for it but Frazil itself.
    pub(crate) automatic: bool,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
    /// Who began it.
    pub(crate) client: Option<ClientId>,
    /// Those that it ends with.
    pub(crate) group: Option<Arc<JobGroup>>,
}

/// A job: its thread does the work and asks here whether to go on; clients ask here what it does.
pub struct Job {
    pub(crate) identity: Identity,
    state: Mutex<State>,
    changed: Condvar,
    events: Arc<dyn Events>,
}

struct State {
    machine: Machine,
    /// The daemon ends.
    stopped: bool,
    done: u64,
    total: u64,
    limit: Limit,
    error: Option<String>,
}

impl Job {
    pub(crate) fn new(identity: Identity, speed: u64, paused: bool, events: Arc<dyn Events>) -> Self {
        let state = State {
            machine: Machine::new(paused, identity.auto_finalize && identity.group.is_none()),
            stopped: false,
            done: 0,
            total: 0,
            limit: Limit::new(speed, Instant::now()),
            error: None,
        };
        let job = Self { identity, state: Mutex::new(state), changed: Condvar::new(), events };
        job.tell(JobStatus::Created);
        job
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, status: JobStatus) {
        self.events.emit(Event::Job { id: self.identity.id.clone(), status });
    }

    pub(crate) fn info(&self) -> JobInfo {
        let state = self.state();
        JobInfo {
            id: self.identity.id.clone(),
            r#type: self.identity.kind,
            status: state.machine.status(),
            current_progress: state.done,
            total_progress: state.total,
            error: state.error.clone(),
        }
    }

    /// As QEMU's block jobs are told; `None` for what nobody asked for, and for what is none there.
    pub(crate) fn block_info(&self) -> Option<BlockJobInfo> {
        let (identity, state) = (&self.identity, self.state());
        let status = state.machine.status();
        let is_block_job = !identity.automatic && identity.kind != JobType::Create;
        is_block_job.then(|| BlockJobInfo {
            r#type: identity.kind,
            device: identity.id.clone(),
            len: state.total,
            offset: state.done,
            busy: status == JobStatus::Running,
            paused: state.machine.is_paused(),
            speed: state.limit.speed(),
            io_status: IoStatus::Ok,
            ready: matches!(status, JobStatus::Ready | JobStatus::Standby),
            status,
            auto_finalize: identity.auto_finalize,
            auto_dismiss: identity.auto_dismiss,
            error: state.error.clone(),
        })
    }

    pub(crate) fn status(&self) -> JobStatus {
        self.state().machine.status()
    }

    /// Has it rest, as if a client had asked: it goes on when one says so.
    pub fn pause(&self) -> Result<()> {
        self.ask(Verb::Pause)
    }

    /// What a client asks; the job's thread follows soon.
    pub(crate) fn ask(&self, verb: Verb) -> Result<()> {
        self.state().machine.ask(&self.identity.id, verb)?;
        self.changed.notify_all();
        if let (Verb::Finalize, Some(group)) = (verb, &self.identity.group) {
            group.finalize();
        }
        Ok(())
    }

    /// Something outside has changed that its thread may wait for.
    pub(super) fn look_again(&self) {
        // Who waits has looked before it lets go of the lock.
        drop(self.state());
        self.changed.notify_all();
    }

    /// It did not succeed: none of those does that it would have ended with.
    pub(super) fn call_off_group(&self) {
        if let Some(group) = &self.identity.group {
            group.call_off(self);
        }
    }

    pub(crate) fn set_speed(&self, speed: u64) -> Result<()> {
        let mut state = self.state();
        state.machine.ask(&self.identity.id, Verb::SetSpeed)?;
        state.limit.set(speed, Instant::now());
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// What the manifest remembers: its speed, and whether it is paused.
    pub(crate) fn settings(&self) -> (u64, bool) {
        let state = self.state();
        (state.limit.speed(), state.machine.is_paused())
    }

    /// The daemon ends: the job leaves its work as it is.
    pub(crate) fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
    }

    /// Goes to another status, and tells.
    pub(crate) fn go(&self, to: JobStatus) -> Result<()> {
        self.go_telling(to, None)
    }

    /// The same, with one event more. Nobody finds the job in that status before it is told.
    fn go_telling(&self, to: JobStatus, more: Option<Event>) -> Result<()> {
        let mut state = self.state();
        state.machine.go(to)?;
        self.tell(to);
        more.into_iter().for_each(|event| self.events.emit(event));
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// It has failed, whether or not somebody has called it off: who waits for what it does then must be told.
    pub(crate) fn fail(&self) {
        self.state().machine.fail();
    }

    /// The end: why it failed, if it did.
    pub(crate) fn conclude(&self, error: Option<String>) -> Result<()> {
        self.state().error = error;
        self.tell_end();
        self.go(JobStatus::Concluded)
    }

    /// How it stands, for who began it.
    fn end(&self) -> Option<JobEnd> {
        let BlockJobInfo { r#type, device, len, offset, speed, error, .. } = self.block_info()?;
        Some(JobEnd { r#type, device, len, offset, speed, error })
    }

    /// As in QEMU, before the status changes.
    fn tell_end(&self) {
        let Some(mut end) = self.end().map(Box::new) else { return };
        let (cancelled, client) = (self.state().machine.is_cancelled(), self.identity.client);
        end.error = end.error.filter(|_| !cancelled);
        self.events.emit(match cancelled {
            true => Event::JobCancelled { end, client },
            false => Event::JobCompleted { end, client },
        });
    }

    /// All is copied. Waits until a client completes the job.
    pub(crate) fn ready_point(&self) -> std::result::Result<(), Halt> {
        let client = self.identity.client;
        let ready = self.end().map(|end| Event::JobReady { end: Box::new(end), client });
        self.go_telling(JobStatus::Ready, ready)?;
        let mut state = self.state();
        loop {
            match (state.stopped, state.machine.wish()) {
                (true, _) => return Err(Halt::Stopped),
                (_, Wish::Rest) => self.switch(&mut state, JobStatus::Ready, JobStatus::Standby)?,
                (_, wish) => {
                    self.switch(&mut state, JobStatus::Standby, JobStatus::Ready)?;
                    match (wish, state.machine.is_completed()) {
                        (Wish::GiveUp, _) => return Err(Halt::Cancelled),
                        (_, true) => return Ok(()),
                        _ => {}
                    }
                }
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// All is done but what can not be undone. Waits until the same is true of all that it ends with, and until somebody
    /// finalizes the job, or one of those, if it does not do so itself.
    pub fn finalize_point(&self) -> std::result::Result<(), Halt> {
        self.go(JobStatus::Waiting)?;
        self.await_group()?;
        let (id, client) = (self.identity.id.clone(), self.identity.client);
        let pending = Event::JobPending { r#type: self.identity.kind, id, client };
        self.go_telling(JobStatus::Pending, (!self.identity.auto_finalize).then_some(pending))?;
        let group = self.identity.group.as_ref();
        let mut state = self.state();
        loop {
            let finalized = group.map_or(state.machine.is_finalized(), |group| group.is_finalized());
            let reason = match (state.stopped, state.machine.is_cancelled(), finalized) {
                (true, ..) => Err(Halt::Stopped),
                (_, true, _) => Err(Halt::Cancelled),
                (_, _, true) => Ok(()),
                _ => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            let all_well = group.map_or(reason.is_ok(), |group| group.decide(reason.is_ok()));
            return match (all_well, reason) {
                (false, Err(halt)) => Err(halt),
                _ => {
                    state.machine.settle(all_well);
                    all_well.then_some(()).ok_or(Halt::Cancelled)
                }
            };
        }
    }

    /// Waits until all that it ends with have come as far as it has.
    fn await_group(&self) -> std::result::Result<(), Halt> {
        let Some(group) = &self.identity.group else { return Ok(()) };
        group.arrive();
        let mut state = self.state();
        while !group.is_complete() {
            let halt = match (state.stopped, state.machine.is_cancelled()) {
                (true, _) => Halt::Stopped,
                (false, true) => Halt::Cancelled,
                (false, false) => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            // At once: the others may come to their last step before this one has put away what it began. If the verdict is
            // that all is well, all have come so far.
            if !group.decide(false) {
                return Err(halt);
            }
        }
        Ok(())
    }

    /// Tells of an error of I/O, and what becomes of it: QEMU's `BLOCK_JOB_ERROR`.
    pub fn tell_error(&self, operation: IoOperation, action: ErrorAction) {
        let (device, client) = (self.identity.id.clone(), self.identity.client);
        self.events.emit(Event::JobError { device, operation, action, client });
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.identity.id
    }

    /// How much there is to copy in all, as far as is known.
    pub fn set_total(&self, total: u64) {
        self.state().total = total;
    }

    /// So many bytes have been copied.
    pub fn copied(&self, bytes: u64) {
        let mut state = self.state();
        state.done += bytes;
        state.total = state.total.max(state.done);
        state.limit.take(bytes, Instant::now());
    }

    /// How many bytes to copy, or few more, before the next [`pause_point`](Self::pause_point).
    pub fn allowance(&self) -> u64 {
        self.state().limit.slice()
    }

    /// Asked between two pieces of work: rests as long as it is paused, copies too fast, or shall be courteous to the
    /// guest (`rest`), and returns when it is to go on.
    pub fn pause_point(&self, rest: Duration) -> std::result::Result<(), Halt> {
        let until = Instant::now() + rest;
        let mut state = self.state();
        loop {
            let wish = match (state.stopped, state.machine.wish()) {
                (true, _) => return Err(Halt::Stopped),
                (false, Wish::GiveUp) => {
                    self.switch(&mut state, JobStatus::Paused, JobStatus::Running)?;
                    return Err(Halt::Cancelled);
                }
                (false, wish) => wish,
            };
            let now = Instant::now();
            let wait = match wish {
                Wish::Rest => {
                    self.switch(&mut state, JobStatus::Running, JobStatus::Paused)?;
                    Duration::MAX
                }
                _ => {
                    self.switch(&mut state, JobStatus::Paused, JobStatus::Running)?;
                    state.limit.wait(now).max(until.saturating_duration_since(now))
                }
            };
            if wait.is_zero() {
                return Ok(());
            }
            // At most an hour, after which it is looked at anew: more would overflow some clocks.
            let wait = wait.min(Duration::from_secs(3600));
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Asked between two pieces of what a job still does when it has been called off: rests as long as it copies too fast. An
    /// error if it was called off once more, or the daemon ends.
    pub fn closing_point(&self) -> std::result::Result<(), Halt> {
        let mut state = self.state();
        loop {
            match (state.stopped, state.machine.is_insisted()) {
                (true, _) => return Err(Halt::Stopped),
                (false, true) => return Err(Halt::Cancelled),
                (false, false) => {}
            }
            let wait = state.limit.wait(Instant::now());
            if wait.is_zero() {
                return Ok(());
            }
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// If it is in the one status, goes to the other.
    fn switch(&self, state: &mut State, from: JobStatus, to: JobStatus) -> Result<()> {
        if state.machine.status() == from {
            state.machine.go(to)?;
            self.tell(to);
        }
        Ok(())
    }

    /// Waits, in whatever status, for at most `time`; an error if it was called off or the daemon ends.
    pub(crate) fn wait(&self, time: Duration) -> std::result::Result<(), Halt> {
        let until = Instant::now() + time;
        let mut state = self.state();
        loop {
            match (state.stopped, state.machine.is_cancelled()) {
                (true, _) => return Err(Halt::Stopped),
                (false, true) => return Err(Halt::Cancelled),
                (false, false) => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
