//! A disk being served in this process, one of two.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use block::testing::{FaultStorage, MemStorage};
use block::{Disk, Gate, Parking, Pulse, RawDisk, Storage, WriteErrors};
use hostio::{Cache, HostFile};
use vhost_blk::{Allowance, DeviceConfig, IoFailure, Server, SessionEvent};

pub(crate) const MIB: usize = 1 << 20;

pub(crate) struct Served {
    pub(crate) server: Server,
    pub(crate) gate: Arc<Gate>,
    pub(crate) pulse: Arc<Pulse>,
    pub(crate) parking: Arc<Parking>,
    /// Requests that the host could not carry out.
    pub(crate) failures: Receiver<IoFailure>,
    pub(crate) socket: PathBuf,
    /// How often front-ends have come and gone.
    pub(crate) sessions: Arc<AtomicUsize>,
    folder: tempfile::TempDir,
}

impl Served {
    pub(crate) fn disk(disk: Arc<dyn Disk>, queues: u16) -> Self {
        Self::with(disk, queues, WriteErrors::Report)
    }

    /// One whose failed writes are treated so.
    pub(crate) fn with(disk: Arc<dyn Disk>, queues: u16, write_errors: WriteErrors) -> Self {
        let (parking, (sender, failures)) = (Arc::new(Parking::new(write_errors)), channel());
        let folder = tempfile::tempdir().unwrap();
        let (socket, gate) = (folder.path().join("vda.sock"), Arc::new(Gate::default()));
        let (pulse, sessions) = (Arc::<Pulse>::default(), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&sessions);
        let server = Server::start(DeviceConfig {
            name: "vda".to_owned(),
            socket: socket.clone(),
            serial: "frazil-serial-0001".to_owned(),
            queues,
            disk,
            gate: Arc::clone(&gate),
            pulse: Arc::clone(&pulse),
            parking: Arc::clone(&parking),
            allowance: Allowance::share(2),
            on_failure: Arc::new(move |failure| drop(sender.send(failure))),
            on_session: Box::new(move |event| {
                if matches!(event, SessionEvent::Disconnected { .. }) {
                    count.fetch_add(1, Ordering::SeqCst);
                }
            }),
        });
        Self { server: server.unwrap(), gate, pulse, parking, failures, socket, sessions, folder }
    }

    /// A raw disk of `len` bytes in memory that fails on demand.
    pub(crate) fn memory(len: usize, queues: u16) -> (Self, Arc<FaultStorage>) {
        let storage = Arc::new(FaultStorage::new(MemStorage::new(len)));
        let disk = RawDisk::new(Arc::clone(&storage) as Arc<dyn Storage>, false).unwrap();
        (Self::disk(Arc::new(disk), queues), storage)
    }

    /// A raw disk of `len` bytes in a file under `folder`.
    pub(crate) fn file(folder: &Path, len: u64, queues: u16, cache: Cache) -> Self {
        let file = HostFile::create(&folder.join("disk.raw"), cache).unwrap();
        file.set_len(len).unwrap();
        Self::disk(Arc::new(RawDisk::new(Arc::new(file), false).unwrap()), queues)
    }

    /// Waits until so many sessions have ended.
    pub(crate) fn wait_sessions(&self, count: usize) {
        wait_until("the session's end", || self.sessions.load(Ordering::SeqCst) >= count);
        assert!(self.folder.path().exists());
    }
}

pub(crate) fn wait_until(story: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {story}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
