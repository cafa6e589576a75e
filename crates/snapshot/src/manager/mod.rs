//! The manager: all that a client can ask of the snapshots of one daemon.

mod change;
mod halt;
mod maintain;
mod read;
mod seals;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use block::{Closed, Context, Error, ErrorKind, Result, Stats, WriteErrors};
use hostio::Cache;
use tracing::{info, warn};

use crate::backing::AllowedFolders;
use crate::chain::Chain;
use crate::cut::{Collector, Events, Freezer, Guest, Limits, SystemClock};
use crate::debts::DebtFile;
use crate::events::Bus;
use crate::group::Served;
use crate::housekeeping::{Duties, Housekeeping, growth_folders};
use crate::jobs::{Jobs, Readers, World, tell_cut_short};
use crate::layer::{LET_GO, LOOK_AGAIN, Layer, Opening};
use crate::marks::Marks;
use crate::model::{DiskStatus, Event, FreezeOwner, FreezePolicy, ImageFormat};
use crate::store::{NOTES, Store};

pub use change::MAX_LEASE;
pub(crate) use change::Prepared;
pub use read::{DiskProbe, SnapshotReader};

/// The *thaw owed* record in the state directory.
const THAW_OWED: &str = "thaw-owed.json";

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
    pub(crate) readers: Readers,
    /// Whoever reads a snapshot shall stop.
    ending: AtomicBool,
    /// The gates of all disks, held while they stand still.
    stopped: Mutex<Option<Vec<Closed>>>,
    pub(crate) jobs: Arc<Jobs>,
    housekeeping: Option<Housekeeping>,
    pub(crate) marks: Marks,
    _collector: Option<Collector>,
}

impl Manager {
    /// Opens the state directory and the disks' chains, to serve them. `guest` is the way to the agent, if there is
    /// one; a thaw that an earlier run owed is tried at once. Base images may name files in `folders`.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another process has the state directory, or has images of it for longer than a killed one
    /// may: a second in all.
    pub fn open(
        state: &Path,
        disks: &[DiskConfig],
        folders: AllowedFolders,
        defaults: FreezeDefaults,
        guest: Option<Box<dyn Guest>>,
    ) -> Result<Self> {
        let store = Arc::new(Store::open(state, folders)?);
        let (mut served, deadline) = (BTreeMap::new(), Instant::now() + LET_GO);
        for disk in disks {
            let chain = Arc::new(open_when_free(&store, disk, deadline)?);
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
        if let Err(error) = tell_cut_short(&manager.store.file(NOTES)) {
            warn!(%error, "what an earlier run has not ended is not known");
        }
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
            ending: AtomicBool::new(false),
            stopped: Mutex::default(),
            jobs: Arc::new(Jobs::new(world)),
            housekeeping: None,
            marks: Marks::default(),
            _collector: collector,
        })
    }

    /// The chain of a disk that is served, for the device.
    pub fn chain(&self, id: &str) -> Result<&Arc<Chain>> {
        self.served(id).map(|disk| &disk.chain)
    }

    pub(crate) fn served(&self, id: &str) -> Result<&Served> {
        // QEMU's words.
        let story = || Error::new(ErrorKind::NotFound, format!("Cannot find device='{id}' nor node-name=''"));
        self.disks.get(id).ok_or_else(story)
    }

    /// Has a listener told of each event from now on, before whoever makes it goes on. That may hold locks: a listener neither
    /// waits, nor calls this manager.
    pub fn subscribe(&self, listener: impl Fn(&Event) + Send + 'static) {
        self.bus.subscribe(Box::new(listener));
    }

    /// Sends what the device has to tell to all who listen.
    pub fn tell(&self, event: Event) {
        self.bus.emit(event);
    }

    /// The disks that are served.
    pub fn disks(&self) -> Vec<DiskStatus> {
        self.disks.values().map(|disk| disk.chain.status(disk.how.cache)).collect()
    }

    /// What each disk has been asked for since it was opened.
    pub fn stats(&self) -> Vec<(String, Stats)> {
        self.disks.iter().map(|(id, disk)| (id.clone(), disk.chain.pulse().stats())).collect()
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
}

/// [`open_chain`], again and again until `deadline` while another process has one of its images.
fn open_when_free(store: &Store, disk: &DiskConfig, deadline: Instant) -> Result<Chain> {
    let mut is_told = false;
    loop {
        match open_chain(store, disk) {
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                if !std::mem::replace(&mut is_told, true) {
                    info!(%error, "waiting for images to be let go of");
                }
                thread::sleep(LOOK_AGAIN);
            }
            opened => return opened,
        }
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
