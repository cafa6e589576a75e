//! A snapshot served over NBD by itself, as long as somebody wants it: for a look into it, a check of its file systems, or
//! a restore that begins before anything is copied.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::{Context, Disk, ErrorKind, Result};
use hostio::{Cache, HostFile};
use nbd::{BitmapContext, Config, Export, Server};
use qcow2::{CreateOptions, Image, Journal, Mode, Parts};
use serde::{Deserialize, Serialize};
use snapshot::Point;

use crate::actions::Backups;
use crate::address::SocketAddress;
use crate::exports::GRACE;
use crate::nodes::MAX_PENDING;

/// How often it is looked whether somebody still wants it.
const LOOK: Duration = Duration::from_millis(100);

/// What to serve.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ServeRequest {
    /// The snapshot.
    pub name: String,
    /// The disk.
    pub disk: String,
    /// Where to listen.
    pub addr: SocketAddress,
    /// Whether clients may write. What they write goes to an overlay that is thrown away at the end.
    #[serde(default)]
    pub writable: bool,
    /// A checkpoint or an older snapshot: what has changed since can be asked for, as `qemu:dirty-bitmap:` and its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
}

/// Told to whoever asked for it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Serving {
    /// Clients can connect, here.
    Ready(String),
    /// It is being served: shall it go on?
    GoOn,
}

/// An overlay that nobody sees after the end.
struct Scratch(Arc<Image>);

impl Backups {
    /// Serves one disk of a snapshot until `tell` has enough, or the daemon ends. The export has the empty name, so clients need
    /// not know one.
    pub fn serve(&self, request: &ServeRequest, tell: &dyn Fn(Serving) -> ControlFlow<()>) -> Result<()> {
        let who = format!("an export over NBD at {}", request.addr);
        let reader = self.manager.reader(&request.name, &request.disk, &who)?;
        let scratch = match request.writable {
            true => Some(Scratch::new(self.manager.folder(), reader.disk())?),
            false => None,
        };
        let mut export = match &scratch {
            Some(Scratch(image)) => Export::new("", Arc::clone(image) as _).writable(),
            None => Export::new("", reader.disk()).layers(reader.layers(), true),
        };
        if let Some(since) = &request.since {
            let from = match self.manager.checkpoints().iter().any(|known| known.name == *since) {
                true => Point::Checkpoint(since.clone()),
                false => Point::Snapshot(since.clone()),
            };
            let to = Point::Snapshot(request.name.clone());
            let changes = self.manager.changes(&request.disk, &from, &to, None)?;
            export = export.context(Arc::new(BitmapContext::new(since, Arc::new(changes.into_bitmap()))));
        }
        let server =
            Server::new(Config { connected: Arc::clone(&self.exports.connected), ..Config::default() });
        server
            .add_export(export.description(format!("disk {} of snapshot {}", request.disk, request.name)))?;
        let listening = server.listen(self.exports.sockets.address_of(&request.addr)?)?;
        let address =
            listening.map_or_else(|| self.exports.sockets.path_of(&request.addr), |tcp| tcp.to_string());
        let mut wanted = tell(Serving::Ready(address));
        while wanted.is_continue() && !self.manager.is_ending() {
            std::thread::sleep(LOOK);
            if let Some(scratch) = &scratch {
                scratch.relieve()?;
            }
            wanted = tell(Serving::GoOn);
        }
        server.shutdown(GRACE);
        Ok(())
    }
}

impl Scratch {
    /// An overlay over `beneath`, in a file below `folder` that has no name.
    fn new(folder: &Path, beneath: Arc<dyn Disk>) -> Result<Self> {
        let (capacity, path) = (beneath.capacity(), free_name(folder));
        let make = || {
            let file = HostFile::create(&path, Cache::Writeback)?;
            // What a kill would leave has no name, so the host removes it.
            hostio::remove_file(&path)?;
            qcow2::create(&file, &CreateOptions::overlay(capacity, None))?;
            let journal = Journal::nowhere()?;
            let parts = Parts::new(Arc::new(file), Some(beneath));
            Image::open(parts, Mode::Writable(journal))
        };
        Ok(Self(Arc::new(make().context(|| "make an overlay for what clients write")?)))
    }

    /// Has what waits in memory written out if it has become much. A full disk is for the clients to hear of.
    fn relieve(&self) -> Result<()> {
        match self.0.pending() > MAX_PENDING {
            false => Ok(()),
            true => match self.0.flush().run() {
                Err(error) if error.kind() == ErrorKind::NoSpace => Ok(()),
                flushed => flushed,
            },
        }
    }
}

fn free_name(folder: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    folder.join(format!("scratch-{}-{}.qcow2", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)))
}
