//! A cut for marks: one instant over several disks, at which marks are changed and which can be read for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Disk, Error, ErrorKind, Layer, Result, Stack};

use super::bitmap::{Changer, MarkChange};
use super::changes::{Changes, Look, Point};
use super::draft::Draft;
use super::entry::{CheckpointDisk, CheckpointRecord, Instant, PinEntry};
use super::history::NOW;
use crate::group::Served;
use crate::layer::Layer as HeldLayer;
use crate::manager::Manager;
use crate::manifest::Manifest;
use crate::model::{CreateRequest, FreezePolicy, SnapshotRecord};
use crate::store::Store;

/// A cut: of which disks, and what it leaves.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CutRequest {
    /// The snapshot that it makes; none if absent.
    pub snapshot: Option<String>,
    /// The disks, all at one instant; all of the daemon's disks if absent.
    pub disks: Option<Vec<String>>,
    /// What to do about the guest agent; the daemon's default if absent.
    pub freeze: Option<FreezePolicy>,
}

impl From<CreateRequest> for CutRequest {
    fn from(request: CreateRequest) -> Self {
        Self { snapshot: Some(request.name), disks: request.disks, freeze: request.freeze }
    }
}

/// A cut that was made.
#[derive(Debug)]
pub struct Taken {
    /// When it was, how clean the file systems are, how long the steps took. Without a name it is not listed anywhere.
    pub record: SnapshotRecord,
    /// The disks as they were then, in the order of their ids.
    pub pins: Vec<Pin>,
}

/// One disk as it was at a cut, as long as this lives: jobs leave it alone, and a revert of the disk is refused. It does not
/// outlive the process.
#[derive(Debug)]
pub struct Pin {
    store: Arc<Store>,
    entry: u64,
    id: String,
    /// The disk itself, by its id.
    served: BTreeMap<String, Served>,
    instant: Instant,
    disk: Arc<Stack>,
}

impl Pin {
    /// The disk's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its content.
    pub fn disk(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.disk) as _
    }

    /// The layers that it is made of, the base first.
    pub fn layers(&self) -> Vec<Arc<dyn Layer>> {
        self.disk.layers()
    }

    /// The instant, for [`Manager::changes`].
    pub fn point(&self) -> Point {
        Point::Boundary(self.instant.boundary)
    }

    /// What has been written since then, or may have been. What is written meanwhile may be among it or not.
    pub fn changes(&self) -> Result<Changes> {
        let draft = Draft::new(&self.store);
        Look::new(&self.store, &draft.manifest, &self.served, &self.id)?.changes(
            &self.point(),
            &Point::Now,
            None,
        )
    }

    pub(super) fn instant(&self) -> Instant {
        self.instant
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.store.change_pins(|pins| pins.retain(|pin| pin.id != self.entry));
    }
}

impl Manager {
    /// Makes one cut, then all changes of marks at its instant, in one piece and in order. Returns once all is on stable
    /// storage. The disks of `changes` must be among those of the request.
    ///
    /// If the changes are not possible now, nothing is done. If the cut is made and they fail then, for want of room say, no
    /// mark has changed; the snapshot, if one was asked for, stands.
    pub fn cut_with(&self, request: CutRequest, changes: &[MarkChange]) -> Result<Taken> {
        self.cut_reading(request, changes, |_| Ok(()))
    }

    /// The same; in between `read` may look at the marks as they were at the cut. If it fails, none is changed.
    pub fn cut_reading(
        &self,
        request: CutRequest,
        changes: &[MarkChange],
        read: impl FnOnce(&[Pin]) -> Result<()>,
    ) -> Result<Taken> {
        let _change = self.begin()?;
        let (cut, group) = self.plan(request)?;
        let disks = group.disks.clone();
        self.try_changes(disks.iter().map(|disk| disk.chain.id()), changes)?;
        let record = cut.take(Box::new(group))?;
        // A seal that failed is tried again: a mark must not name an instant that a loss of power would change.
        self.finish_seals(disks.iter())?;
        let pins = {
            let draft = Draft::new(&self.store);
            let ids = disks.iter().map(|disk| disk.chain.id());
            ids.map(|id| self.pin(&draft.manifest, id)).collect::<Result<Vec<_>>>()?
        };
        read(&pins)?;
        let mut draft = Draft::new(&self.store);
        if !changes.is_empty() {
            let cuts: BTreeMap<_, _> = pins.iter().map(|pin| (pin.id.clone(), pin.instant)).collect();
            let told = checkpoint(&record, &cuts);
            self.changer(&cuts, Some(&told), false).make(&mut draft, changes)?;
            draft.commit(|_| Ok(()))?;
        }
        Ok(Taken { record, pins })
    }

    /// A read-only disk, which needs no cut to stay as it is.
    pub fn pin_read_only(&self, id: &str) -> Result<Pin> {
        let _change = self.begin()?;
        let draft = Draft::new(&self.store);
        let look = Look::new(&self.store, &draft.manifest, &self.disks, id)?;
        let written = || Error::new(ErrorKind::InvalidInput, format!("disk '{id}' is written"));
        let top = look.top().filter(|top| top.disk().read_only()).ok_or_else(written)?;
        self.pin_layer(id, top, look.now())
    }

    /// Makes changes of marks, in one piece and in order: at a cut of the disks that need one, or at once. The guest agent
    /// is not asked.
    pub fn change_marks(&self, changes: &[MarkChange]) -> Result<()> {
        let disks = self.disks_to_cut(changes);
        if disks.is_empty() {
            let mut draft = Draft::new(&self.store);
            self.changer(&BTreeMap::new(), None, false).make(&mut draft, changes)?;
            return draft.commit(|_| Ok(()));
        }
        let freeze = Some(FreezePolicy::Never);
        let request = CutRequest { snapshot: None, disks: Some(disks.into_iter().collect()), freeze };
        self.cut_with(request, changes).map(drop)
    }

    /// The disks that have to be cut for these changes.
    pub fn disks_to_cut(&self, changes: &[MarkChange]) -> BTreeSet<String> {
        self.to_be_cut(&Draft::new(&self.store).manifest, changes)
    }

    fn to_be_cut(&self, manifest: &Manifest, changes: &[MarkChange]) -> BTreeSet<String> {
        changes.iter().flat_map(|change| change.cuts(manifest)).map(str::to_owned).collect()
    }

    /// Whether the changes can be made at a cut of these disks.
    fn try_changes<'a>(&self, disks: impl Iterator<Item = &'a str>, changes: &[MarkChange]) -> Result<()> {
        let any = Instant { boundary: NOW, capacity: 0 };
        let cuts = disks.map(|id| (id.to_owned(), any)).collect();
        self.changer(&cuts, None, true).make(&mut Draft::new(&self.store), changes)
    }

    fn changer<'a>(
        &'a self,
        cuts: &'a BTreeMap<String, Instant>,
        told: Option<&'a CheckpointRecord>,
        is_trial: bool,
    ) -> Changer<'a> {
        Changer { served: &self.disks, busy: &self.marks.busy, cuts, told, is_trial }
    }

    /// Pins a disk at its last cut. The caller has the right to change chains.
    fn pin(&self, manifest: &Manifest, id: &str) -> Result<Pin> {
        let look = Look::new(&self.store, manifest, &self.disks, id)?;
        let (held, instant) = look.last_cut()?;
        self.pin_layer(id, held, instant)
    }

    fn pin_layer(&self, id: &str, held: &Arc<HeldLayer>, instant: Instant) -> Result<Pin> {
        let served = self.served(id)?;
        let entry = self.marks.next_pin.fetch_add(1, Ordering::Relaxed);
        let holder = held.entry.number;
        self.store.change_pins(|pins| pins.push(PinEntry { id: entry, disk: id.to_owned(), holder }));
        let disk = served.chain.view(held, served.how);
        let served = BTreeMap::from([(id.to_owned(), served.clone())]);
        Ok(Pin { store: Arc::clone(&self.store), entry, id: id.to_owned(), served, instant, disk })
    }
}

/// What a checkpoint made at a cut is told of it.
fn checkpoint(record: &SnapshotRecord, cuts: &BTreeMap<String, Instant>) -> CheckpointRecord {
    let part = |(id, cut): (&String, &Instant)| CheckpointDisk {
        id: id.clone(),
        boundary: cut.boundary,
        capacity: cut.capacity,
    };
    CheckpointRecord {
        name: String::new(),
        time: record.time,
        grade: record.grade,
        reason: record.reason.clone(),
        disks: cuts.iter().map(part).collect(),
    }
}

impl MarkChange {
    /// The disks that have to be cut for this, as marks are now.
    fn cuts<'a>(&'a self, manifest: &Manifest) -> Vec<&'a str> {
        let records = |bitmap: &&super::BitmapName| {
            manifest.bitmap(&bitmap.disk, &bitmap.name).is_ok_and(|entry| entry.since.is_some())
        };
        match self {
            // Of whatever disks the cut is.
            Self::Checkpoint { .. } | Self::Remove(_) | Self::Merge { .. } => Vec::new(),
            Self::Add { bitmap, recording, .. } => recording.then_some(&*bitmap.disk).into_iter().collect(),
            Self::Enable(bitmap) if records(&bitmap) => Vec::new(),
            Self::Enable(bitmap) => vec![&bitmap.disk],
            Self::Clear(bitmap) | Self::Disable(bitmap) => {
                Some(bitmap).into_iter().filter(records).map(|bitmap| &*bitmap.disk).collect()
            }
        }
    }
}
