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
pub(crate) struct Readers(Arc<Mutex<BTreeMap<String, usize>>>);

/// One who reads a snapshot, as long as this lives; or one who keeps others from it.
#[derive(Debug)]
pub(crate) struct Reading {
    readers: Readers,
    snapshot: String,
}

/// So many readers: nobody may become one.
const CLOSED: usize = usize::MAX;

impl Readers {
    fn counts(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a reader. It then looks whether the snapshot is there.
    pub(crate) fn enter(&self, snapshot: &str) -> Result<Reading> {
        let mut counts = self.counts();
        let count = counts.entry(snapshot.to_owned()).or_default();
        if *count == CLOSED {
            let story = format!("snapshot '{snapshot}' is just being deleted");
            return Err(Error::new(ErrorKind::Busy, story));
        }
        *count += 1;
        Ok(Reading { readers: self.clone(), snapshot: snapshot.to_owned() })
    }

    /// Whether somebody reads this snapshot just now.
    pub(crate) fn is_read(&self, snapshot: &str) -> bool {
        self.counts().contains_key(snapshot)
    }

    /// Waits until nobody reads a snapshot, and says whether that came to be in time.
    pub(crate) fn wait_for_none(&self, deadline: Instant) -> bool {
        while !self.counts().is_empty() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    /// Keeps readers away, for as long as what this returns lives. Refuses if there is one.
    pub(crate) fn close(&self, snapshot: &str) -> Result<Reading> {
        let mut counts = self.counts();
        if counts.contains_key(snapshot) {
            let story =
                format!("snapshot '{snapshot}' is being read (an export or a probe): try again after it");
            return Err(Error::new(ErrorKind::Busy, story));
        }
        counts.insert(snapshot.to_owned(), CLOSED);
        Ok(Reading { readers: self.clone(), snapshot: snapshot.to_owned() })
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut counts = self.readers.counts();
        match counts.get_mut(&self.snapshot) {
            Some(count) if *count > 1 && *count != CLOSED => *count -= 1,
            _ => drop(counts.remove(&self.snapshot)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_that_is_read_is_not_closed_and_one_that_is_closed_is_not_read() {
        let readers = Readers::default();
        let (first, second) = (readers.enter("a").unwrap(), readers.enter("a").unwrap());
        drop(first);
        assert!(readers.is_read("a") && !readers.is_read("b"));
        assert_eq!(readers.close("a").unwrap_err().kind(), ErrorKind::Busy);
        readers.close("b").unwrap();
        drop(second);
        let closed = readers.close("a").unwrap();
        assert_eq!(readers.enter("a").unwrap_err().kind(), ErrorKind::Busy);
        assert!(readers.close("a").is_err());
        drop(closed);
        readers.enter("a").unwrap();
    }
}
