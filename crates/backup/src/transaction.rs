//! Transactions: all actions at one cut, or none.
//!
//! ```text
//!   plan    each action checked; jobs have their place on the list, bitmaps and targets are taken
//!   cut     of all disks that are read or whose bitmaps change; with it the bitmaps change, in one piece
//!   begin   the jobs' threads
//! ```
//! Whatever the plan has taken is given back when it is dropped, so an action that is refused leaves nothing behind, but for
//! the files that `drive-backup` has made or emptied by then, as in QEMU.

mod bitmaps;
mod check;
mod jobs;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use block::{DirtyBitmap, Error, ErrorKind, Result};
use snapshot::{
    BitmapLock, BitmapName, ClientId, CreateRequest, CutRequest, DeleteRequest, JobGroup, JobOptions,
    JobVerb, MarkChange, Pin,
};
use tracing::warn;

use crate::actions::{Backups, Named, quiet_cut};
use crate::model::{Action, BackupRequest, CompletionMode, DriveBackupRequest};
use crate::nodes::{Access, Filter, Kind, View};
use bitmaps::{NodeChange, Staged, To};
use jobs::{Ready, Target, begin};

impl Backups {
    /// `transaction`: does all actions, or none. Returns once the bitmaps are changed and the jobs have begun, which end as
    /// `mode` says.
    pub fn transaction(
        &self,
        actions: Vec<Action>,
        mode: CompletionMode,
        client: Option<ClientId>,
    ) -> Result<()> {
        let mut plan = Plan::new(self, client);
        plan.group = (mode == CompletionMode::Grouped).then(Arc::default);
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

/// What is read at the cut: the bitmaps of nodes as they will be, and what each backup copies.
type Read = (Vec<Staged>, Vec<Option<DirtyBitmap>>);

struct Plan<'a> {
    backups: &'a Backups,
    client: Option<ClientId>,
    /// Of all jobs, if they end together.
    group: Option<Arc<JobGroup>>,
    /// Those that are to be cut.
    disks: BTreeSet<String>,
    /// What the cut makes.
    snapshot: Option<CreateRequest>,
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
            group: None,
            disks: BTreeSet::new(),
            snapshot: None,
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
            Action::BlockdevBackup(BackupRequest { options, target }) => {
                self.backup(options, Target::Node(target))
            }
            Action::DriveBackup(DriveBackupRequest { options, target }) => {
                self.backup(options, Target::File(target))
            }
            Action::SnapshotCreate(request) => self.snapshot(request),
        }
    }

    fn snapshot(&mut self, request: CreateRequest) -> Result<()> {
        if let Some(first) = &self.snapshot {
            let story = format!("one cut makes one snapshot: '{}' is asked for already", first.name);
            return Err(invalid(&story));
        }
        self.snapshot = Some(request);
        Ok(())
    }

    /// The cut of these disks. A snapshot is of all that it names, or of all that can change.
    fn cut_request(&self, cut: Vec<String>) -> Result<Option<CutRequest>> {
        let Some(CreateRequest { name, disks, freeze }) = self.snapshot.clone() else {
            return Ok(quiet_cut(cut));
        };
        let is_without = |disk: &&String| disks.as_ref().is_some_and(|named| !named.contains(disk));
        if let Some(disk) = cut.iter().find(is_without) {
            let story = format!("the transaction cuts disk '{disk}', which snapshot '{name}' does not name");
            return Err(invalid(&story));
        }
        Ok(Some(CutRequest { snapshot: Some(name), disks, freeze }))
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

    fn carry_out(mut self) -> Result<()> {
        self.defer_clears()?;
        let snapshot = self.snapshot.as_ref().map(|request| request.name.clone());
        let mut is_cut = false;
        self.cut_and_begin(&mut is_cut).inspect_err(|_| {
            // All or none: a snapshot that was made goes again.
            let Some(name) = snapshot.filter(|_| is_cut) else { return };
            let request = DeleteRequest { name, options: JobOptions::default() };
            if let Err(error) = self.backups.manager.delete(request) {
                warn!(%error, "the snapshot of a transaction that failed stays");
            }
        })
    }

    fn cut_and_begin(&mut self, is_cut: &mut bool) -> Result<()> {
        let pins = self.take_cut(is_cut)?;
        for filter in &self.filters {
            *filter.view() = View { pin: pins.get(&filter.disk).cloned(), used: true };
        }
        self.staged.iter().for_each(|(access, bitmaps)| access.bitmaps().clone_from(bitmaps));
        // All or none: what has begun is called off if another one can not.
        let mut begun: Vec<String> = Vec::new();
        for mut ready in std::mem::take(&mut self.ready) {
            let of_disk = self.cleaned.extract_if(.., |(bitmap, _)| ready.copies(&bitmap.disk));
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

    /// The cut, if one is needed, and the changes of bitmaps, all or none; the disks as they are at it.
    fn take_cut(&mut self, is_cut: &mut bool) -> Result<BTreeMap<String, Arc<Pin>>> {
        self.disks.extend(self.backups.manager.disks_to_cut(&self.changes));
        let disks = self.disks.iter().cloned().collect();
        let mut found = Read::default();
        let pins = self.backups.pin(
            disks,
            |cut| self.cut_request(cut),
            &self.changes,
            |pins| {
                *is_cut = true;
                found = self.read(pins)?;
                Ok(())
            },
        )?;
        self.note(found);
        Ok(pins.into_iter().map(|pin| (pin.id().to_owned(), Arc::new(pin))).collect())
    }

    /// Reads what is to be read at the cut, before anything is changed.
    fn read(&self, pins: &[&Pin]) -> Result<Read> {
        let staged = self.stage(pins)?;
        let marked =
            self.ready.iter().map(|ready| self.marked(ready, pins, &staged)).collect::<Result<_>>()?;
        Ok((staged, marked))
    }

    fn note(&mut self, (staged, marked): Read) {
        self.staged = staged;
        self.ready.iter_mut().zip(marked).for_each(|(ready, marked)| ready.marked = marked);
    }
}

fn invalid(story: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, story)
}
