//! Jobs that end together, all well or none: QEMU's job transactions (`JobTxn`).
//!
//! ```text
//!   waiting ──(all have come so far)──▶ pending ──(finalized, or none needs to be)──▶ verdict: all do their last step
//!      └────────────(one fails, or is called off: so are all)───────┴───────────────▶ verdict: none does
//! ```
//! The verdict is given once, by the job that first finds a reason for one. So no job does its last step while another one is
//! called off.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::job::Job;
use super::machine::Verb;

/// A group of jobs. All of them are entered before the first one begins.
#[derive(Debug, Default)]
pub struct JobGroup(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    members: Vec<Weak<Job>>,
    /// How many have done all but their last step.
    arrived: usize,
    /// Whether one of them waits for somebody to finalize it, and so all do.
    by_hand: bool,
    finalized: bool,
    verdict: Option<bool>,
}

impl JobGroup {
    /// Without members yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn join(&self, job: &Arc<Job>) {
        let mut state = self.state();
        state.members.push(Arc::downgrade(job));
        state.by_hand |= !job.identity.auto_finalize;
    }

    /// One more has come to its last step. The caller holds no job's lock.
    pub(super) fn arrive(&self) {
        self.state().arrived += 1;
        self.wake();
    }

    /// Whether all have.
    pub(super) fn is_complete(&self) -> bool {
        let state = self.state();
        state.arrived >= state.members.len()
    }

    /// Somebody has finalized one of them. The caller holds no job's lock.
    pub(super) fn finalize(&self) {
        self.state().finalized = true;
        self.wake();
    }

    /// Whether the last steps may be done.
    pub(super) fn is_finalized(&self) -> bool {
        let state = self.state();
        state.finalized || !state.by_hand
    }

    /// Gives the verdict, if there is none yet; what it is.
    pub(super) fn decide(&self, all_well: bool) -> bool {
        *self.state().verdict.get_or_insert(all_well)
    }

    /// Calls off all but `failed`. The caller holds no job's lock.
    pub(super) fn call_off(&self, failed: &Job) {
        self.decide(false);
        for member in self.members().iter().filter(|member| !std::ptr::eq(&***member, failed)) {
            // One that is over can not be called off, nor one that has begun its last step.
            let _ = member.ask(Verb::Cancel);
        }
    }

    fn wake(&self) {
        self.members().iter().for_each(|member| member.look_again());
    }

    fn members(&self) -> Vec<Arc<Job>> {
        self.state().members.iter().filter_map(Weak::upgrade).collect()
    }
}
