//! Freezing the guest and, above all, thawing it.
//!
//! ```text
//!              record written, freeze sent            frozen
//!    Clear ─────────────────────────────────▶ Held ───────────▶ (a cut goes on)
//!      ▲  ◀── nothing froze, record removed ───┤                      │ its thaw
//!      │                                       │ fate unknown         │
//!      │                                       ▼                      ▼
//!      └── thaw confirmed, record removed ── Owed ◀── not confirmed ──┴── confirmed, record removed ──▶ Clear
//!                                              │ ▲
//!                                              └─┘ the collector tries, with pauses; an alarm each time
//! ```
//!
//! Invariant: whenever a freeze may have been sent and its thaw is not confirmed, the record is on stable storage, and
//! either a cut holds the freeze or the collector is at work.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::{Context, Error, ErrorKind};

use crate::Event;

use super::limits::Limits;
use super::ports::{Clock, Coverage, Debts, Events, FreezeStatus, Guest, GuestError, GuestResult};

/// The one way to a guest's agent, and the keeper of what is owed to the guest. One a guest, shared by all cuts and the
/// [`Collector`](super::Collector).
pub struct Freezer {
    inner: Mutex<Inner>,
    changed: Condvar,
    debts: Box<dyn Debts>,
    clock: Arc<dyn Clock>,
    events: Arc<dyn Events>,
    limits: Limits,
}

struct Inner {
    guest: Box<dyn Guest>,
    /// Whether the last command was answered; otherwise the next one must connect anew.
    in_step: bool,
    debt: Debt,
    stopping: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Debt {
    Clear,
    /// A cut holds the freeze, and will thaw.
    Held,
    Owed {
        /// Failed tries to thaw.
        tries: u64,
    },
}

/// What a try to freeze came to, and what it took; a step that did not take place has no time.
pub(super) struct Attempt {
    pub(super) pre_sync: Option<Duration>,
    pub(super) freeze: Option<Duration>,
    pub(super) outcome: block::Result<Freeze>,
}

impl Freezer {
    /// Takes over the guest, and the debt that an earlier run may have left: an unreadable record counts as one, as a
    /// thaw too many does no harm.
    pub fn new(
        guest: Box<dyn Guest>,
        debts: Box<dyn Debts>,
        clock: Arc<dyn Clock>,
        events: Arc<dyn Events>,
        limits: Limits,
    ) -> Arc<Self> {
        let owed = debts.is_recorded().unwrap_or_else(|error| {
            tracing::warn!(%error, "the thaw-owed record cannot be read; a thaw is taken to be owed");
            true
        });
        let debt = if owed { Debt::Owed { tries: 0 } } else { Debt::Clear };
        let inner = Inner { guest, in_step: false, debt, stopping: false };
        Arc::new(Self { inner: Mutex::new(inner), changed: Condvar::new(), debts, clock, events, limits })
    }

    /// Whether a thaw is owed that no cut is going to send.
    #[cfg(test)]
    pub(super) fn is_owed(&self) -> bool {
        matches!(self.lock().debt, Debt::Owed { .. })
    }

    /// Freezes for `snapshot`. Pays first what is still owed. Waits for the guest, up to the limits of each step; no
    /// other cut can freeze meanwhile.
    pub(super) fn freeze(self: &Arc<Self>, snapshot: &str) -> Attempt {
        let mut inner = self.lock();
        let (mut pre_sync, mut freeze) = (None, None);
        let outcome = self.get_ready(&mut inner, &mut pre_sync).and_then(|coverage| {
            self.debts.record(snapshot).context(|| "write the thaw-owed record")?;
            inner.debt = Debt::Held;
            let since = self.clock.now();
            let result = inner.ask(|guest| guest.freeze(&coverage, since + self.limits.freeze));
            freeze = Some(self.clock.now().saturating_duration_since(since));
            match result {
                Ok(count) => {
                    Ok(Freeze { freezer: Arc::clone(self), count, coverage, since, is_spent: false })
                }
                Err(error) => {
                    if error.is_unknown() {
                        self.owe(&mut inner, 0, &error.to_string());
                    } else {
                        self.settle(&mut inner, 0);
                    }
                    Err(error.into())
                }
            }
        });
        Attempt { pre_sync, freeze, outcome }
    }

    /// All that comes before the record: the guest runs.
    fn get_ready(&self, inner: &mut Inner, spent: &mut Option<Duration>) -> block::Result<Coverage> {
        match inner.debt {
            Debt::Clear => {}
            Debt::Held => {
                return Err(Error::new(ErrorKind::Busy, "the guest is frozen for another snapshot"));
            }
            Debt::Owed { tries } => {
                self.pay(inner, tries).map_err(Error::from).context(|| "a thaw is still owed")?;
            }
        }
        self.connect(inner)?;
        let start = self.clock.now();
        let synced = inner.ask(|guest| guest.pre_sync(start + self.limits.pre_sync));
        *spent = Some(self.clock.now().saturating_duration_since(start));
        if let Err(error) = synced {
            tracing::warn!(%error, "no sync ahead of the freeze; the guest may stall longer in it");
            if !inner.in_step {
                self.connect(inner)?;
            }
        }
        // As late as can be: what is mounted after this is not known to the grade.
        let deadline = self.clock.now() + self.limits.connect;
        Ok(inner.ask(|guest| guest.coverage(deadline))?)
    }

    fn connect(&self, inner: &mut Inner) -> GuestResult<()> {
        let deadline = self.clock.now() + self.limits.connect;
        let connected = inner.ask(|guest| guest.connect(deadline));
        inner.in_step = connected.is_ok();
        connected
    }

    /// One try to thaw, which counts only if the agent then says that nothing is frozen. On failure the thaw is owed.
    fn pay(&self, inner: &mut Inner, tries: u64) -> GuestResult<u64> {
        let thawed = self.thaw_once(inner);
        match &thawed {
            Ok(count) => {
                let was_announced = matches!(inner.debt, Debt::Owed { .. });
                if self.settle(inner, tries) && was_announced {
                    self.events.emit(Event::ThawConfirmed { count: *count });
                }
            }
            Err(error) => self.owe(inner, tries.saturating_add(1), &error.to_string()),
        }
        thawed
    }

    fn thaw_once(&self, inner: &mut Inner) -> GuestResult<u64> {
        // If a freeze of unknown fate is still in the channel, this waits for it, or fails.
        if !inner.in_step {
            self.connect(inner)?;
        }
        let deadline = self.clock.now() + self.limits.thaw;
        let count = match inner.ask(|guest| guest.thaw(deadline)) {
            Ok(count) => count,
            // A guest that thawed itself (Windows) refuses; its status tells whether it did.
            Err(GuestError::Refused(reason)) => {
                tracing::warn!(%reason, "the guest agent refused the thaw");
                0
            }
            Err(error) => return Err(error),
        };
        let deadline = self.clock.now() + self.limits.connect;
        match inner.ask(|guest| guest.status(deadline))? {
            FreezeStatus::Thawed => Ok(count),
            FreezeStatus::Frozen => {
                Err(GuestError::Other("it says that the guest is frozen after the thaw".to_owned()))
            }
        }
    }

    /// Nothing is frozen any more: removes the record. Says whether that worked; if not the debt stays, and the
    /// collector thaws in vain until the record goes.
    fn settle(&self, inner: &mut Inner, tries: u64) -> bool {
        match self.debts.clear() {
            Ok(()) => {
                inner.debt = Debt::Clear;
                true
            }
            Err(error) => {
                let reason = format!("nothing is frozen, but the thaw-owed record stays: {error}");
                self.owe(inner, tries.saturating_add(1), &reason);
                false
            }
        }
    }

    fn owe(&self, inner: &mut Inner, tries: u64, reason: &str) {
        tracing::error!(tries, reason, "a thaw is owed to the guest");
        inner.debt = Debt::Owed { tries };
        self.events.emit(Event::ThawOwed { tries, reason: reason.to_owned() });
        self.changed.notify_all();
    }

    /// Tries once to pay what is owed; if that fails, says how long to wait before the next try.
    pub(super) fn collect(&self) -> Option<Duration> {
        let mut inner = self.lock();
        if let Debt::Owed { tries } = inner.debt {
            let _paid = self.pay(&mut inner, tries);
        }
        match inner.debt {
            Debt::Owed { tries } => Some(self.limits.pause(tries)),
            Debt::Clear | Debt::Held => None,
        }
    }

    /// Waits until something is owed; `false` if the collector is to stop.
    pub(super) fn wait_for_debt(&self) -> bool {
        let idle = |inner: &mut Inner| !inner.stopping && !matches!(inner.debt, Debt::Owed { .. });
        !self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner).stopping
    }

    /// Waits before the next try; `false` if the collector is to stop.
    pub(super) fn wait_for_retry(&self, pause: Duration) -> bool {
        let wait = self.changed.wait_timeout_while(self.lock(), pause, |inner| !inner.stopping);
        !wait.unwrap_or_else(PoisonError::into_inner).0.stopping
    }

    pub(super) fn stop_collecting(&self, stopping: bool) {
        self.lock().stopping = stopping;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn ask<T>(&mut self, command: impl FnOnce(&mut dyn Guest) -> GuestResult<T>) -> GuestResult<T> {
        let answer = command(&mut *self.guest);
        if !matches!(answer, Ok(_) | Err(GuestError::Refused(_))) {
            self.in_step = false;
        }
        answer
    }
}

/// A frozen guest, held by a cut. Dropping it leaves the thaw to the collector.
pub(super) struct Freeze {
    freezer: Arc<Freezer>,
    pub(super) count: u64,
    pub(super) coverage: Coverage,
    /// When the freeze was sent.
    pub(super) since: Instant,
    is_spent: bool,
}

impl Freeze {
    /// Thaws. Fails if the agent does not confirm it; the collector then goes on.
    pub(super) fn thaw(mut self) -> GuestResult<u64> {
        self.is_spent = true;
        self.freezer.pay(&mut self.freezer.lock(), 0)
    }
}

impl Drop for Freeze {
    fn drop(&mut self) {
        if !self.is_spent {
            self.freezer.owe(&mut self.freezer.lock(), 0, "the cut ended without a thaw");
        }
    }
}
