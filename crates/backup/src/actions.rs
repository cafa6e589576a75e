//! What clients ask for, one thing at a time. Most are transactions of one action.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use block::{Error, ErrorKind, Result};
use snapshot::{ClientId, CutRequest, FreezePolicy, HostedJob, JobType, Manager, MarkChange, Pin};

use crate::address::Sockets;
use crate::exports::Exports;
use crate::nodes::{Filter, ImageOptions, Kind, Node, NodeInfo, NodeOptions, Nodes, View, no_node};

/// Where a disk stands in QEMU's tree of objects: clients find it as `qdev` in `query-block`.
const QDEV: &str = "/machine/peripheral/";

/// A daemon's nodes, and what is done with them.
pub struct Backups {
    pub(crate) manager: Arc<Manager>,
    pub(crate) nodes: Nodes,
    pub(crate) exports: Exports,
}

/// What a name means that a client gave.
pub(crate) enum Named {
    /// A disk that is served, by its id.
    Disk(String),
    /// A node that was added.
    Node(Arc<Node>),
}

impl Backups {
    /// None yet, over the disks of `manager`. `sockets` are those that listen already, by the names by which clients ask for
    /// them.
    pub fn new(manager: Arc<Manager>, sockets: BTreeMap<String, OwnedFd>) -> Self {
        let nodes = Nodes::new(manager.folder().to_owned());
        Self { manager, nodes, exports: Exports::new(Sockets(sockets)) }
    }

    /// `blockdev-add`. Opens what the node needs.
    pub fn add_node(&self, options: NodeOptions) -> Result<()> {
        self.nodes.add(options, &|name| self.disk_of(name))
    }

    /// `blockdev-create`: begins a job that makes an image. As in QEMU, somebody has to dismiss it when it is over.
    pub fn create_image(&self, id: String, options: ImageOptions, client: Option<ClientId>) -> Result<()> {
        let asked = HostedJob {
            id,
            kind: JobType::Create,
            speed: 0,
            auto_finalize: true,
            auto_dismiss: false,
            client,
            group: None,
        };
        let seat = self.manager.enter_job(asked)?;
        let creation = self.nodes.prepare(options, &|name| self.disk_of(name))?;
        seat.start(Box::new(creation))
    }

    /// `blockdev-del`. Refuses while anything uses the node.
    pub fn remove_node(&self, name: &str) -> Result<()> {
        if self.disk_of(name).is_some() {
            return Err(Error::new(ErrorKind::Busy, format!("Node {name} is in use")));
        }
        self.nodes.remove(name)
    }

    /// The nodes that were added.
    pub fn nodes(&self) -> Vec<NodeInfo> {
        self.nodes.map(Node::info)
    }

    /// `qom-set` of a disk's `drive`: puts a filter on the disk, or takes it off again. Putting it on is a cut.
    pub fn set_drive(&self, path: &str, value: &str) -> Result<()> {
        let disk = self.disk_at(path)?;
        match self.named(value)? {
            Named::Disk(same) if same == disk => {
                self.put_on(&disk, None);
                return Ok(());
            }
            Named::Node(node) => {
                if let Kind::CopyBeforeWrite(filter) = &node.kind
                    && filter.disk == disk
                {
                    let pin = self.cut(vec![disk.clone()])?.pop();
                    self.put_on(&disk, Some(filter));
                    *filter.view() = View { pin, used: false };
                    return Ok(());
                }
            }
            Named::Disk(_) => {}
        }
        let story = format!("'{value}' is neither the disk nor a copy-before-write node on it");
        Err(Error::new(ErrorKind::Unsupported, story))
    }

    /// Puts this filter on the disk, in place of the one that is; with `None` all are taken off, and show nothing any more.
    fn put_on(&self, disk: &str, put: Option<&Arc<Filter>>) {
        for filter in self.filters(disk) {
            let is_put = put.is_some_and(|put| Arc::ptr_eq(put, &filter));
            filter.set_on(is_put);
            if put.is_none() {
                *filter.view() = View::default();
            }
        }
    }

    /// Where a disk stands among QEMU's objects.
    pub fn qdev(disk: &str) -> String {
        format!("{QDEV}{disk}/virtio-backend")
    }

    fn disk_at(&self, path: &str) -> Result<String> {
        // QEMU takes any unambiguous part of a path; clients give what `qdev` has, or the device's own id.
        let name = path.strip_prefix(QDEV).unwrap_or(path).trim_end_matches("/virtio-backend");
        let missing = || Error::new(ErrorKind::NotFound, format!("Device '{path}' not found"));
        self.disk_of(name).ok_or_else(missing)
    }

    /// The disk that a name means: its id, or its active layer's.
    pub(crate) fn disk_of(&self, name: &str) -> Option<String> {
        let disks = self.manager.disks();
        let active =
            |disk: &snapshot::DiskStatus| disk.layers.last().is_some_and(|layer| layer.node_name == name);
        disks.into_iter().find(|disk| disk.id == name || active(disk)).map(|disk| disk.id)
    }

    pub(crate) fn named(&self, name: &str) -> Result<Named> {
        if let Some(disk) = self.disk_of(name) {
            return Ok(Named::Disk(disk));
        }
        self.nodes.get(name).map(Named::Node).ok_or_else(|| no_node(name))
    }

    pub(crate) fn filters(&self, disk: &str) -> Vec<Arc<Filter>> {
        let filter = |node: &Node| match &node.kind {
            Kind::CopyBeforeWrite(filter) if filter.disk == disk => Some(Arc::clone(filter)),
            _ => None,
        };
        self.nodes.map(filter).into_iter().flatten().collect()
    }

    /// What a filter shows, from now on. A disk that nobody has cut for it yet is cut.
    pub(crate) fn view_of(&self, filter: &Filter) -> Result<Arc<Pin>> {
        let known = filter.view().pin.clone();
        let pin = match known {
            Some(pin) => pin,
            None => self.cut(vec![filter.disk.clone()])?.pop().ok_or_else(|| no_node(&filter.disk))?,
        };
        let mut view = filter.view();
        view.used = true;
        Ok(Arc::clone(view.pin.get_or_insert(pin)))
    }

    /// Cuts disks at one instant, without a word to the guest: whoever speaks QMP to a disk freezes the guest itself. A
    /// read-only disk is taken as it is.
    pub(crate) fn cut(&self, disks: Vec<String>) -> Result<Vec<Arc<Pin>>> {
        let pins = self.pin(disks, |cut| Ok(quiet_cut(cut)), &[], |_| Ok(()))?;
        Ok(pins.into_iter().map(Arc::new).collect())
    }

    /// Disks at one instant: those that are read-only as they are, the others at the cut that `request` makes of them, or at
    /// none. Marks change with it, after `read` has looked at them; if that fails, none does.
    pub(crate) fn pin(
        &self,
        disks: Vec<String>,
        request: impl FnOnce(Vec<String>) -> Result<Option<CutRequest>>,
        changes: &[MarkChange],
        read: impl FnOnce(&[&Pin]) -> Result<()>,
    ) -> Result<Vec<Pin>> {
        let (unchanging, cut): (Vec<_>, Vec<_>) = disks.into_iter().partition(|disk| self.is_read_only(disk));
        let pins = unchanging.iter().map(|disk| self.manager.pin_read_only(disk));
        let mut pins = pins.collect::<Result<Vec<_>>>()?;
        match request(cut)? {
            Some(request) => {
                let read = |cut: &[Pin]| read(&cut.iter().chain(&pins).collect::<Vec<_>>());
                let taken = self.manager.cut_reading(request, changes, read)?;
                pins.extend(taken.pins);
            }
            None => {
                read(&pins.iter().collect::<Vec<_>>())?;
                if !changes.is_empty() {
                    self.manager.change_marks(changes)?;
                }
            }
        }
        Ok(pins)
    }

    /// Whether a disk has one state for ever.
    pub(crate) fn is_read_only(&self, disk: &str) -> bool {
        self.manager.disks().iter().any(|found| found.id == disk && found.read_only)
    }
}

/// A cut of disks without a snapshot and without a word to the guest; none of no disks.
pub(crate) fn quiet_cut(disks: Vec<String>) -> Option<CutRequest> {
    let freeze = Some(FreezePolicy::Never);
    (!disks.is_empty()).then_some(CutRequest { snapshot: None, disks: Some(disks), freeze })
}
