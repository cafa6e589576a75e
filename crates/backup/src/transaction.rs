//! Transactions: all actions at one cut, or none.
//!
//! ```text
//!   plan    each action checked; jobs have their place on the list, bitmaps and targets are taken
//!   cut     of all disks that are read or whose bitmaps change; with it the bitmaps change, in one piece
//!   begin   the jobs' threads
//! ```
//! Whatever the plan has taken is given back when it is dropped, so an action that is refused leaves nothing behind.

mod check;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use block::{ByteRange, DirtyBitmap, Error, ErrorKind, Result};
use snapshot::{
    BitmapLock, BitmapName, ClientId, CutRequest, DEFAULT_GRANULARITY, FreezePolicy, HostedJob, JobType,
    JobVerb, MarkChange, Pin, Seat,
};

use crate::actions::{Backups, Named};
use crate::copy::Copy;
use crate::labor::{Backup, Policies};
use crate::model::{
    Action, BackupOptions, BackupRequest, BitmapAdd, BitmapMerge, BitmapMode, BitmapRef, BitmapSource, Sync,
};
use crate::nodes::{Access, Filter, Kind, NodeBitmaps, View, Writing, bitmap_of, no_node, not_found, tidy};
use check::check;

impl Backups {
    /// `transaction`: does all actions, or none. Returns once the bitmaps are changed and the jobs have begun.
    pub fn transaction(&self, actions: Vec<Action>, client: Option<ClientId>) -> Result<()> {
        let mut plan = Plan::new(self, client);
        for action in actions {
            plan.add(action)?;
        }
        plan.carry_out()
    }
}

/// What a backup reads.
enum Source {
    Disk(String),
    Access(Arc<Access>),
}

impl Source {
    fn disk(&self) -> &str {
        match self {
            Self::Disk(disk) => disk,
            Self::Access(access) => &access.filter.disk,
        }
    }
}

/// A backup that has all it needs but the cut.
struct Ready {
    seat: Seat,
    source: Source,
    target: Writing,
    options: BackupOptions,
    /// Of a disk's bitmap.
    lock: Option<BitmapLock>,
    /// Bitmaps that the same transaction cleans.
    cleaned: Vec<BitmapLock>,
    /// What is copied; all if `None`.
    marked: Option<DirtyBitmap>,
}

/// What is read at the cut: the bitmaps of nodes as they will be, and what each backup copies.
type Read = (Vec<Staged>, Vec<Option<DirtyBitmap>>);

type Staged = (Arc<Access>, NodeBitmaps);

/// A bitmap of a node that is to change.
struct NodeChange {
    access: Arc<Access>,
    name: String,
    to: To,
}

enum To {
    Added { granularity: u32 },
    Removed,
    Clean,
    Merged(Vec<BitmapRef>),
}

struct Plan<'a> {
    backups: &'a Backups,
    client: Option<ClientId>,
    /// Those that are to be cut.
    disks: BTreeSet<String>,
    changes: Vec<MarkChange>,
    node_changes: Vec<NodeChange>,
    /// Those that will show the disk as it is at the cut.
    filters: Vec<Arc<Filter>>,
    ready: Vec<Ready>,
    /// Bitmaps that are cleaned once a backup has succeeded.
    cleaned: Vec<(BitmapName, BitmapLock)>,
    /// The bitmaps of nodes as they will be.
    staged: Vec<Staged>,
}

impl<'a> Plan<'a> {
    fn new(backups: &'a Backups, client: Option<ClientId>) -> Self {
        Self {
            backups,
            client,
            disks: BTreeSet::new(),
            changes: Vec::new(),
            node_changes: Vec::new(),
            filters: Vec::new(),
            ready: Vec::new(),
            cleaned: Vec::new(),
            staged: Vec::new(),
        }
    }

    fn add(&mut self, action: Action) -> Result<()> {
        match action {
            Action::Abort {} => Err(invalid("Transaction aborted using Abort action")),
            Action::BlockDirtyBitmapAdd(add) => self.add_bitmap(add),
            Action::BlockDirtyBitmapRemove(bitmap) => {
                self.change(bitmap, MarkChange::Remove, Some(To::Removed))
            }
            Action::BlockDirtyBitmapClear(bitmap) => self.change(bitmap, MarkChange::Clear, Some(To::Clean)),
            Action::BlockDirtyBitmapEnable(bitmap) => self.change(bitmap, MarkChange::Enable, None),
            Action::BlockDirtyBitmapDisable(bitmap) => self.change(bitmap, MarkChange::Disable, None),
            Action::BlockDirtyBitmapMerge(merge) => self.merge(merge),
            Action::BlockdevBackup(BackupRequest { options, target }) => self.backup(options, &target),
        }
    }

    fn add_bitmap(&mut self, add: BitmapAdd) -> Result<()> {
        let granularity = add.granularity.unwrap_or(DEFAULT_GRANULARITY);
        match self.owner(&add.node)? {
            Source::Disk(disk) => {
                let bitmap = BitmapName { disk, name: add.name };
                let (persistent, recording) = (add.persistent, !add.disabled);
                self.changes.push(MarkChange::Add { bitmap, granularity, persistent, recording });
            }
            Source::Access(access) => {
                if !granularity.is_power_of_two() || granularity < 512 {
                    return Err(invalid("Granularity must be power of 2 and at least 512"));
                }
                self.node_changes.push(NodeChange { access, name: add.name, to: To::Added { granularity } });
            }
        }
        Ok(())
    }

    /// A change that takes a bitmap's name and nothing else. `to` is what it is for a node's; `None` for nothing.
    fn change(
        &mut self,
        bitmap: BitmapRef,
        of_disk: fn(BitmapName) -> MarkChange,
        to: Option<To>,
    ) -> Result<()> {
        match self.owner(&bitmap.node)? {
            Source::Disk(disk) => self.changes.push(of_disk(BitmapName { disk, name: bitmap.name })),
            Source::Access(access) => {
                self.node_changes.extend(to.map(|to| NodeChange { access, name: bitmap.name, to }));
            }
        }
        Ok(())
    }

    fn merge(&mut self, merge: BitmapMerge) -> Result<()> {
        let node = merge.node;
        let source = |source| match source {
            BitmapSource::Local(name) => BitmapRef { node: node.clone(), name },
            BitmapSource::External(bitmap) => bitmap,
        };
        let sources: Vec<_> = merge.bitmaps.into_iter().map(source).collect();
        match self.owner(&node)? {
            Source::Disk(disk) => {
                let named = |source: BitmapRef| match self.owner(&source.node)? {
                    Source::Disk(disk) => Ok(BitmapName { disk, name: source.name }),
                    Source::Access(_) => Err(Error::new(
                        ErrorKind::Unsupported,
                        "a node's bitmap can not be merged into one of a disk",
                    )),
                };
                let sources = sources.into_iter().map(named).collect::<Result<_>>()?;
                self.changes
                    .push(MarkChange::Merge { target: BitmapName { disk, name: merge.target }, sources });
            }
            Source::Access(access) => {
                // Read at the cut.
                self.need(&access.filter);
                let to = To::Merged(sources);
                self.node_changes.push(NodeChange { access, name: merge.target, to });
            }
        }
        Ok(())
    }

    fn backup(&mut self, options: BackupOptions, target: &str) -> Result<()> {
        check(&options)?;
        let source = self.owner(&options.device)?;
        let id = match (&options.job_id, &source) {
            (Some(id), _) => id.clone(),
            (None, Source::Disk(disk)) => disk.clone(),
            (None, Source::Access(_)) => return Err(invalid("An explicit job ID is required for this node")),
        };
        let lock = match (&options.bitmap, &source) {
            (Some(name), Source::Disk(disk)) => Some(self.backups.manager.bitmap_lock(disk, name)?),
            _ => None,
        };
        let node = self.backups.nodes.get(target).ok_or_else(|| no_node(target))?;
        let target = Writing::begin(node, self.capacity(source.disk())?)?;
        let seat = self.backups.manager.enter_job(HostedJob {
            id,
            kind: JobType::Backup,
            speed: options.speed,
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            client: self.client,
        })?;
        match &source {
            Source::Disk(disk) => drop(self.disks.insert(disk.clone())),
            Source::Access(access) => self.need(&access.filter),
        }
        self.ready.push(Ready { seat, source, target, options, lock, cleaned: Vec::new(), marked: None });
        Ok(())
    }

    /// What a filter shows is about to be read: as it is at the cut, unless somebody has begun to read it before.
    fn need(&mut self, filter: &Arc<Filter>) {
        let view = filter.view();
        if view.pin.is_none() || !view.used {
            self.disks.insert(filter.disk.clone());
            self.filters.push(Arc::clone(filter));
        }
    }

    /// What a name means to a backup or a bitmap.
    fn owner(&self, name: &str) -> Result<Source> {
        match self.backups.named(name)? {
            Named::Disk(disk) => Ok(Source::Disk(disk)),
            Named::Node(node) => match &node.kind {
                Kind::SnapshotAccess(access) => Ok(Source::Access(Arc::clone(access))),
                _ => Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("node '{name}' is neither a disk nor a snapshot-access node"),
                )),
            },
        }
    }

    fn capacity(&self, disk: &str) -> Result<u64> {
        let disks = self.backups.manager.disks();
        disks.iter().find(|found| found.id == disk).map(|found| found.capacity).ok_or_else(|| no_node(disk))
    }

    fn carry_out(mut self) -> Result<()> {
        self.defer_clears()?;
        let pins = self.take_cut()?;
        for filter in &self.filters {
            *filter.view() = View { pin: pins.get(&filter.disk).cloned(), used: true };
        }
        self.staged.iter().for_each(|(access, bitmaps)| access.bitmaps().clone_from(bitmaps));
        // All or none: what has begun is called off if another one can not.
        let mut begun: Vec<String> = Vec::new();
        for mut ready in std::mem::take(&mut self.ready) {
            let of_disk = self.cleaned.extract_if(.., |(bitmap, _)| bitmap.disk == ready.source.disk());
            ready.cleaned = of_disk.map(|(_, lock)| lock).collect();
            let id = ready.seat.id().to_owned();
            if let Err(error) = begin(ready, &pins) {
                for id in &begun {
                    let _ = self.backups.manager.ask_job(id, JobVerb::Cancel);
                }
                return Err(error);
            }
            begun.push(id);
        }
        Ok(())
    }

    /// A bitmap that is cleaned along with a backup of its disk tells afterwards what this backup lacks. So it becomes clean
    /// when the backup has succeeded, at the instant that was copied: should the job fail or die with the daemon, the next
    /// increment still has all that changed since the backup before. Until then the job uses it.
    fn defer_clears(&mut self) -> Result<()> {
        let mentions = |change: &MarkChange, name: &BitmapName| match change {
            MarkChange::Checkpoint { .. } => false,
            MarkChange::Add { bitmap, .. } => bitmap == name,
            MarkChange::Remove(bitmap) | MarkChange::Clear(bitmap) => bitmap == name,
            MarkChange::Enable(bitmap) | MarkChange::Disable(bitmap) => bitmap == name,
            MarkChange::Merge { target, sources } => target == name || sources.contains(name),
        };
        let is_backed_up = |disk: &str| self.ready.iter().any(|ready| ready.source.disk() == disk);
        let deferred = self.changes.iter().filter_map(|change| match change {
            // What else the transaction does with it would come in the wrong order.
            MarkChange::Clear(name) if is_backed_up(&name.disk) => {
                (self.changes.iter().filter(|other| mentions(other, name)).count() == 1).then(|| name.clone())
            }
            _ => None,
        });
        for name in deferred.collect::<Vec<_>>() {
            let lock = self.backups.manager.bitmap_lock(&name.disk, &name.name)?;
            self.changes.retain(|change| !mentions(change, &name));
            self.cleaned.push((name, lock));
        }
        Ok(())
    }

    /// The cut, if one is needed, and the changes of bitmaps, all or none; the disks as they are at it.
    fn take_cut(&mut self) -> Result<BTreeMap<String, Arc<Pin>>> {
        let manager = &self.backups.manager;
        self.disks.extend(manager.disks_to_cut(&self.changes));
        if self.disks.is_empty() {
            let read = self.read(&[])?;
            manager.change_marks(&self.changes)?;
            self.note(read);
            return Ok(BTreeMap::new());
        }
        let disks = Some(self.disks.iter().cloned().collect());
        let request = CutRequest { snapshot: None, disks, freeze: Some(FreezePolicy::Never) };
        let mut read = Read::default();
        let taken = manager.cut_reading(request, &self.changes, |pins| {
            read = self.read(pins)?;
            Ok(())
        })?;
        self.note(read);
        Ok(taken.pins.into_iter().map(|pin| (pin.id().to_owned(), Arc::new(pin))).collect())
    }

    /// Reads what is to be read at the cut, before anything is changed.
    fn read(&self, pins: &[Pin]) -> Result<Read> {
        let staged = self.stage(pins)?;
        let marked =
            self.ready.iter().map(|ready| self.marked(ready, pins, &staged)).collect::<Result<_>>()?;
        Ok((staged, marked))
    }

    fn note(&mut self, (staged, marked): Read) {
        self.staged = staged;
        self.ready.iter_mut().zip(marked).for_each(|(ready, marked)| ready.marked = marked);
    }

    /// What a backup copies; all if `None`.
    fn marked(&self, ready: &Ready, pins: &[Pin], staged: &[Staged]) -> Result<Option<DirtyBitmap>> {
        let (Sync::Incremental | Sync::Bitmap, Some(name)) = (ready.options.sync, &ready.options.bitmap)
        else {
            return Ok(None);
        };
        match (&ready.source, &ready.lock) {
            (Source::Access(access), _) => {
                let own = access.filter.view().pin.clone();
                let cut = pins.iter().find(|pin| pin.id() == access.filter.disk);
                let pin = cut.or(own.as_deref()).ok_or_else(|| no_node(&access.filter.disk))?;
                let known = staged.iter().find(|(known, _)| Arc::ptr_eq(known, access));
                let bitmaps = known.map_or_else(|| access.bitmaps().clone(), |(_, bitmaps)| bitmaps.clone());
                bitmap_of(&bitmaps, name, pin.disk().capacity()).map(Some)
            }
            (Source::Disk(disk), Some(lock)) => {
                let pin = pins.iter().find(|pin| pin.id() == disk).ok_or_else(|| no_node(disk))?;
                lock.dirty(pin).map(Some)
            }
            (Source::Disk(_), None) => Err(not_found(name)),
        }
    }

    /// The bitmaps of nodes as they will be. `pins` are the disks at the cut.
    fn stage(&self, pins: &[Pin]) -> Result<Vec<Staged>> {
        let mut staged: Vec<Staged> = Vec::new();
        for NodeChange { access, name, to } in &self.node_changes {
            let merged = match to {
                To::Merged(sources) => self.merged(access, sources, pins, &staged)?,
                _ => Vec::new(),
            };
            let place = staged.iter().position(|(known, _)| Arc::ptr_eq(known, access));
            let place = place.unwrap_or_else(|| {
                staged.push((Arc::clone(access), access.bitmaps().clone()));
                staged.len() - 1
            });
            let Some((_, bitmaps)) = staged.get_mut(place) else { continue };
            match to {
                To::Added { .. } if bitmaps.contains_key(name) => {
                    return Err(Error::new(ErrorKind::Busy, format!("Bitmap already exists: {name}")));
                }
                To::Added { granularity } => drop(bitmaps.insert(name.clone(), (*granularity, Vec::new()))),
                To::Removed => drop(bitmaps.remove(name).ok_or_else(|| not_found(name))?),
                To::Clean => entry(bitmaps, name)?.clear(),
                To::Merged(_) => {
                    let dirty = entry(bitmaps, name)?;
                    dirty.extend(merged);
                    tidy(dirty);
                }
            }
        }
        Ok(staged)
    }

    /// What is dirty in any of these bitmaps, at the instant that the node shows.
    fn merged(
        &self,
        access: &Access,
        sources: &[BitmapRef],
        pins: &[Pin],
        staged: &[Staged],
    ) -> Result<Vec<ByteRange>> {
        let own = access.filter.view().pin.clone();
        let cut = pins.iter().find(|pin| pin.id() == access.filter.disk);
        let pin = cut.or(own.as_deref()).ok_or_else(|| no_node(&access.filter.disk))?;
        let mut merged = Vec::new();
        for source in sources {
            match self.owner(&source.node)? {
                Source::Disk(disk) => {
                    let own = |(name, _): &&(BitmapName, _)| name.disk == disk && name.name == source.name;
                    let dirty = match self.cleaned.iter().find(own) {
                        Some((_, lock)) => lock.dirty(pin)?,
                        None => self.backups.manager.bitmap_lock(&disk, &source.name)?.dirty(pin)?,
                    };
                    merged.extend(ranges(&dirty));
                }
                Source::Access(other) => {
                    let known = staged.iter().find(|(known, _)| Arc::ptr_eq(known, &other));
                    let bitmaps =
                        known.map_or_else(|| other.bitmaps().clone(), |(_, bitmaps)| bitmaps.clone());
                    merged.extend(&bitmaps.get(&source.name).ok_or_else(|| not_found(&source.name))?.1);
                }
            }
        }
        Ok(merged)
    }
}

fn entry<'a>(bitmaps: &'a mut NodeBitmaps, name: &str) -> Result<&'a mut Vec<ByteRange>> {
    bitmaps.get_mut(name).map(|(_, dirty)| dirty).ok_or_else(|| not_found(name))
}

fn ranges(bitmap: &DirtyBitmap) -> impl Iterator<Item = ByteRange> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = ByteRange { offset: at, len: bitmap.capacity().checked_sub(at)? };
        let found = bitmap.next_dirty(rest)?;
        at = found.end();
        Some(found)
    })
}

fn begin(ready: Ready, pins: &BTreeMap<String, Arc<Pin>>) -> Result<()> {
    let Ready { seat, source, target, options, lock, cleaned, marked } = ready;
    let pin = match &source {
        Source::Disk(disk) => pins.get(disk).cloned(),
        Source::Access(access) => access.filter.view().pin.clone(),
    };
    let pin = pin.ok_or_else(|| no_node(source.disk()))?;
    let cleans = options.sync == Sync::Incremental
        || matches!(options.bitmap_mode, Some(BitmapMode::OnSuccess | BitmapMode::Always));
    let cleaned = cleaned.into_iter().map(|lock| (lock, true));
    let work = Backup {
        copy: Copy::new(pin.disk(), Arc::clone(target.disk()), marked),
        target,
        policies: Policies { read: options.on_source_error, write: options.on_target_error },
        pin,
        bitmaps: lock.map(|lock| (lock, cleans)).into_iter().chain(cleaned).collect(),
        _access: match source {
            Source::Access(access) => Some(access),
            Source::Disk(_) => None,
        },
    };
    seat.start(Box::new(work))
}

fn invalid(story: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, story)
}
