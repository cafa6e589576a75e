//! Who may change chains, and the cuts that clients ask for.

use std::sync::{Arc, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use block::{Error, ErrorKind, Result};

use super::Manager;
use crate::cut::{Cut, CutPlan, CutPorts, Events, GateGroup, Held, Limits, SystemClock};
use crate::events::Bus;
use crate::group::Group;
use crate::marks::CutRequest;
use crate::model::{CreateRequest, Event, SnapshotRecord};
use crate::request;

/// The longest lease of a prepared snapshot: the guest's disks stand still as long.
pub const MAX_LEASE: Duration = Duration::from_secs(30);

/// The listener of a cut that makes no snapshot: that the guest was stalled is worth telling, of a snapshot there is nothing
/// to tell.
struct StallsOnly(Arc<Bus>);

impl Events for StallsOnly {
    fn emit(&self, event: Event) {
        if matches!(event, Event::Stall { .. }) {
            self.0.emit(event);
        }
    }
}

/// The right to change chains.
pub(crate) struct Change<'a> {
    _chains: MutexGuard<'a, ()>,
    _turn: MutexGuard<'a, bool>,
}

/// A snapshot between *prepare* and *release*.
pub(crate) struct Prepared {
    pub(crate) name: String,
    pub(crate) held: Held,
    pub(crate) until: Instant,
}

impl Manager {
    /// Takes a snapshot; returns once it is sealed.
    pub fn create(&self, request: CreateRequest) -> Result<SnapshotRecord> {
        let _change = self.begin()?;
        let (cut, group) = self.plan(request.into())?;
        cut.take(Box::new(group))
    }

    /// Takes a snapshot up to the pivot: the guest is frozen and its disks are quiesced until it is released or
    /// aborted, at the latest when `lease` ends, which does as an abort.
    pub fn prepare(&self, request: CreateRequest, lease: Duration) -> Result<()> {
        if lease.is_zero() || lease > MAX_LEASE {
            let story = format!("a lease is longer than 0 s and at most {} s", MAX_LEASE.as_secs());
            return Err(Error::new(ErrorKind::InvalidInput, story));
        }
        let _change = self.begin()?;
        let name = request.name.clone();
        let (cut, group) = self.plan(request.into())?;
        let held = cut.prepare(Box::new(group))?;
        *self.held() = Some(Prepared { name, held, until: Instant::now() + lease });
        Ok(())
    }

    /// The snapshot that is prepared and waits for its release.
    pub fn prepared(&self) -> Option<String> {
        self.held().as_ref().map(|prepared| prepared.name.clone())
    }

    /// Completes a prepared snapshot; returns once it is sealed.
    pub fn release(&self, name: &str) -> Result<SnapshotRecord> {
        let (_change, prepared) = self.take_prepared(name)?;
        prepared.held.release()
    }

    /// Undoes a prepared snapshot.
    pub fn abort(&self, name: &str) -> Result<()> {
        let (_change, prepared) = self.take_prepared(name)?;
        prepared.held.abort("it was aborted")
    }

    /// The cut that a request asks for, and the layers of its disks.
    pub(crate) fn plan(&self, request: CutRequest) -> Result<(Cut, Group)> {
        if let Some(name) = &request.snapshot {
            request::check_name(name)?;
            if self.store.manifest().snapshot(name).is_ok() {
                let story = format!("there is a snapshot '{name}' already: choose another name");
                return Err(Error::new(ErrorKind::Busy, story));
            }
        }
        let disks = request::choose(&self.disks, request.disks.as_deref())?;
        self.finish_seals(disks.iter())?;
        let plan = CutPlan {
            name: request.snapshot.clone(),
            policy: self.possible_freeze(request.freeze.unwrap_or(self.defaults.policy))?,
            owner: self.defaults.owner,
            limits: Limits::default(),
        };
        let ports = CutPorts {
            gates: Box::new(GateGroup::new(disks.iter().map(|disk| Arc::clone(disk.chain.gate())).collect())),
            freezer: self.freezer.clone(),
            clock: Arc::new(SystemClock),
            events: match request.snapshot {
                Some(_) => Arc::clone(&self.bus) as _,
                None => Arc::new(StallsOnly(Arc::clone(&self.bus))),
            },
        };
        let group = Group { store: Arc::clone(&self.store), name: request.snapshot, disks };
        Ok((Cut::new(plan, ports), group))
    }

    /// The right to change chains. Refused while a snapshot is prepared or another change is under way: a client shall
    /// not wait for another one's guest.
    pub(crate) fn begin(&self) -> Result<Change<'_>> {
        let busy = |story: String| Err(Error::new(ErrorKind::Busy, story));
        let change = match self.change.try_lock() {
            Ok(change) => change,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return busy(
                    "another snapshot, delete or revert is under way: try again after it".to_owned(),
                );
            }
        };
        if *change {
            return busy("the daemon is ending".to_owned());
        }
        if let Some(prepared) = &*self.held() {
            return busy(format!("snapshot '{}' is prepared: release or abort it first", prepared.name));
        }
        // A job may be at its switch: that is over soon.
        Ok(Change { _chains: self.lock_chains(), _turn: change })
    }

    pub(super) fn lock_chains(&self) -> MutexGuard<'_, ()> {
        self.chains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_change(&self) -> MutexGuard<'_, bool> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn held(&self) -> MutexGuard<'_, Option<Prepared>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is prepared, with the right to change chains.
    fn take_prepared(&self, name: &str) -> Result<(Change<'_>, Prepared)> {
        let is_it = |prepared: &mut Prepared| prepared.name == name;
        let missing = || {
            let story = format!("no snapshot '{name}' is prepared (its lease may have ended)");
            Error::new(ErrorKind::NotFound, story)
        };
        if !self.held().as_mut().is_some_and(is_it) {
            return Err(missing());
        }
        // While something is prepared, only the end of it can be under way.
        let change = Change { _turn: self.lock_change(), _chains: self.lock_chains() };
        let prepared = self.held().take_if(is_it).ok_or_else(missing)?;
        Ok((change, prepared))
    }
}
