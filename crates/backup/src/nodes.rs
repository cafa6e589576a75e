//! Block nodes that clients add: the files that backups are written to, and the filters that they are read through.

mod backing;
mod create;
mod filter;
mod options;
mod own;
mod writing;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Context, Disk, Error, ErrorKind, RawDisk, Result};
use hostio::{Cache, HostFile, Open};
use qcow2::Image;
use serde::Serialize;
use snapshot::BitmapInfo;

pub(crate) use backing::{Backing, Shown};
pub(crate) use create::Creation;
pub(crate) use filter::{Access, Filter, NodeBitmaps, View, bitmap_of, not_found, tidy};
use options::{Driver, Reference};
pub use options::{ImageOptions, NodeOptions};
use own::Own;
pub(crate) use writing::{MAX_PENDING, Writing, incompressible};

/// Nodes there may be: clients forget to delete them.
const MAX_NODES: usize = 1024;

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    driver: &'static str,
    read_only: bool,
    pub(crate) kind: Kind,
    /// Whether a job writes to it.
    written: AtomicBool,
}

/// What a node is.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A file or a device.
    File { file: Arc<HostFile>, path: PathBuf },
    /// An image in a file; and the disk beneath it, if there is one.
    Image { file: Arc<Node>, disk: Arc<dyn Disk>, qcow2: Option<Arc<Image>>, backing: Option<Arc<Backing>> },
    /// A disk, and what it was when the filter was put on.
    CopyBeforeWrite(Arc<Filter>),
    /// The same, to read.
    SnapshotAccess(Arc<Access>),
}

/// A node, as `query-named-block-nodes` needs it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeInfo {
    /// Its name.
    pub node_name: String,
    /// Its driver.
    pub driver: &'static str,
    /// The file that it is in the end.
    pub filename: PathBuf,
    /// Bytes that it shows.
    pub virtual_size: u64,
    /// Whether it is not written.
    pub read_only: bool,
    /// Its dirty bitmaps.
    pub dirty_bitmaps: Vec<BitmapInfo>,
}

/// All nodes that were added, by name.
#[derive(Debug, Default)]
pub(crate) struct Nodes {
    nodes: Mutex<BTreeMap<String, Arc<Node>>>,
    /// Held while nodes are made, which may take long; before `nodes`.
    adding: Mutex<()>,
    /// Names those that got none.
    next: AtomicU64,
    own: Own,
}

impl Nodes {
    /// None yet. `state` is the state directory, in which none may be that is written.
    pub(crate) fn new(state: PathBuf) -> Self {
        Self { own: Own(state), ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Node>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to make nodes.
    fn adding(&self) -> MutexGuard<'_, ()> {
        self.adding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node of that name.
    pub(crate) fn get(&self, name: &str) -> Option<Arc<Node>> {
        self.lock().get(name).cloned()
    }

    /// What `tell` says of each. It holds none of them: a node that is held can not be removed.
    pub(crate) fn map<T>(&self, tell: impl Fn(&Node) -> T) -> Vec<T> {
        self.lock().values().map(|node| tell(node)).collect()
    }

    /// Adds a node and those that its options define. `disk_of` finds the disk that a name means. If it fails, none is added.
    pub(crate) fn add(&self, options: NodeOptions, disk_of: &dyn Fn(&str) -> Option<String>) -> Result<()> {
        if options.node_name.is_none() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "'node-name' must be specified for the root node",
            ));
        }
        let _adding = self.adding();
        let mut made = Vec::new();
        self.make(options, disk_of, &mut made)?;
        let mut nodes = self.lock();
        if nodes.len() + made.len() > MAX_NODES {
            return Err(Error::new(ErrorKind::Busy, "there are too many nodes: delete those of no use"));
        }
        nodes.extend(made.into_iter().map(|node| (node.name.clone(), node)));
        Ok(())
    }

    /// Removes a node, and those that it alone defined.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        let mut nodes = self.lock();
        let Some(node) = nodes.get(name) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("Failed to find node with node-name='{name}'"),
            ));
        };
        // One is the list's own. A job reads what is in a snapshot-access node.
        if Arc::strong_count(node) > 1 || node.is_read() || node.is_on() {
            return Err(Error::new(ErrorKind::Busy, format!("Node {name} is in use")));
        }
        nodes.remove(name);
        // A child that was defined within its parent has a name that no client can give, and goes with it.
        while let Some(orphan) =
            nodes.values().find(|node| is_own(&node.name) && Arc::strong_count(node) == 1)
        {
            let orphan = orphan.name.clone();
            nodes.remove(&orphan);
        }
        Ok(())
    }

    fn make(
        &self,
        options: NodeOptions,
        disk_of: &dyn Fn(&str) -> Option<String>,
        made: &mut Vec<Arc<Node>>,
    ) -> Result<Arc<Node>> {
        let name = match options.node_name.clone() {
            Some(name) => check_name(name)?,
            None => format!("#block{}", self.next.fetch_add(1, Ordering::Relaxed)),
        };
        if self.lock().contains_key(&name)
            || disk_of(&name).is_some()
            || made.iter().any(|node| node.name == name)
        {
            return Err(duplicate(&name));
        }
        let (driver, read_only) = (options.driver.name(), options.read_only);
        let kind = self.make_kind(options, disk_of, made)?;
        let node = Arc::new(Node { name, driver, read_only, kind, written: AtomicBool::new(false) });
        made.push(Arc::clone(&node));
        Ok(node)
    }

    fn make_kind(
        &self,
        options: NodeOptions,
        disk_of: &dyn Fn(&str) -> Option<String>,
        made: &mut Vec<Arc<Node>>,
    ) -> Result<Kind> {
        let cache = if options.cache.direct { Cache::None } else { Cache::Writeback };
        let writable = !options.read_only;
        let mut child = |reference: Reference| self.resolve(reference.within(writable), disk_of, made);
        match options.driver {
            Driver::File { filename } | Driver::HostDevice { filename } => {
                if writable {
                    self.own.check(&filename)?;
                }
                let file = Arc::new(HostFile::open(&filename, Open { writable, cache })?);
                Ok(Kind::File { file, path: filename })
            }
            Driver::Raw { file } => {
                let file = child(file)?;
                self.check_free(&file, writable)?;
                let disk = Arc::new(RawDisk::new(file.storage()?, !writable)?);
                Ok(Kind::Image { file, disk, qcow2: None, backing: None })
            }
            Driver::Qcow2 { file, backing } => {
                let file = child(file)?;
                self.check_free(&file, writable)?;
                let beneath = backing.as_ref().and_then(Reference::name).and_then(disk_of);
                let backing = beneath.map(|disk| Arc::new(Backing::new(disk)));
                let image = writing::open_qcow2(file.storage()?, writable, backing.clone())
                    .context(|| format!("Node '{}'", file.name))?;
                let image = Arc::new(image);
                Ok(Kind::Image { file, disk: Arc::clone(&image) as _, qcow2: Some(image), backing })
            }
            Driver::CopyBeforeWrite { file, target } => {
                let Reference::Name(source) = file else {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        "the filter is put on a disk: name it as 'file'",
                    ));
                };
                let disk = disk_of(&source).ok_or_else(|| no_node(&source))?;
                Ok(Kind::CopyBeforeWrite(Arc::new(Filter::new(disk, child(target)?))))
            }
            Driver::SnapshotAccess { file } => {
                let node = child(file)?;
                match &node.kind {
                    Kind::CopyBeforeWrite(filter) => {
                        let filter = Arc::clone(filter);
                        Ok(Kind::SnapshotAccess(Arc::new(Access::new(filter, node))))
                    }
                    _ => Err(Error::new(ErrorKind::InvalidInput, "'file' is not a copy-before-write node")),
                }
            }
        }
    }

    /// Whether an image may be put on a file: one that is written shares it with nobody.
    fn check_free(&self, file: &Arc<Node>, writable: bool) -> Result<()> {
        if writable && file.read_only {
            let story = format!("Block node is read-only: '{}'", file.name);
            return Err(Error::new(ErrorKind::ReadOnly, story));
        }
        let conflicts = |node: &Arc<Node>| match &node.kind {
            Kind::Image { file: used, .. } => Arc::ptr_eq(used, file) && (writable || !node.read_only),
            _ => false,
        };
        match self.lock().values().find(|node| conflicts(node)) {
            None if file.written.load(Ordering::Acquire) => {
                Err(Error::new(ErrorKind::Busy, format!("an image is being made in node '{}'", file.name)))
            }
            None => Ok(()),
            Some(user) => {
                let story = format!("node '{}' uses '{}', and one of them would write", user.name, file.name);
                Err(Error::new(ErrorKind::Busy, story))
            }
        }
    }

    fn resolve(
        &self,
        reference: Reference,
        disk_of: &dyn Fn(&str) -> Option<String>,
        made: &mut Vec<Arc<Node>>,
    ) -> Result<Arc<Node>> {
        match reference {
            Reference::Definition(options) => self.make(*options, disk_of, made),
            Reference::Name(name) => {
                let made = made.iter().find(|node| node.name == name).cloned();
                made.or_else(|| self.get(&name)).ok_or_else(|| no_node(&name))
            }
        }
    }
}

impl Node {
    /// What is in it, for what lies on it.
    fn storage(&self) -> Result<Arc<HostFile>> {
        match &self.kind {
            Kind::File { file, .. } => Ok(Arc::clone(file)),
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("Node '{}' is not a file", self.name))),
        }
    }

    /// Whether it is a filter that is put on its disk.
    fn is_on(&self) -> bool {
        matches!(&self.kind, Kind::CopyBeforeWrite(filter) if filter.is_on())
    }

    /// Whether a job reads it.
    fn is_read(&self) -> bool {
        matches!(&self.kind, Kind::SnapshotAccess(access) if Arc::strong_count(access) > 1)
    }

    /// As it is told of.
    pub(crate) fn info(&self) -> NodeInfo {
        let (filename, virtual_size) = self.place();
        let (node_name, driver, read_only) = (self.name.clone(), self.driver, self.read_only);
        let dirty_bitmaps = match &self.kind {
            Kind::SnapshotAccess(access) => access.bitmap_infos(),
            _ => Vec::new(),
        };
        NodeInfo { node_name, driver, filename, virtual_size, read_only, dirty_bitmaps }
    }

    /// The file that it is in the end, and the bytes that it shows.
    fn place(&self) -> (PathBuf, u64) {
        match &self.kind {
            Kind::File { file, path } => (path.clone(), block::Storage::len(&**file).unwrap_or_default()),
            Kind::Image { file, disk, .. } => (file.place().0, disk.capacity()),
            Kind::CopyBeforeWrite(filter) => filter.fleece.place(),
            Kind::SnapshotAccess(access) => access.node.place(),
        }
    }
}

/// Names that begin so are Frazil's own, as in QEMU.
fn is_own(name: &str) -> bool {
    name.starts_with('#')
}

/// QEMU's rule for ids (`id_wellformed`).
pub(crate) fn is_well_formed(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    id.bytes().next().is_some_and(|first| first.is_ascii_alphabetic()) && id.bytes().all(allowed)
}

/// QEMU's rule for names, and its bound.
fn check_name(name: String) -> Result<String> {
    match name.len() <= 31 && is_well_formed(&name) {
        true => Ok(name),
        false => Err(Error::new(ErrorKind::InvalidInput, format!("Invalid node-name: '{name}'"))),
    }
}

fn duplicate(name: &str) -> Error {
    Error::new(ErrorKind::Busy, format!("Duplicate nodes with node-name='{name}'"))
}

/// There is neither a disk nor a node of that name.
pub(crate) fn no_node(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("Cannot find device='{name}' nor node-name='{name}'"))
}
