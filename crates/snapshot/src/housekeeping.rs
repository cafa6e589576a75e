//! What must be done now and then, by one thread: end leases, write tables out, watch the room, begin the merging that
//! nobody asks for.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use block::{Disk, Result};
use tracing::{error, info, warn};

use crate::cut::Events;
use crate::events::Bus;
use crate::group::Served;
use crate::jobs::Jobs;
use crate::layer::MAX_PENDING;
use crate::manager::Prepared;
use crate::model::Event;
use crate::store::Store;

/// How often it looks. It is also how late a lease may end.
const PERIOD: Duration = Duration::from_millis(100);

/// How many looks apart the slower duties are: every second, and every five.
const SECOND: u64 = 10;

/// Less room than this where layers grow is told.
const LOW_SPACE: u64 = 1 << 30;

/// The thread; it ends when this is dropped.
pub(crate) struct Housekeeping {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What it looks after.
pub(crate) struct Duties {
    pub(crate) store: Arc<Store>,
    pub(crate) disks: Vec<Served>,
    /// See [`Manager`](crate::Manager): held while a chain or its manifest is changed.
    pub(crate) change: Arc<Mutex<bool>>,
    /// See [`World`](crate::jobs::World).
    pub(crate) chains: Arc<Mutex<()>>,
    /// See [`Manager`](crate::Manager): held while images may be closed. Not `change`: a snapshot that is asked for
    /// while tables are written out is not refused.
    pub(crate) images: Arc<Mutex<()>>,
    pub(crate) held: Arc<Mutex<Option<Prepared>>>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) jobs: Arc<Jobs>,
}

impl Housekeeping {
    pub(crate) fn start(duties: Duties) -> Result<Self> {
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new().name("housekeeping".to_owned()).spawn(move || {
            let mut low = BTreeSet::new();
            let mut round = 0_u64;
            while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                duties.end_lease();
                if round.is_multiple_of(SECOND) {
                    duties.write_tables_out();
                    duties.jobs.tidy();
                }
                if round.is_multiple_of(5 * SECOND) {
                    duties.watch_space(&mut low);
                }
                round += 1;
            }
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Housekeeping {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            error!("the housekeeping thread had panicked");
        }
    }
}

/// Where room is needed: for the layers of each disk, and for the journals.
pub(crate) fn growth_folders<'a>(
    store: &Store,
    disks: impl Iterator<Item = &'a Served>,
) -> BTreeSet<PathBuf> {
    let mut folders = BTreeSet::from([store.file("")]);
    folders
        .extend(disks.filter_map(|disk| disk.chain.layers().first().map(|base| store.growth_folder(base))));
    folders
}

impl Duties {
    /// Undoes a prepared snapshot that nobody has released in time.
    fn end_lease(&self) {
        let is_over = |prepared: &mut Prepared| prepared.until <= Instant::now();
        if !self.held().as_mut().is_some_and(is_over) {
            return;
        }
        // As any other undo; whoever has this lock is about to release or abort the same.
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let _chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = self.held().take_if(is_over);
        if let Some(prepared) = ended {
            info!(snapshot = prepared.name, "the lease of a prepared snapshot has ended: it is undone");
            if let Err(error) = prepared.held.abort("its lease has ended") {
                warn!(%error, "a prepared snapshot could not be undone wholly");
            }
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Prepared>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_tables_out(&self) {
        // A chain whose images are being closed must not be held open by a flush; the next time will do.
        let images = self.images.try_lock();
        if matches!(images, Err(TryLockError::WouldBlock)) {
            return;
        }
        for Served { chain, .. } in &self.disks {
            let pending = chain.top().map_or(0, |top| top.pending());
            if pending > MAX_PENDING
                && let Err(error) = chain.flush().run()
            {
                error!(disk = chain.id(), %error, "the image's tables could not be written out");
            }
        }
    }

    /// Tells, once, of each folder whose room has become low.
    fn watch_space(&self, low: &mut BTreeSet<PathBuf>) {
        for path in growth_folders(&self.store, self.disks.iter()) {
            let free = match hostio::free_space(&path) {
                Ok(free) => free,
                Err(error) => {
                    warn!(%error, "the free space is not known");
                    continue;
                }
            };
            if free >= LOW_SPACE {
                low.remove(&path);
            } else if low.insert(path.clone()) {
                warn!(path = %path.display(), free, "little room is left for the layers");
                self.bus.emit(Event::SpaceLow { path, free });
            }
        }
    }
}
