//! Transactions: all actions at one cut, or none.
//!
//! ```text
//!   plan    each action checked; jobs have their place on the list, bitmaps and targets are taken
//!   cut     of all disks that are read or whose bitmaps change; with it the bitmaps change, in one piece
//!   begin   the jobs' threads
//! ```
//! Whatever the plan has taken is given back when it is dropped, so an action that is refused leaves nothing behind.

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
use crate::nodes::{Access, Filter, Kind, NodeBitmaps, View, Writing, no_node, not_found};

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
}

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
    /// The bitmaps of nodes as they will be.
    staged: Vec<(Arc<Access>, NodeBitmaps)>,
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
        self.ready.push(Ready { seat, source, target, options, lock });
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
        let pins = self.take_cut()?;
        for filter in &self.filters {
            *filter.view() = View { pin: pins.get(&filter.disk).cloned(), used: true };
        }
        self.staged.iter().for_each(|(access, bitmaps)| access.bitmaps().clone_from(bitmaps));
        // All or none: what has begun is called off if another one can not.
        let mut begun: Vec<String> = Vec::new();
        for ready in std::mem::take(&mut self.ready) {
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

    /// The cut, if one is needed, and the changes of bitmaps, all or none; the disks as they are at it.
    fn take_cut(&mut self) -> Result<BTreeMap<String, Arc<Pin>>> {
        let manager = &self.backups.manager;
        self.disks.extend(manager.disks_to_cut(&self.changes));
        if self.disks.is_empty() {
            self.staged = self.stage(&[])?;
            manager.change_marks(&self.changes)?;
            return Ok(BTreeMap::new());
        }
        let disks = Some(self.disks.iter().cloned().collect());
        let request = CutRequest { snapshot: None, disks, freeze: Some(FreezePolicy::Never) };
        let mut staged = Vec::new();
        let taken = manager.cut_reading(request, &self.changes, |pins| {
            staged = self.stage(pins)?;
            Ok(())
        })?;
        self.staged = staged;
        Ok(taken.pins.into_iter().map(|pin| (pin.id().to_owned(), Arc::new(pin))).collect())
    }

    /// The bitmaps of nodes as they will be. `pins` are the disks at the cut.
    fn stage(&self, pins: &[Pin]) -> Result<Vec<(Arc<Access>, NodeBitmaps)>> {
        let mut staged: Vec<(Arc<Access>, NodeBitmaps)> = Vec::new();
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
                To::Merged(_) => entry(bitmaps, name)?.extend(merged),
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
        staged: &[(Arc<Access>, NodeBitmaps)],
    ) -> Result<Vec<ByteRange>> {
        let own = access.filter.view().pin.clone();
        let cut = pins.iter().find(|pin| pin.id() == access.filter.disk);
        let pin = cut.or(own.as_deref()).ok_or_else(|| no_node(&access.filter.disk))?;
        let mut merged = Vec::new();
        for source in sources {
            match self.owner(&source.node)? {
                Source::Disk(disk) => {
                    let dirty = self.backups.manager.bitmap_lock(&disk, &source.name)?.dirty(pin)?;
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
    let Ready { seat, source, target, options, lock } = ready;
    let pin = match &source {
        Source::Disk(disk) => pins.get(disk).cloned(),
        Source::Access(access) => access.filter.view().pin.clone(),
    };
    let pin = pin.ok_or_else(|| no_node(source.disk()))?;
    let marked = match (options.sync, &source, &options.bitmap, &lock) {
        (Sync::Full | Sync::Top | Sync::None, ..) => None,
        (_, Source::Access(access), Some(name), _) => Some(access.bitmap(name, pin.disk().capacity())?),
        (_, _, _, lock) => lock.as_ref().map(|lock| lock.dirty(&pin)).transpose()?,
    };
    let cleans = options.sync == Sync::Incremental
        || matches!(options.bitmap_mode, Some(BitmapMode::OnSuccess | BitmapMode::Always));
    let work = Backup {
        copy: Copy::new(pin.disk(), Arc::clone(target.disk()), marked),
        target,
        policies: Policies { read: options.on_source_error, write: options.on_target_error },
        pin,
        bitmap: lock.map(|lock| (lock, cleans)),
    };
    seat.start(Box::new(work))
}

/// What is asked, by itself: the rules and words of QEMU's `do_backup_common` (`blockdev.c`, `block/backup.c`).
fn check(options: &BackupOptions) -> Result<()> {
    use BitmapMode::{Never, OnSuccess};
    let unsupported = |story: &str| Err(Error::new(ErrorKind::Unsupported, story));
    match (options.sync, &options.bitmap, options.bitmap_mode) {
        (Sync::None, ..) => {
            return unsupported(
                "sync 'none' is not there: read the disk through copy-before-write and snapshot-access",
            );
        }
        (Sync::Incremental, None, _) => {
            return Err(invalid("must provide a valid bitmap name for 'incremental' sync mode"));
        }
        (Sync::Bitmap, None, _) => {
            return Err(invalid("must provide a valid bitmap name for 'bitmap' sync mode"));
        }
        (Sync::Incremental, Some(_), mode) if mode.is_some_and(|mode| mode != OnSuccess) => {
            return Err(invalid("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"));
        }
        (Sync::Full | Sync::Top | Sync::Bitmap, Some(_), None) => {
            return Err(invalid("Bitmap sync mode must be given when providing a bitmap"));
        }
        (Sync::Full | Sync::Top, Some(_), Some(Never)) => {
            return Err(invalid(
                "Bitmap sync mode 'never' has no meaningful effect when combined with a whole copy",
            ));
        }
        (_, None, Some(_)) => return Err(invalid("Cannot specify bitmap sync mode without a bitmap")),
        _ => {}
    }
    match options.compress {
        true => {
            unsupported("a backup can not be compressed yet: compress its file with `qemu-img convert -c`")
        }
        false => Ok(()),
    }
}

fn invalid(story: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, story)
}
