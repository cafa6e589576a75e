//! The manager: all that a client can ask of the snapshots of one daemon.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use block::{Context, Disk, Error, ErrorKind, Result, WriteErrors};
use hostio::Cache;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::backing::AllowedFolders;
use crate::chain::Chain;
use crate::cut::{
    Collector, Cut, CutPlan, CutPorts, Events, Freezer, GateGroup, Guest, Held, Limits, SystemClock,
};
use crate::debts::DebtFile;
use crate::edit;
use crate::events::Bus;
use crate::export::{self, Progress};
use crate::group::{Group, Served, seal};
use crate::housekeeping::{Duties, Housekeeping, growth_folders};
use crate::jobs::{Jobs, Readers, World};
use crate::layer::{Layer, Opening};
use crate::model::{
    CreateRequest, DiskStatus, Event, FreezeOwner, FreezePolicy, ImageFormat, SnapshotDisk, SnapshotRecord,
};
use crate::probe::{self, FsVerdict};
use crate::request;
use crate::store::Store;

/// The *thaw owed* record in the state directory.
const THAW_OWED: &str = "thaw-owed.json";

/// How long maintenance waits for requests in flight; no front-end is connected then, so there are hardly any.
const MAINTENANCE_DRAIN: Duration = Duration::from_secs(5);

/// The longest lease of a prepared snapshot: the guest's disks stand still as long.
pub const MAX_LEASE: Duration = Duration::from_secs(30);

/// A disk to serve.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Its id, unique in the daemon.
    pub id: String,
    /// The base image or block device.
    pub path: PathBuf,
    /// The base's format; never probed.
    pub format: ImageFormat,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// The way of its data I/O.
    pub cache: Cache,
    /// Bytes of memory for what is known of where its bytes are: a share for the active image's tables, one for the
    /// layers beneath.
    pub metadata_cache: u64,
    /// What becomes of changes that the host can not carry out.
    pub write_errors: WriteErrors,
    /// With more overlays than this, the oldest snapshots are deleted; `None` for no limit.
    pub max_overlays: Option<u32>,
}

impl DiskConfig {
    fn opening(&self) -> Opening {
        Opening { cache: self.cache, metadata_cache: self.metadata_cache }
    }
}

/// Who freezes the guest, and what is done if nobody says otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub struct FreezeDefaults {
    /// Who freezes.
    pub owner: FreezeOwner,
    /// The policy of a request that names none.
    pub policy: FreezePolicy,
}

/// A daemon's disks and their snapshots; without its chains ([`Manager::open_offline`]), a state directory's.
///
/// One cut, delete or revert runs at a time; the next one is refused, so that no client waits for another's guest.
/// Queries and exports never wait for a cut.
pub struct Manager {
    pub(crate) store: Arc<Store>,
    pub(crate) disks: BTreeMap<String, Served>,
    defaults: FreezeDefaults,
    freezer: Option<Arc<Freezer>>,
    bus: Arc<Bus>,
    held: Arc<Mutex<Option<Prepared>>>,
    /// Held by whoever changes a chain or its manifest; true once no more changes are taken.
    change: Arc<Mutex<bool>>,
    /// Held, after `change`, by whoever is changing one right now: see [`World`].
    chains: Arc<Mutex<()>>,
    /// Held, after `chains`, by whoever closes images, and by housekeeping while it flushes them.
    images: Arc<Mutex<()>>,
    readers: Readers,
    pub(crate) jobs: Arc<Jobs>,
    housekeeping: Option<Housekeeping>,
    _collector: Option<Collector>,
}

/// The right to change chains.
struct Change<'a> {
    _chains: MutexGuard<'a, ()>,
    _turn: MutexGuard<'a, bool>,
}

/// A snapshot between *prepare* and *release*.
pub(crate) struct Prepared {
    pub(crate) name: String,
    pub(crate) held: Held,
    pub(crate) until: Instant,
}

/// What the probe finds on one disk of a snapshot.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskProbe {
    /// The disk's id.
    pub id: String,
    /// One entry for each partition, or one for the bare disk.
    pub volumes: Vec<FsVerdict>,
}

impl Manager {
    /// Opens the state directory and the disks' chains, to serve them. `guest` is the way to the agent, if there is
    /// one; a thaw that an earlier run owed is tried at once. Base images may name files in `folders`.
    pub fn open(
        state: &Path,
        disks: &[DiskConfig],
        folders: AllowedFolders,
        defaults: FreezeDefaults,
        guest: Option<Box<dyn Guest>>,
    ) -> Result<Self> {
        let store = Arc::new(Store::open(state, folders)?);
        let mut served = BTreeMap::new();
        for disk in disks {
            let chain = Arc::new(open_chain(&store, disk)?);
            let max_overlays = disk.max_overlays;
            served.insert(disk.id.clone(), Served { chain, how: disk.opening(), max_overlays });
        }
        let mut manager = Self::assemble(store, served, defaults, guest)?;
        // Opening the chains has synced them; those that this run does not serve are when they are opened.
        // That a full disk keeps this from being remembered is no reason to keep a guest from its disks.
        if let Err(error) = manager.mark_sealed() {
            warn!(%error, "the layers' seals can not be recorded");
        }
        let duties = Duties {
            store: Arc::clone(&manager.store),
            change: Arc::clone(&manager.change),
            chains: Arc::clone(&manager.chains),
            images: Arc::clone(&manager.images),
            disks: manager.disks.values().cloned().collect(),
            held: Arc::clone(&manager.held),
            bus: Arc::clone(&manager.bus),
            jobs: Arc::clone(&manager.jobs),
        };
        manager.jobs.resume();
        manager.housekeeping = Some(Housekeeping::start(duties)?);
        Ok(manager)
    }

    /// Opens a state directory that no daemon uses: for all but taking snapshots.
    pub fn open_offline(state: &Path, folders: AllowedFolders) -> Result<Self> {
        if !state.join("manifest.json").exists() {
            let story = format!("{} is not a state directory: it has no manifest.json", state.display());
            return Err(Error::new(ErrorKind::NotFound, story));
        }
        let store = Arc::new(Store::open(state, folders)?);
        Self::assemble(store, BTreeMap::new(), FreezeDefaults::default(), None)
    }

    fn assemble(
        store: Arc<Store>,
        disks: BTreeMap<String, Served>,
        defaults: FreezeDefaults,
        guest: Option<Box<dyn Guest>>,
    ) -> Result<Self> {
        let bus = Arc::new(Bus::default());
        if guest.is_none() && store.file(THAW_OWED).exists() {
            warn!(
                "a guest may be frozen since an earlier run, and there is no agent to thaw it: give --agent"
            );
        }
        let freezer = guest.map(|guest| {
            let debts = Box::new(DebtFile(store.file(THAW_OWED)));
            Freezer::new(guest, debts, Arc::new(SystemClock), Arc::clone(&bus) as _, Limits::default())
        });
        let collector = freezer.clone().map(Collector::start).transpose()?;
        let world = World {
            store: Arc::clone(&store),
            disks: disks.clone(),
            bus: Arc::clone(&bus),
            chains: Arc::default(),
            held: Arc::default(),
            readers: Readers::default(),
        };
        Ok(Self {
            store,
            disks,
            defaults,
            freezer,
            bus,
            held: Arc::clone(&world.held),
            change: Arc::default(),
            chains: Arc::clone(&world.chains),
            images: Arc::default(),
            readers: world.readers.clone(),
            jobs: Arc::new(Jobs::new(world)),
            housekeeping: None,
            _collector: collector,
        })
    }

    /// The chain of a disk that is served, for the device.
    pub fn chain(&self, id: &str) -> Result<&Arc<Chain>> {
        let story = || Error::new(ErrorKind::NotFound, format!("disk '{id}' is not served"));
        self.disks.get(id).map(|disk| &disk.chain).ok_or_else(story)
    }

    /// All events from now on. A listener that lets 1024 wait misses some.
    pub fn subscribe(&self) -> Receiver<Event> {
        self.bus.subscribe()
    }

    /// Sends what the device has to tell to all who listen.
    pub fn tell(&self, event: Event) {
        self.bus.emit(event);
    }

    /// Makes a disk larger, by zeroes, while it is served; durable when it returns. `size` is in bytes, made of whole
    /// sectors, and not less than it is. A disk on a block device can be as large as that is now.
    pub fn resize(&self, id: &str, size: u64) -> Result<()> {
        let chain = self.chain(id)?;
        let refuse = |kind, story: &str| Err(Error::new(kind, format!("disk {id} {story}")));
        let _change = self.begin()?;
        if chain.read_only() {
            return refuse(ErrorKind::ReadOnly, "is read-only");
        }
        if !size.is_multiple_of(block::SECTOR) || size > i64::MAX as u64 {
            return refuse(ErrorKind::InvalidInput, "has a size that is a multiple of 512 bytes");
        }
        match size.cmp(&chain.capacity()) {
            Ordering::Less => {
                refuse(ErrorKind::InvalidInput, "can not shrink: what is cut off would be lost")
            }
            Ordering::Equal => Ok(()),
            Ordering::Greater => chain.grow(size).context(|| format!("resize disk {id}")),
        }
    }

    /// Has all requests tried again that wait for the host.
    pub fn resume(&self) {
        self.disks.values().for_each(|disk| disk.chain.parking().resume());
    }

    /// Takes a snapshot; returns once it is sealed.
    pub fn create(&self, request: CreateRequest) -> Result<SnapshotRecord> {
        let _change = self.begin()?;
        let (cut, group) = self.plan(request)?;
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
        let (cut, group) = self.plan(request)?;
        let held = cut.prepare(Box::new(group))?;
        *self.held() = Some(Prepared { name, held, until: Instant::now() + lease });
        Ok(())
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

    /// All snapshots, the oldest first.
    pub fn list(&self) -> Vec<SnapshotRecord> {
        self.store.manifest().snapshots.clone()
    }

    /// One snapshot.
    pub fn show(&self, name: &str) -> Result<SnapshotRecord> {
        self.store.manifest().snapshot(name).cloned()
    }

    /// Reads the file systems' super-blocks in a snapshot.
    pub fn probe(&self, name: &str) -> Result<Vec<DiskProbe>> {
        let _reading = self.readers.enter(name)?;
        let disks = self.show(name)?.disks;
        let probe = |disk: SnapshotDisk| {
            let volumes = probe::probe(&*self.snapshot_disk(name, &disk.id)?)?;
            Ok(DiskProbe { id: disk.id, volumes })
        };
        disks.into_iter().map(probe).collect()
    }

    /// Writes one disk of a snapshot to the new file `out`.
    pub fn export(
        &self,
        name: &str,
        disk: &str,
        out: &Path,
        format: ImageFormat,
        progress: Progress<'_>,
    ) -> Result<()> {
        let _reading = self.readers.enter(name)?;
        export::export(&*self.snapshot_disk(name, disk)?, out, format, progress)
    }

    /// Brings the disks of a snapshot back to it. Refused while a front-end is connected, and if newer snapshots would
    /// be lost, unless `discard_newer` is set.
    pub fn revert(&self, name: &str, discard_newer: bool) -> Result<()> {
        self.maintain(name, |store| edit::revert(store, name, discard_newer))
    }

    /// The disks that are served.
    pub fn disks(&self) -> Vec<DiskStatus> {
        self.disks.values().map(|disk| disk.chain.status(disk.how.cache)).collect()
    }

    /// The snapshot that is prepared and waits for its release.
    pub fn prepared(&self) -> Option<String> {
        self.held().as_ref().map(|prepared| prepared.name.clone())
    }

    /// Whether a guest may be frozen that has not confirmed its thaw. Never waits, unlike the guest may.
    pub fn thaw_owed(&self) -> bool {
        self.store.file(THAW_OWED).exists()
    }

    /// Bytes left where there are fewest, for the layers and the journals to grow.
    pub fn free_space(&self) -> Result<u64> {
        let folders = growth_folders(&self.store, self.disks.values());
        let free = folders.iter().map(|folder| hostio::free_space(folder));
        free.reduce(|least, free| Ok(least?.min(free?))).unwrap_or(Ok(0))
    }

    /// The first half of the daemon's end: takes no more changes, waits for the one under way, and undoes what is
    /// prepared. The disks are still being served, for a guest can hardly thaw without them. An error says what could
    /// not be undone.
    pub fn end_changes(&self) -> Result<()> {
        let mut change = self.lock_change();
        *change = true;
        let chains = self.lock_chains();
        let ended = match self.held().take() {
            Some(prepared) => prepared.held.abort("the daemon ends"),
            None => Ok(()),
        };
        drop(chains);
        self.jobs.stop();
        ended
    }

    /// The second half: brings all that was acknowledged onto stable storage. No front-end is served any more. A disk
    /// that fails does not keep the others from it; the first failure is told.
    pub fn shut_down(&self) -> Result<()> {
        let ended = self.end_changes();
        let writable = self.disks.values().filter(|disk| !disk.chain.read_only());
        let flushed = writable.map(|disk| disk.chain.close()).fold(Ok(()), Result::and);
        flushed.and(self.finish_seals(self.disks.values())).and(ended)
    }

    /// Does the seals that failed: no cut, and no end, may go on as if those layers were on stable storage.
    fn finish_seals<'a>(&self, disks: impl Iterator<Item = &'a Served>) -> Result<()> {
        let finish = |disk: &Served| {
            let story = || format!("the last snapshot of disk {} is not on stable storage", disk.chain.id());
            seal(&self.store, &disk.chain).context(story)
        };
        disks.map(finish).fold(Ok(()), Result::and).and(self.mark_sealed())
    }

    /// Remembers that all layers beneath the active ones, or beneath those being sealed, are on stable storage.
    fn mark_sealed(&self) -> Result<()> {
        let unsealed = |chain: &Chain| chain.sealing().or_else(|| chain.top().filter(|_| !chain.read_only()));
        let open = self.disks.iter().filter(|(_, disk)| !disk.chain.layers().is_empty());
        let disks =
            open.map(|(id, disk)| (id.as_str(), unsealed(&disk.chain).map(|layer| layer.entry.number)));
        for name in self.store.mark_sealed(disks)? {
            self.bus.emit(Event::Sealed { name });
        }
        Ok(())
    }

    /// The right to change chains. Refused while a snapshot is prepared or another change is under way: a client shall
    /// not wait for another one's guest.
    fn begin(&self) -> Result<Change<'_>> {
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

    fn lock_chains(&self) -> MutexGuard<'_, ()> {
        self.chains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_change(&self) -> MutexGuard<'_, bool> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, Option<Prepared>> {
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

    /// The cut that a request asks for, and the layers of its disks.
    fn plan(&self, request: CreateRequest) -> Result<(Cut, Group)> {
        request::check_name(&request.name)?;
        if self.store.manifest().snapshot(&request.name).is_ok() {
            let story = format!("there is a snapshot '{}' already: choose another name", request.name);
            return Err(Error::new(ErrorKind::Busy, story));
        }
        let disks = request::choose(&self.disks, request.disks.as_deref())?;
        self.finish_seals(disks.iter())?;
        let plan = CutPlan {
            name: request.name.clone(),
            policy: request.freeze.unwrap_or(self.defaults.policy),
            owner: self.defaults.owner,
            limits: Limits::default(),
        };
        let ports = CutPorts {
            gates: Box::new(GateGroup::new(disks.iter().map(|disk| Arc::clone(disk.chain.gate())).collect())),
            freezer: self.freezer.clone(),
            clock: Arc::new(SystemClock),
            events: Arc::clone(&self.bus) as _,
        };
        Ok((Cut::new(plan, ports), Group { store: Arc::clone(&self.store), name: Some(request.name), disks }))
    }

    fn snapshot_disk(&self, name: &str, id: &str) -> Result<Arc<dyn Disk>> {
        // By its path: a job may be about to take layers out of the chain, and then this one's content is in another one.
        let held = {
            let manifest = self.store.manifest();
            let index = manifest.intact(name).and_then(|_| manifest.layer_of(name, id))?;
            let layers = &manifest.disk(id)?.layers;
            layers.get(index).map(|layer| (index, layer.number))
        };
        let maintained = || Error::new(ErrorKind::Busy, format!("disk {id} is being maintained"));
        let (index, number) = held.ok_or_else(maintained)?;
        let layer = match self.disks.get(id) {
            Some(disk) => disk.chain.layers().iter().find(|layer| layer.entry.number == number).cloned(),
            None => self.store.open_layers(id, index + 1, Opening::OFFLINE, None)?.pop(),
        };
        Ok(Arc::new(layer.ok_or_else(maintained)?.view()))
    }

    /// Runs `work` on the state directory with the images of a snapshot's disks closed.
    fn maintain(&self, name: &str, work: impl FnOnce(&Store) -> Result<()>) -> Result<()> {
        let ids = self.show(name)?.disks.into_iter().map(|disk| disk.id).collect();
        self.jobs.make_way(&ids)?;
        let _change = self.begin()?;
        self.jobs.refuse_busy(&ids)?;
        let _images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let disks: Vec<_> = ids.iter().filter_map(|id| self.disks.get(id)).collect();
        // A front-end that connects from here on waits at the gates.
        let closed: Vec<_> = disks.iter().map(|disk| disk.chain.gate().close()).collect();
        if let Some(disk) = disks.iter().find(|disk| disk.chain.is_connected()) {
            let story = format!("a guest is connected to disk {}: shut it down first", disk.chain.id());
            return Err(Error::new(ErrorKind::Busy, story));
        }
        closed.iter().try_for_each(|closed| closed.drain(Instant::now() + MAINTENANCE_DRAIN))?;
        disks.iter().try_for_each(|disk| disk.chain.flush().run())?;
        // From here on they have to be opened again, whatever happens.
        let closed = disks.iter().try_for_each(|disk| disk.chain.close());
        disks.iter().for_each(|disk| disk.chain.detach());
        let worked = closed.and_then(|()| work(&self.store));
        let attach = |disk: &&Served| {
            let story = || format!("disk {} stays closed: restart the daemon", disk.chain.id());
            let layers = open_layers(&self.store, disk.chain.id(), disk.how, disk.chain.read_only());
            layers.and_then(|layers| disk.chain.attach(layers)).context(story)
        };
        disks.iter().map(attach).fold(Ok(()), Result::and).and(worked)
    }
}

/// Opens a disk's chain, which is made if the disk is new.
fn open_chain(store: &Store, disk: &DiskConfig) -> Result<Chain> {
    let what = || format!("disk {}", disk.id);
    store.declare(&disk.id, &disk.path, disk.format, disk.opening(), disk.read_only).context(what)?;
    let layers = open_layers(store, &disk.id, disk.opening(), disk.read_only).context(what)?;
    Chain::new(&disk.id, disk.read_only, disk.write_errors, layers)
}

/// Opens a disk's layers as the manifest has them, the last one for writing unless the disk is read-only.
pub(crate) fn open_layers(store: &Store, id: &str, how: Opening, read_only: bool) -> Result<Vec<Arc<Layer>>> {
    let count = store.manifest().disk(id)?.layers.len();
    store.open_layers(id, count, how, (!read_only).then_some(count - 1))
}
