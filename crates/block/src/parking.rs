//! Parking: where requests wait that the host could not carry out, until it can.
//!
//! ```text
//!   worker: a write fails ─▶ parked ──(a second later, cont)──▶ tried again ─▶ answered
//!                              │ ▲                                   │
//!                              │ └────────── fails again ────────────┘
//!                              └──(its ring is stopped)─▶ answered with an error
//! ```
//!
//! A parked request holds nothing of the disk, and stands outside the [gate](crate::Gate) like one that was never taken:
//! a cut does not wait for it. It is written after the cut, which a write that was not acknowledged before it may be.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use serde::{Deserialize, Serialize};

use crate::ErrorKind;

/// What becomes of a request to change the disk that the host could not carry out: QEMU's `werror`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WriteErrors {
    /// The guest gets an error.
    Report,
    /// The request is parked if the host has no room; for any other reason the guest gets an error.
    #[default]
    Enospc,
    /// The request is parked, whatever the host's reason.
    Stop,
}

impl WriteErrors {
    /// Whether a request that failed so is parked. What no later try could mend never is: an image that a failed sync has
    /// latched, and what is wrong with the request itself.
    pub fn parks(self, kind: ErrorKind) -> bool {
        match kind {
            ErrorKind::NoSpace => self != Self::Report,
            ErrorKind::Io | ErrorKind::TimedOut => self == Self::Stop,
            _ => false,
        }
    }
}

/// The state of a disk's I/O: QEMU's `BlockDeviceIoStatus`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// Nothing is parked.
    #[default]
    Ok,
    /// Requests wait for room on the host.
    NoSpace,
    /// Requests wait that failed for another reason.
    Failed,
}

/// The parked requests of one disk, by its workers, each of which has a [`Bay`].
#[derive(Debug, Default)]
pub struct Parking {
    policy: WriteErrors,
    bays: Mutex<Vec<Arc<BayState>>>,
}

#[derive(Debug)]
struct BayState {
    parked: AtomicUsize,
    /// [`IoStatus`] of the last one that was parked.
    status: AtomicU8,
    /// Somebody wants them tried again.
    resumed: AtomicBool,
    waker: Waker,
}

impl Parking {
    /// For a disk with this policy.
    pub fn new(policy: WriteErrors) -> Self {
        Self { policy, bays: Mutex::default() }
    }

    /// What is parked, and what is not.
    pub fn policy(&self) -> WriteErrors {
        self.policy
    }

    /// A worker's part. `waker` is called when what is parked there shall be tried again.
    pub fn bay(self: &Arc<Self>, waker: Waker) -> Bay {
        let (parked, status) = (AtomicUsize::new(0), AtomicU8::new(0));
        let state = Arc::new(BayState { parked, status, resumed: AtomicBool::new(false), waker });
        self.bays().push(Arc::clone(&state));
        Bay { parking: Arc::clone(self), state }
    }

    /// Has all that is parked tried again, now.
    pub fn resume(&self) {
        for bay in self.bays().iter() {
            bay.resumed.store(true, Ordering::SeqCst);
            bay.waker.wake_by_ref();
        }
    }

    /// How many requests are parked.
    pub fn parked(&self) -> usize {
        self.bays().iter().map(|bay| bay.parked.load(Ordering::SeqCst)).sum()
    }

    /// The worst of what is parked.
    pub fn status(&self) -> IoStatus {
        let bays = self.bays();
        let busy = bays.iter().filter(|bay| bay.parked.load(Ordering::SeqCst) > 0);
        busy.map(|bay| IoStatus::of(bay.status.load(Ordering::SeqCst))).max().unwrap_or_default()
    }

    fn bays(&self) -> MutexGuard<'_, Vec<Arc<BayState>>> {
        self.bays.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IoStatus {
    fn of(code: u8) -> Self {
        match code {
            0 => Self::Ok,
            1 => Self::NoSpace,
            _ => Self::Failed,
        }
    }
}

/// A worker's part of a [`Parking`]: what it tells of its parked requests, and is told. The requests are the worker's own.
#[derive(Debug)]
pub struct Bay {
    parking: Arc<Parking>,
    state: Arc<BayState>,
}

impl Bay {
    /// The disk's policy.
    pub fn policy(&self) -> WriteErrors {
        self.parking.policy
    }

    /// So many are parked, the last of them for a reason of this kind if it is new.
    pub fn tell(&self, parked: usize, kind: Option<ErrorKind>) {
        if let Some(kind) = kind {
            let status = if kind == ErrorKind::NoSpace { IoStatus::NoSpace } else { IoStatus::Failed };
            self.state.status.store(status as u8, Ordering::SeqCst);
        }
        self.state.parked.store(parked, Ordering::SeqCst);
    }

    /// Whether they shall be tried again, which is asked once.
    pub fn is_resumed(&self) -> bool {
        self.state.resumed.swap(false, Ordering::SeqCst)
    }
}

impl Drop for Bay {
    fn drop(&mut self) {
        self.parking.bays().retain(|state| !Arc::ptr_eq(state, &self.state));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_parks_what_qemu_stops_at() {
        use ErrorKind::{Corrupt, Io, Latched, NoSpace, OutOfRange, ReadOnly, TimedOut, Unsupported};
        let all = [Corrupt, Io, Latched, NoSpace, OutOfRange, ReadOnly, TimedOut, Unsupported];
        let parked = |policy: WriteErrors| all.into_iter().filter(move |kind| policy.parks(*kind));
        assert_eq!(parked(WriteErrors::Report).count(), 0);
        assert!(parked(WriteErrors::Enospc).eq([NoSpace]));
        assert!(parked(WriteErrors::Stop).eq([Io, NoSpace, TimedOut]));
        assert_eq!(WriteErrors::default(), WriteErrors::Enospc);
    }

    #[test]
    fn the_worst_of_all_bays_is_told_as_long_as_it_is_parked() {
        let parking = Arc::new(Parking::default());
        let (one, two) = (parking.bay(Waker::noop().clone()), parking.bay(Waker::noop().clone()));
        assert_eq!((parking.status(), parking.parked()), (IoStatus::Ok, 0));
        one.tell(2, Some(ErrorKind::NoSpace));
        assert_eq!((parking.status(), parking.parked()), (IoStatus::NoSpace, 2));
        two.tell(1, Some(ErrorKind::Io));
        assert_eq!((parking.status(), parking.parked()), (IoStatus::Failed, 3));
        two.tell(0, None);
        assert_eq!(parking.status(), IoStatus::NoSpace);
        drop(one);
        assert_eq!((parking.status(), parking.parked()), (IoStatus::Ok, 0));
        parking.resume();
        assert!(two.is_resumed() && !two.is_resumed());
    }
}
