//! What jobs work on: the chains, the manifest, and who else uses them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use block::{Context, Error, ErrorKind, Result, WriteErrors};

use super::job::{Halt, Job};
use crate::chain::Chain;
use crate::events::Bus;
use crate::group::Served;
use crate::layer::Opening;
use crate::manager::Prepared;
use crate::store::Store;

/// How often it is looked whether a prepared snapshot has been released, or readers have gone.
const LOOK: Duration = Duration::from_millis(20);

/// Everything that jobs share with the manager.
pub(crate) struct World {
    pub(crate) store: Arc<Store>,
    pub(crate) disks: BTreeMap<String, Served>,
    pub(crate) bus: Arc<Bus>,
    /// Held by whoever changes a chain: a cut as long as it lasts, a job only for its switch. A cut that finds a job
    /// there waits for it, a few syncs; nobody waits here for copying.
    pub(crate) chains: Arc<Mutex<()>>,
    pub(crate) held: Arc<Mutex<Option<Prepared>>>,
    pub(crate) readers: Readers,
}

impl World {
    /// The right to change chains, once no cut is under way or held.
    pub(crate) fn exclusive(&self, job: &Job) -> std::result::Result<MutexGuard<'_, ()>, Halt> {
        loop {
            // A cut that hangs for its deadlines must not keep a daemon from ending.
            if let Some(exclusive) = self.try_exclusive() {
                return Ok(exclusive);
            }
            job.wait(LOOK)?;
        }
    }

    /// The same for a job that has been called off. A cut and a held one end by their deadlines.
    pub(crate) fn exclusive_at_last(&self) -> MutexGuard<'_, ()> {
        loop {
            if let Some(exclusive) = self.try_exclusive() {
                return exclusive;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn try_exclusive(&self) -> Option<MutexGuard<'_, ()>> {
        let exclusive = match self.chains.try_lock() {
            Ok(exclusive) => exclusive,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.is_none().then_some(exclusive)
    }

    /// The chain of a disk: the one that is served, or one that is opened for as long as the job needs it.
    pub(crate) fn chain(&self, id: &str) -> Result<Served> {
        if let Some(served) = self.disks.get(id) {
            return Ok(served.clone());
        }
        let how = Opening::OFFLINE;
        let layers = crate::manager::open_layers(&self.store, id, how, false);
        let chain = layers
            .and_then(|layers| Chain::new(id, false, WriteErrors::Report, layers))
            .context(|| format!("disk {id}"))?;
        Ok(Served { chain: Arc::new(chain), how, max_overlays: None })
    }
}

/// Who reads which snapshot, so that none is changed under its reader.
#[derive(Clone, Debug, Default)]
pub(crate) struct Readers(Arc<Mutex<BTreeMap<String, Holders>>>);

/// Who has a snapshot.
#[derive(Debug)]
enum Holders {
    /// These read it, as clients are told of them. Not empty.
    Readers(Vec<String>),
    /// Nobody reads it, nor may.
    Closed,
}

/// One who reads a snapshot, as long as this lives; or one who keeps others from it.
#[derive(Debug)]
pub(crate) struct Reading {
    readers: Readers,
    snapshot: String,
    /// `None` for one who keeps others from it.
    who: Option<String>,
}

impl Readers {
    fn holders(&self) -> MutexGuard<'_, BTreeMap<String, Holders>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a reader, by words that go on "is being read by". It then looks whether the snapshot is there.
    pub(crate) fn enter(&self, snapshot: &str, who: &str) -> Result<Reading> {
        let mut holders = self.holders();
        let held = holders.entry(snapshot.to_owned()).or_insert_with(|| Holders::Readers(Vec::new()));
        match held {
            Holders::Closed => {
                let story = format!("snapshot '{snapshot}' is just being deleted");
                return Err(Error::new(ErrorKind::Busy, story));
            }
            Holders::Readers(readers) => readers.push(who.to_owned()),
        }
        Ok(Reading { readers: self.clone(), snapshot: snapshot.to_owned(), who: Some(who.to_owned()) })
    }

    /// Whether somebody reads this snapshot just now.
    pub(crate) fn is_read(&self, snapshot: &str) -> bool {
        self.holders().contains_key(snapshot)
    }

    /// Refuses, with who it is, if somebody reads this snapshot.
    pub(crate) fn check_unread(&self, snapshot: &str) -> Result<()> {
        check_unread(&self.holders(), snapshot)
    }

    /// Waits until nobody reads a snapshot, and says whether that came to be in time.
    pub(crate) fn wait_for_none(&self, deadline: Instant) -> bool {
        while !self.holders().is_empty() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    /// Keeps readers away, for as long as what this returns lives. Refuses if there is one.
    pub(crate) fn close(&self, snapshot: &str) -> Result<Reading> {
        let mut holders = self.holders();
        check_unread(&holders, snapshot)?;
        holders.insert(snapshot.to_owned(), Holders::Closed);
        Ok(Reading { readers: self.clone(), snapshot: snapshot.to_owned(), who: None })
    }
}

fn check_unread(holders: &BTreeMap<String, Holders>, snapshot: &str) -> Result<()> {
    let story = match holders.get(snapshot) {
        None => return Ok(()),
        Some(Holders::Closed) => format!("snapshot '{snapshot}' is just being deleted"),
        Some(Holders::Readers(readers)) => {
            format!("snapshot '{snapshot}' is being read by {}: try again after it", readers.join(", "))
        }
    };
    Err(Error::new(ErrorKind::Busy, story))
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut holders = self.readers.holders();
        if let (Some(who), Some(Holders::Readers(readers))) = (&self.who, holders.get_mut(&self.snapshot)) {
            let place = readers.iter().position(|reader| reader == who);
            place.map(|place| readers.swap_remove(place));
            if !readers.is_empty() {
                return;
            }
        }
        holders.remove(&self.snapshot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_that_is_read_is_not_closed_and_one_that_is_closed_is_not_read() {
        let readers = Readers::default();
        let (first, second) = (readers.enter("a", "x").unwrap(), readers.enter("a", "y").unwrap());
        drop(first);
        assert!(readers.is_read("a") && !readers.is_read("b"));
        let refused = readers.close("a").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.to_string().contains("read by y:"), "{refused}");
        readers.close("b").unwrap();
        drop(second);
        let closed = readers.close("a").unwrap();
        assert_eq!(readers.enter("a", "z").unwrap_err().kind(), ErrorKind::Busy);
        assert!(readers.close("a").is_err());
        drop(closed);
        readers.enter("a", "z").unwrap();
    }
}
