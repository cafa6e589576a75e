//! What a transaction does with jobs.

use std::collections::BTreeMap;
use std::sync::Arc;

use block::{DirtyBitmap, Error, ErrorKind, Result};
use snapshot::{BitmapLock, HostedJob, ImageFormat, JobType, Pin, Seat};

use super::bitmaps::Staged;
use super::check::check;
use super::{Plan, Source, invalid};
use crate::copying::{Copying, Policies};
use crate::fleece::Fleece;
use crate::labor::{Backup, Ending};
use crate::model::{BackupOptions, BitmapMode, FileTarget, Sync};
use crate::nodes::{Writing, bitmap_of, incompressible, no_node, not_found};

/// Where a backup is written to.
pub(super) enum Target {
    Node(String),
    File(FileTarget),
}

/// A backup that has all it needs but the cut.
pub(super) struct Ready {
    pub(super) seat: Seat,
    pub(super) source: Source,
    target: Writing,
    options: BackupOptions,
    /// Of a disk's bitmap.
    lock: Option<BitmapLock>,
    /// Bitmaps that the same transaction cleans.
    pub(super) cleaned: Vec<BitmapLock>,
    /// What is copied; all if `None`.
    pub(super) marked: Option<DirtyBitmap>,
}

impl Ready {
    /// Whether it is to copy this disk, so that its success says something of the disk's bitmaps.
    pub(super) fn copies(&self, disk: &str) -> bool {
        self.source.disk() == disk && self.options.sync != Sync::None
    }
}

impl Plan<'_> {
    pub(super) fn backup(&mut self, options: BackupOptions, target: Target) -> Result<()> {
        check(&options)?;
        let source = self.owner(&options.device)?;
        if options.sync == Sync::None && matches!(source, Source::Access(_)) {
            return Err(invalid(
                "what a snapshot-access node shows does not change: sync 'none' would copy nothing",
            ));
        }
        let id = match (&options.job.job_id, &source) {
            (Some(id), _) => id.clone(),
            (None, Source::Disk(disk)) => disk.clone(),
            (None, Source::Access(_)) => return Err(invalid("An explicit job ID is required for this node")),
        };
        let lock = match (&options.bitmap, &source) {
            (Some(name), Source::Disk(disk)) if self.backups.is_read_only(disk) => {
                let story = format!("Bitmap '{name}' is readonly and cannot be modified");
                return Err(Error::new(ErrorKind::ReadOnly, story));
            }
            (Some(name), Source::Disk(disk)) if !self.backups.manager.has_bitmap(disk, name)? => {
                return Err(invalid(&format!("Bitmap '{name}' could not be found")));
            }
            (Some(name), Source::Disk(disk)) => Some(self.backups.manager.bitmap_lock(disk, name)?),
            _ => None,
        };
        // Before anything is written to a file.
        let seat = self.backups.manager.enter_job(HostedJob {
            id,
            kind: JobType::Backup,
            speed: options.job.speed,
            auto_finalize: options.job.auto_finalize,
            auto_dismiss: options.job.auto_dismiss,
            client: self.client,
            group: self.group.clone(),
        })?;
        let target = self.target(target, &source, options.compress)?;
        match &source {
            Source::Disk(disk) => drop(self.disks.insert(disk.clone())),
            Source::Access(access) => self.need(&access.filter),
        }
        self.ready.push(Ready { seat, source, target, options, lock, cleaned: Vec::new(), marked: None });
        Ok(())
    }

    fn target(&self, target: Target, source: &Source, compress: bool) -> Result<Writing> {
        let disks = self.backups.manager.disks();
        let disk =
            disks.iter().find(|disk| disk.id == source.disk()).ok_or_else(|| no_node(source.disk()))?;
        let nodes = &self.backups.nodes;
        let node = match target {
            Target::Node(name) => match self.backups.disk_of(&name) {
                Some(disk) if disk == source.disk() => {
                    return Err(invalid("Source and target cannot be the same"));
                }
                Some(disk) => {
                    let story = format!("disk '{disk}' is its guest's: a target is an image that was added");
                    return Err(Error::new(ErrorKind::Unsupported, story));
                }
                None => nodes.get(&name).ok_or_else(|| no_node(&name))?,
            },
            Target::File(file) => {
                // What a client is shown as the disk's format.
                let active = disk.layers.last().ok_or_else(|| no_node(&disk.id))?;
                let format = file.format(active.format)?;
                // Before a file is emptied.
                if compress && format == ImageFormat::Raw {
                    return Err(incompressible(&file.target.to_string_lossy()));
                }
                nodes.file_target(&file, format, disk.capacity)?
            }
        };
        let target = Writing::begin(node, disk.capacity)?;
        if compress {
            target.compressible()?;
        }
        Ok(target)
    }

    /// What a backup copies; all if `None`.
    pub(super) fn marked(
        &self,
        ready: &Ready,
        pins: &[&Pin],
        staged: &[Staged],
    ) -> Result<Option<DirtyBitmap>> {
        let (Sync::Incremental | Sync::Bitmap, Some(name)) = (ready.options.sync, &ready.options.bitmap)
        else {
            return Ok(None);
        };
        match (&ready.source, &ready.lock) {
            (Source::Access(access), _) => {
                let own = access.filter.view().pin.clone();
                let cut = pins.iter().copied().find(|pin| pin.id() == access.filter.disk);
                let pin = cut.or(own.as_deref()).ok_or_else(|| no_node(&access.filter.disk))?;
                let known = staged.iter().find(|(known, _)| Arc::ptr_eq(known, access));
                let bitmaps = known.map_or_else(|| access.bitmaps().clone(), |(_, bitmaps)| bitmaps.clone());
                bitmap_of(&bitmaps, name, pin.disk().capacity()).map(Some)
            }
            (Source::Disk(disk), Some(lock)) => {
                let pin = pins.iter().copied().find(|pin| pin.id() == disk).ok_or_else(|| no_node(disk))?;
                lock.dirty(pin).map(Some)
            }
            (Source::Disk(_), None) => Err(not_found(name)),
        }
    }
}

pub(super) fn begin(ready: Ready, pins: &BTreeMap<String, Arc<Pin>>) -> Result<()> {
    let Ready { seat, source, target, options, lock, cleaned, marked } = ready;
    let pin = match &source {
        Source::Disk(disk) => pins.get(disk).cloned(),
        Source::Access(access) => access.filter.view().pin.clone(),
    };
    let pin = pin.ok_or_else(|| no_node(source.disk()))?;
    let policies = Policies { read: options.on_source_error, write: options.on_target_error };
    if options.sync == Sync::None {
        let (compress, _shown) = (options.compress, target.show(&pin));
        return seat.start(Box::new(Fleece { pin, target, policies, compress, _shown }));
    }
    let ending = match (options.sync, options.bitmap_mode) {
        (Sync::Incremental, _) | (_, Some(BitmapMode::OnSuccess)) => Ending::OnSuccess,
        (_, Some(BitmapMode::Always)) => Ending::Always,
        (_, Some(BitmapMode::Never) | None) => Ending::Stays,
    };
    let cleaned = cleaned.into_iter().map(|lock| (lock, Ending::OnSuccess));
    let work = Backup {
        copying: Copying::new(&pin, target, marked, options.compress, policies)?,
        pin,
        bitmaps: lock.map(|lock| (lock, ending)).into_iter().chain(cleaned).collect(),
        _access: match source {
            Source::Access(access) => Some(access),
            Source::Disk(_) => None,
        },
    };
    seat.start(Box::new(work))
}
