//! Exports: disks as they were, snapshots and images that clients read over NBD.
//!
//! There is one server, as in QEMU: `nbd-server-start` has it listen, `block-export-add` offers something on it. A disk that
//! is exported is cut, and what clients read is the disk at that instant: a live one would change under them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::{Context, DirtyBitmap, Disk, Error, ErrorKind, Layer, Result};
use nbd::{BitmapContext, Config, Export, Removal, Server, Tls};
use serde::{Deserialize, Serialize};
use snapshot::{Event, Manager, Pin, Point};

use crate::actions::{Backups, Named};
use crate::address::{SocketAddress, Sockets};
use crate::model::BitmapSource;
use crate::nodes::{Backing, Filter, Kind, Node, Shown, Writing, is_well_formed, no_node};

/// How long clients whose requests are under way are waited for when the server stops.
pub(crate) const GRACE: Duration = Duration::from_secs(5);

/// `nbd-server-start`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ServerOptions {
    /// Where to listen.
    pub addr: SocketAddress,
    /// The id of the certificates; without, clients speak in plain text.
    pub tls_creds: Option<String>,
    /// How many clients there may be; 100 if absent, any number if 0.
    pub max_connections: Option<u32>,
}

/// `object-add` of certificates: QEMU's `tls-creds-x509`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TlsCredentials {
    /// Their id.
    pub id: String,
    /// The folder that they are in.
    pub dir: PathBuf,
    /// Whether clients must have one of the same authority; so if absent.
    #[serde(default = "yes")]
    pub verify_peer: bool,
}

impl TlsCredentials {
    /// Where its files are, if they are there.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        Tls::FILES.into_iter().map(|name| self.dir.join(name))
    }
}

fn yes() -> bool {
    true
}

/// `block-export-add`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExportOptions {
    /// Its id.
    pub id: String,
    /// A disk, a `snapshot-access` node, or an image that was added.
    pub node_name: String,
    /// What clients ask for; the node's name if absent.
    pub name: Option<String>,
    /// A text for people.
    pub description: Option<String>,
    /// Whether clients may write: to images only.
    #[serde(default)]
    pub writable: bool,
    /// Whether each write is on stable storage before it is acknowledged.
    #[serde(default)]
    pub writethrough: bool,
    /// Bitmaps and checkpoints: what is dirty in them, or changed since, can be asked for.
    #[serde(default)]
    pub bitmaps: Vec<BitmapSource>,
    /// Whether clients can ask in which layer what is.
    #[serde(default)]
    pub allocation_depth: bool,
}

/// An export, as `query-block-exports` shows it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// Always `nbd`.
    pub r#type: String,
    /// The node.
    pub node_name: String,
    /// Whether it takes no clients any more, and waits for its last one.
    pub shutting_down: bool,
}

/// The server and what it offers.
#[derive(Debug, Default)]
pub(crate) struct Exports {
    server: Mutex<Option<Server>>,
    credentials: Mutex<BTreeMap<String, Tls>>,
    list: Arc<List>,
    pub(crate) sockets: Sockets,
    /// How many clients are connected, of all servers.
    pub(crate) connected: Arc<AtomicUsize>,
    /// Ids of exports that are being made: that takes a cut, and the server is not held meanwhile.
    beginning: Mutex<BTreeSet<String>>,
}

/// Exports by id, each with the name that clients ask for.
#[derive(Debug, Default)]
struct List(Mutex<BTreeMap<String, (String, ExportInfo)>>);

impl List {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (String, ExportInfo)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exports {
    pub(crate) fn new(sockets: Sockets) -> Self {
        Self { sockets, ..Self::default() }
    }

    fn server(&self) -> MutexGuard<'_, Option<Server>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn beginning(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.beginning.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an id for an export that is made next.
    fn begin(&self, id: &str) -> Result<Beginning<'_>> {
        if !is_well_formed(id) {
            return Err(Error::new(ErrorKind::InvalidInput, "Invalid block export id"));
        }
        let mut beginning = self.beginning();
        if self.list.lock().contains_key(id) || !beginning.insert(id.to_owned()) {
            return Err(Error::new(ErrorKind::Busy, format!("Block export id '{id}' is already in use")));
        }
        Ok(Beginning { exports: self, id: id.to_owned() })
    }

    fn credentials(&self) -> MutexGuard<'_, BTreeMap<String, Tls>> {
        self.credentials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The id of an export that is being made, as long as this lives.
struct Beginning<'a> {
    exports: &'a Exports,
    id: String,
}

impl Drop for Beginning<'_> {
    fn drop(&mut self) {
        self.exports.beginning().remove(&self.id);
    }
}

/// What an export reads, and what is kept as long as it does.
struct Content {
    disk: Arc<dyn Disk>,
    layers: Vec<Arc<dyn Layer>>,
    /// Of a disk that was cut.
    pin: Option<Arc<Pin>>,
    /// Of an image over a disk.
    shown: Option<Arc<Shown>>,
    /// An image that nobody else may write.
    writing: Option<Writing>,
    node: Option<Arc<Node>>,
}

impl Backups {
    /// `object-add` of `tls-creds-x509`.
    pub fn add_credentials(&self, credentials: &TlsCredentials) -> Result<()> {
        let tls = Tls::from_folder(&credentials.dir, credentials.verify_peer)?;
        let mut known = self.exports.credentials();
        if known.contains_key(&credentials.id) {
            let story = format!("attempt to add duplicate property '{}' to object", credentials.id);
            return Err(Error::new(ErrorKind::Busy, story));
        }
        known.insert(credentials.id.clone(), tls);
        Ok(())
    }

    /// `object-del`. A server that runs keeps them.
    pub fn remove_credentials(&self, id: &str) -> Result<()> {
        let missing = || Error::new(ErrorKind::InvalidInput, format!("object '{id}' not found"));
        self.exports.credentials().remove(id).map(drop).ok_or_else(missing)
    }

    /// `nbd-server-start`: has the server listen.
    pub fn start_server(&self, options: ServerOptions) -> Result<()> {
        let mut server = self.exports.server();
        if server.is_some() {
            return Err(Error::new(ErrorKind::Busy, "NBD server already running"));
        }
        let tls = match &options.tls_creds {
            None => None,
            Some(id) => {
                let missing =
                    || Error::new(ErrorKind::InvalidInput, format!("No TLS credentials with id '{id}'"));
                Some(self.exports.credentials().get(id).cloned().ok_or_else(missing)?)
            }
        };
        let connected = Arc::clone(&self.exports.connected);
        let mut config = Config { tls, connected, ..Config::default() };
        if let Some(most) = options.max_connections {
            config.max_connections = if most == 0 { usize::MAX } else { most as usize };
        }
        let started = Server::new(config);
        started.listen(self.exports.sockets.address_of(&options.addr)?)?;
        *server = Some(started);
        Ok(())
    }

    /// `nbd-server-stop`: cuts its clients off; what it offered is offered no more.
    pub fn stop_server(&self) -> Result<()> {
        let server = self.exports.server().take().ok_or_else(not_running)?;
        // Those whose disks hang are on the list until they answer.
        self.exports.list.lock().values_mut().for_each(|(_, info)| info.shutting_down = true);
        // Whoever asks for exports meanwhile does not wait for it.
        server.shutdown(GRACE);
        Ok(())
    }

    /// How many clients are connected over NBD, whatever they read.
    pub fn nbd_clients(&self) -> usize {
        self.exports.connected.load(Ordering::Relaxed)
    }

    /// The daemon's end: no client reads or writes anything any more.
    pub fn shut_down(&self) {
        // There may be no server.
        let _ = self.stop_server();
    }

    /// `block-export-add`: offers something on the server.
    pub fn add_export(&self, options: ExportOptions) -> Result<()> {
        self.exports.server().as_ref().ok_or_else(not_running)?;
        let _beginning = self.exports.begin(&options.id)?;
        let content = self.content(&options)?;
        let name = options.name.clone().unwrap_or_else(|| options.node_name.clone());
        let mut export = Export::new(&name, Arc::clone(&content.disk))
            .description(options.description.clone().unwrap_or_default());
        if !content.layers.is_empty() {
            export = export.layers(content.layers.clone(), options.allocation_depth);
        }
        if options.writable {
            export = export.writable();
        }
        if options.writethrough {
            export = export.writethrough();
        }
        for bitmap in &options.bitmaps {
            let (name, dirty) = self.bitmap_of(&options.node_name, bitmap, &content)?;
            export = export.context(Arc::new(BitmapContext::new(&name, Arc::new(dirty))));
        }
        let info = ExportInfo {
            id: options.id.clone(),
            r#type: "nbd".to_owned(),
            node_name: options.node_name,
            shutting_down: false,
        };
        let Content { pin, shown, writing, node, .. } = content;
        let (list, manager, id) =
            (Arc::clone(&self.exports.list), Arc::clone(&self.manager), options.id.clone());
        let export = export.on_gone(move || {
            drop((pin, shown, writing, node));
            if list.lock().remove(&id).is_some() {
                manager.tell(Event::ExportDeleted { id });
            }
        });
        // What was made is let go of if the server has been stopped since.
        let server = self.exports.server();
        server.as_ref().ok_or_else(not_running)?.add_export(export)?;
        self.exports.list.lock().insert(options.id, (name, info));
        Ok(())
    }

    /// `block-export-del`: offers it no more. With `hard` its clients are cut off, else they are a reason to refuse.
    pub fn remove_export(&self, id: &str, hard: bool) -> Result<()> {
        let missing = || Error::new(ErrorKind::InvalidInput, format!("Export '{id}' is not found"));
        // First, for no export comes or goes by a command meanwhile.
        let server = self.exports.server();
        let name = self.exports.list.lock().get(id).map(|(name, _)| name.clone()).ok_or_else(missing)?;
        let server = server.as_ref().ok_or_else(not_running)?;
        let how = if hard { Removal::Hard } else { Removal::Safe };
        server.remove_export(&name, how).context(|| format!("export '{id}' can not be deleted"))?;
        // It is on the list until its last client has gone.
        if let Some((_, info)) = self.exports.list.lock().get_mut(id) {
            info.shutting_down = true;
        }
        Ok(())
    }

    /// `nbd-server-remove`: the same by the name that clients ask for.
    pub fn remove_export_named(&self, name: &str, hard: bool) -> Result<()> {
        let found =
            self.exports.list.lock().iter().find(|(_, (known, _))| known == name).map(|(id, _)| id.clone());
        let missing = || Error::new(ErrorKind::InvalidInput, format!("Export '{name}' is not found"));
        self.remove_export(&found.ok_or_else(missing)?, hard)
    }

    /// The exports.
    pub fn exports(&self) -> Vec<ExportInfo> {
        self.exports.list.lock().values().map(|(_, info)| info.clone()).collect()
    }

    fn content(&self, options: &ExportOptions) -> Result<Content> {
        let name = &options.node_name;
        let read_only = |story: &str| match options.writable {
            true => Err(Error::new(ErrorKind::ReadOnly, format!("Block node is read-only: {story}"))),
            false => Ok(()),
        };
        match self.named(name)? {
            Named::Disk(disk) => {
                read_only("the guest alone writes to its disk")?;
                let pin = self.cut(vec![disk])?.pop().ok_or_else(|| no_node(name))?;
                Ok(Content::of_pin(pin, None))
            }
            Named::Node(node) => match &node.kind {
                Kind::SnapshotAccess(access) => {
                    read_only("what was does not change")?;
                    let pin = self.view_of(&access.filter)?;
                    Ok(Content::of_pin(pin, Some(node)))
                }
                Kind::Image { disk, backing, .. } => {
                    let disk = Arc::clone(disk);
                    let beneath =
                        backing.as_ref().map(|backing| self.show_beneath(&node, backing)).transpose()?;
                    let (pin, shown) = beneath.unzip();
                    let writing = options
                        .writable
                        .then(|| Writing::begin(Arc::clone(&node), disk.capacity()))
                        .transpose()?;
                    Ok(Content { disk, layers: Vec::new(), pin, shown, writing, node: Some(node) })
                }
                Kind::File { .. } | Kind::CopyBeforeWrite(_) => {
                    let story = format!(
                        "node '{name}' is no image: put a format on the file, or snapshot-access on the filter"
                    );
                    Err(Error::new(ErrorKind::Unsupported, story))
                }
            },
        }
    }

    /// Has an image show the disk beneath it as it was: when the filter was put on of which it is the fleecing image, or the
    /// job began that writes to it; else as it is now.
    fn show_beneath(&self, node: &Arc<Node>, backing: &Backing) -> Result<(Arc<Pin>, Arc<Shown>)> {
        let is_its = |filter: &Arc<Filter>| filter.is_on() && filter.has_fleece(node);
        let filter = self.filters(&backing.disk).into_iter().find(is_its);
        let pin = match (filter, backing.view()) {
            (Some(filter), _) => self.view_of(&filter)?,
            (None, Some(pin)) => pin,
            (None, None) => {
                let cut = self.cut(vec![backing.disk.clone()])?.pop();
                cut.ok_or_else(|| no_node(&backing.disk))?
            }
        };
        let shown = backing.show(Arc::clone(&pin));
        Ok((pin, shown))
    }

    /// A bitmap of what is exported, or what has changed since a checkpoint.
    fn bitmap_of(
        &self,
        own: &str,
        bitmap: &BitmapSource,
        content: &Content,
    ) -> Result<(String, DirtyBitmap)> {
        let (node, name) = match bitmap {
            BitmapSource::Local(name) => (own, name),
            BitmapSource::External(bitmap) => (bitmap.node.as_str(), &bitmap.name),
        };
        let missing = || Error::new(ErrorKind::InvalidInput, format!("Bitmap '{name}' is not found"));
        let pin = content.pin.as_ref().ok_or_else(missing)?;
        let disk = pin.id();
        match self.named(node)? {
            Named::Disk(known) if known == disk => {}
            Named::Node(node) => match &node.kind {
                Kind::SnapshotAccess(access) if access.filter.disk == disk => {
                    if let Ok(own) = access.bitmap(name, content.disk.capacity()) {
                        return Ok((name.clone(), own));
                    }
                }
                _ => return Err(missing()),
            },
            // What changed on another disk says nothing of this one.
            Named::Disk(_) => return Err(missing()),
        }
        let dirty = match self.manager.has_bitmap(disk, name)? {
            true => self.manager.bitmap_lock(disk, name)?.dirty(pin)?,
            false => changes(&self.manager, disk, name, pin)?.ok_or_else(missing)?,
        };
        Ok((name.clone(), dirty))
    }
}

/// What has changed since the checkpoint of that name; `None` if there is none.
fn changes(manager: &Manager, disk: &str, checkpoint: &str, pin: &Pin) -> Result<Option<DirtyBitmap>> {
    if !manager.checkpoints().iter().any(|known| known.name == checkpoint) {
        return Ok(None);
    }
    let from = Point::Checkpoint(checkpoint.to_owned());
    manager.changes(disk, &from, &pin.point(), None).map(|changes| Some(changes.into_bitmap()))
}

impl Content {
    fn of_pin(pin: Arc<Pin>, node: Option<Arc<Node>>) -> Self {
        Self { disk: pin.disk(), layers: pin.layers(), pin: Some(pin), shown: None, writing: None, node }
    }
}

fn not_running() -> Error {
    Error::new(ErrorKind::InvalidInput, "NBD server not running")
}
