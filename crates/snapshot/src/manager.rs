//! The manager: all that a client can ask of the snapshots of one daemon.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::{Context, Disk, Error, ErrorKind, Result};
use hostio::Cache;
use serde::{Deserialize, Serialize};

use crate::chain::Chain;
use crate::cut::{Collector, Cut, CutPlan, CutPorts, Freezer, GateGroup, Guest, Held, Limits, SystemClock};
use crate::debts::DebtFile;
use crate::edit;
use crate::events::Bus;
use crate::export::{self, Progress};
use crate::group::{Group, Served};
use crate::housekeeping::{Duties, Housekeeping};
use crate::model::{
    CreateRequest, DiskStatus, Event, FreezeOwner, FreezePolicy, ImageFormat, SnapshotDisk, SnapshotRecord,
};
use crate::probe::{self, FsVerdict};
use crate::store::Store;

/// The *thaw owed* record in the state directory.
const THAW_OWED: &str = "thaw-owed.json";

/// How long maintenance waits for requests in flight; no front-end is connected then, so there are hardly any.
const MAINTENANCE_DRAIN: Duration = Duration::from_secs(5);

/// The longest lease of a prepared snapshot: the guest's disks stand still as long.
const MAX_LEASE: Duration = Duration::from_secs(30);

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
    store: Arc<Store>,
    disks: BTreeMap<String, Served>,
    defaults: FreezeDefaults,
    freezer: Option<Arc<Freezer>>,
    bus: Arc<Bus>,
    held: Arc<Mutex<Option<Prepared>>>,
    /// Held by whoever changes a chain.
    change: Mutex<()>,
    housekeeping: Option<Housekeeping>,
    _collector: Option<Collector>,
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
    /// one; a thaw that an earlier run owed is tried at once.
    pub fn open(
        state: &Path,
        disks: &[DiskConfig],
        defaults: FreezeDefaults,
        guest: Option<Box<dyn Guest>>,
    ) -> Result<Self> {
        let store = Arc::new(Store::open(state)?);
        let mut served = BTreeMap::new();
        for disk in disks {
            let chain = Arc::new(open_chain(&store, disk)?);
            served.insert(disk.id.clone(), Served { chain, cache: disk.cache });
        }
        let mut manager = Self::assemble(store, served, defaults, guest)?;
        // Chains that this run does not serve are recovered when they are opened.
        if manager.store.manifest().disks.keys().all(|id| manager.disks.contains_key(id)) {
            manager.store.all_sealed()?;
        }
        let duties = Duties {
            disks: manager.disks.values().cloned().collect(),
            held: Arc::clone(&manager.held),
            bus: Arc::clone(&manager.bus),
        };
        manager.housekeeping = Some(Housekeeping::start(duties)?);
        Ok(manager)
    }

    /// Opens a state directory that no daemon uses: for all but taking snapshots.
    pub fn open_offline(state: &Path) -> Result<Self> {
        if !state.join("manifest.json").exists() {
            let story = format!("{} is not a state directory: it has no manifest.json", state.display());
            return Err(Error::new(ErrorKind::NotFound, story));
        }
        Self::assemble(Arc::new(Store::open(state)?), BTreeMap::new(), FreezeDefaults::default(), None)
    }

    fn assemble(
        store: Arc<Store>,
        disks: BTreeMap<String, Served>,
        defaults: FreezeDefaults,
        guest: Option<Box<dyn Guest>>,
    ) -> Result<Self> {
        let bus = Arc::new(Bus::default());
        let freezer = guest.map(|guest| {
            let debts = Box::new(DebtFile(store.file(THAW_OWED)));
            Freezer::new(guest, debts, Arc::new(SystemClock), Arc::clone(&bus) as _, Limits::default())
        });
        let collector = freezer.clone().map(Collector::start).transpose()?;
        Ok(Self {
            store,
            disks,
            defaults,
            freezer,
            bus,
            held: Arc::default(),
            change: Mutex::default(),
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
        let _change = self.lock_change();
        self.take_prepared(name)?.held.release()
    }

    /// Undoes a prepared snapshot.
    pub fn abort(&self, name: &str) -> Result<()> {
        let _change = self.lock_change();
        self.take_prepared(name)?.held.abort("it was aborted")
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
        let what = || format!("export disk {disk} of snapshot '{name}'");
        export::export(&*self.snapshot_disk(name, disk)?, out, format, progress).context(what)
    }

    /// Forgets a snapshot, the newest of its disks, and merges what was written since into the image that held it.
    /// Refused while a front-end is connected.
    pub fn delete(&self, name: &str) -> Result<()> {
        self.maintain(name, |store| edit::delete(store, name))
    }

    /// Brings the disks of a snapshot back to it. Refused while a front-end is connected, and if newer snapshots would
    /// be lost, unless `discard_newer` is set.
    pub fn revert(&self, name: &str, discard_newer: bool) -> Result<()> {
        self.maintain(name, |store| edit::revert(store, name, discard_newer))
    }

    /// The disks that are served.
    pub fn disks(&self) -> Vec<DiskStatus> {
        self.disks.values().map(|disk| disk.chain.status()).collect()
    }

    /// The snapshot that is prepared and waits for its release.
    pub fn prepared(&self) -> Option<String> {
        self.held().as_ref().map(|prepared| prepared.name.clone())
    }

    /// Whether a guest may be frozen that has not confirmed its thaw. Never waits, unlike the guest may.
    pub fn thaw_owed(&self) -> bool {
        self.store.file(THAW_OWED).exists()
    }

    /// Bytes left where there are fewest for the layers to grow.
    pub fn free_space(&self) -> Result<u64> {
        let tops = self.disks.values().filter_map(|disk| disk.chain.top());
        let mut least = hostio::free_space(&self.store.file(""))?;
        for top in tops {
            least = least.min(hostio::free_space(&top.entry.path)?);
        }
        Ok(least)
    }

    /// The end of the daemon: undoes what is prepared, and brings all that was acknowledged onto stable storage. No
    /// front-end is served any more.
    pub fn shut_down(&self) -> Result<()> {
        let _change = self.lock_change();
        if let Some(prepared) = self.held().take() {
            prepared.held.abort("the daemon ends")?;
        }
        self.disks.values().try_for_each(|disk| match disk.chain.read_only() {
            true => Ok(()),
            false => disk.chain.flush().run(),
        })
    }

    /// Refuses a change while a snapshot is prepared; waits for one that is under way, which is bounded.
    fn begin(&self) -> Result<MutexGuard<'_, ()>> {
        let change = self.lock_change();
        match &*self.held() {
            None => Ok(change),
            Some(prepared) => {
                let story = format!("snapshot '{}' is prepared: release or abort it first", prepared.name);
                Err(Error::new(ErrorKind::Busy, story))
            }
        }
    }

    fn lock_change(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, Option<Prepared>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_prepared(&self, name: &str) -> Result<Prepared> {
        self.held().take_if(|prepared| prepared.name == name).ok_or_else(|| {
            let story = format!("no snapshot '{name}' is prepared (its lease may have ended)");
            Error::new(ErrorKind::NotFound, story)
        })
    }

    /// The cut that a request asks for, and the layers of its disks.
    fn plan(&self, request: CreateRequest) -> Result<(Cut, Group)> {
        check_name(&request.name)?;
        if self.store.manifest().snapshot(&request.name).is_ok() {
            let story = format!("there is a snapshot '{}' already: choose another name", request.name);
            return Err(Error::new(ErrorKind::Busy, story));
        }
        let disks = self.choose(request.disks.as_deref())?;
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
        Ok((Cut::new(plan, ports), Group { store: Arc::clone(&self.store), name: request.name, disks }))
    }

    /// The disks of a request: those named, or all that can change.
    fn choose(&self, wanted: Option<&[String]>) -> Result<Vec<Served>> {
        let refuse = |kind, story: String| Err(Error::new(kind, story));
        let Some(wanted) = wanted else {
            let all: Vec<_> = self.disks.values().filter(|disk| !disk.chain.read_only()).cloned().collect();
            return match all.is_empty() {
                true => refuse(ErrorKind::InvalidInput, "no writable disk is served".to_owned()),
                false => Ok(all),
            };
        };
        let mut chosen = BTreeMap::new();
        for id in wanted {
            let Some(disk) = self.disks.get(id) else {
                let known: Vec<_> = self.disks.keys().map(String::as_str).collect();
                return refuse(
                    ErrorKind::NotFound,
                    format!("there is no disk '{id}', only {}", known.join(", ")),
                );
            };
            if disk.chain.read_only() {
                return refuse(
                    ErrorKind::ReadOnly,
                    format!("disk '{id}' is read-only: it has one state for ever"),
                );
            }
            if chosen.insert(id, disk.clone()).is_some() {
                return refuse(ErrorKind::InvalidInput, format!("disk '{id}' is named twice"));
            }
        }
        match chosen.is_empty() {
            true => refuse(ErrorKind::InvalidInput, "the list of disks is empty".to_owned()),
            false => Ok(chosen.into_values().collect()),
        }
    }

    fn snapshot_disk(&self, name: &str, id: &str) -> Result<Arc<dyn Disk>> {
        let index = self.store.manifest().layer_of(name, id)?;
        let open = match self.disks.get(id) {
            Some(disk) => disk.chain.layers().get(index).cloned(),
            None => self.store.open_layers(id, index + 1, Cache::Writeback, None)?.pop(),
        };
        let layer =
            open.ok_or_else(|| Error::new(ErrorKind::Busy, format!("disk {id} is being maintained")))?;
        Ok(layer.disk())
    }

    /// Runs `work` on the state directory with the images of a snapshot's disks closed.
    fn maintain(&self, name: &str, work: impl FnOnce(&Store) -> Result<()>) -> Result<()> {
        let _change = self.begin()?;
        let ids: Vec<_> = self.show(name)?.disks.into_iter().map(|disk| disk.id).collect();
        let disks: Vec<_> = ids.iter().filter_map(|id| self.disks.get(id)).collect();
        // A front-end that connects from here on waits at the gates.
        let closed: Vec<_> = disks.iter().map(|disk| disk.chain.gate().close()).collect();
        if let Some(disk) = disks.iter().find(|disk| disk.chain.is_connected()) {
            let story = format!("a guest is connected to disk {}: shut it down first", disk.chain.id());
            return Err(Error::new(ErrorKind::Busy, story));
        }
        closed.iter().try_for_each(|closed| closed.drain(Instant::now() + MAINTENANCE_DRAIN))?;
        disks.iter().try_for_each(|disk| disk.chain.flush().run())?;
        disks.iter().for_each(|disk| disk.chain.detach());
        let worked = work(&self.store);
        for disk in &disks {
            let story = || format!("disk {} stays closed: restart the daemon", disk.chain.id());
            attach_again(&self.store, disk).context(story)?;
        }
        worked
    }
}

/// Opens a disk's chain as the manifest has it.
fn open_chain(store: &Store, disk: &DiskConfig) -> Result<Chain> {
    let what = || format!("disk {}", disk.id);
    store.declare(&disk.id, &disk.path, disk.format).context(what)?;
    let count = store.manifest().disk(&disk.id)?.layers.len();
    let writable = (!disk.read_only).then_some(count - 1);
    let layers = store.open_layers(&disk.id, count, disk.cache, writable).context(what)?;
    Chain::new(&disk.id, disk.read_only, layers)
}

fn attach_again(store: &Store, disk: &Served) -> Result<()> {
    let id = disk.chain.id();
    let count = store.manifest().disk(id)?.layers.len();
    disk.chain.attach(store.open_layers(id, count, disk.cache, Some(count - 1))?)
}

/// Snapshot names are shown, logged and typed, and may become parts of file names.
fn check_name(name: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let starts_well = name.bytes().next().is_some_and(|first| !b"-.".contains(&first));
    if starts_well && name.len() <= 64 && name.bytes().all(allowed) {
        return Ok(());
    }
    let story =
        "a snapshot's name has 1 to 64 letters, digits, '-', '_' or '.', and starts with neither '-' nor '.'";
    Err(Error::new(ErrorKind::InvalidInput, story))
}
