use super::*;
use crate::proto::reply::Style;
use crate::testing::{Ask, Client, command, info_data, meta_data};
use block::testing::{CrashStorage, FaultStorage, MemStorage};
use block::{ByteRange, Disk, ErrorKind, RawDisk, Storage};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

mod hostile;
mod lifecycle;
mod requests;

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];
const SIZE: usize = 4 << 20;

/// A server with an export `vda`, and its socket.
struct Rig {
    server: Server,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Rig {
    fn new(config: Config, storage: Arc<dyn Storage>) -> Self {
        let disk = Arc::new(RawDisk::new(storage, false).unwrap());
        Self::with(config, Export::new("vda", disk).writable())
    }

    fn with(config: Config, export: Export) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nbd");
        let server = Server::new(config);
        server.add_export(export).unwrap();
        server.listen(Address::Unix(path.clone())).unwrap();
        Self { server, path, _folder: folder }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    fn greet(&self) -> Client<UnixStream> {
        Client::greet(self.connect(), 3)
    }

    fn client(&self, style: Style) -> Client<UnixStream> {
        let mut client = self.greet();
        client.go(style, "vda");
        client
    }

    /// Waits until nobody is connected, and all threads beyond the first ones are given back.
    fn settle(&self) {
        eventually(|| self.server.clients() == 0 && self.server.shared.spare.left() == SPARE_THREADS);
    }
}

fn eventually(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "it did not come to pass");
        thread::sleep(Duration::from_millis(5));
    }
}

fn memory() -> Arc<MemStorage> {
    Arc::new(MemStorage::from(pattern(0, SIZE)))
}

fn pattern(offset: usize, len: usize) -> Vec<u8> {
    (offset..offset + len).map(|at| (at / 7 + at / 4096) as u8).collect()
}

/// A storage whose reads at offset 0 wait until they are let go.
#[derive(Debug, Default)]
struct Slow {
    inner: MemStorage,
    waiting: AtomicUsize,
    open: Mutex<bool>,
    opened: Condvar,
}

impl Slow {
    fn new() -> Arc<Self> {
        Arc::new(Self { inner: MemStorage::from(pattern(0, SIZE)), ..Self::default() })
    }

    fn let_go(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl Storage for Slow {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset == 0 {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            // Not for ever: a test that fails waits for its requests before it ends.
            let open = self.open.lock().unwrap();
            drop(self.opened.wait_timeout_while(open, Duration::from_secs(40), |open| !*open).unwrap());
        }
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.inner.write_at(buf, offset)
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }
    fn punch_hole(&self, range: ByteRange) -> Result<()> {
        self.inner.punch_hole(range)
    }
}
