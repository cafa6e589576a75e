//! Dirty bitmaps: QEMU's, told from the layers.
//!
//! A bitmap is what changed since an instant, if it records, and what is in a bits file besides. Writes cost it nothing.
//! To begin or to end recording at an instant takes a cut (without a snapshot), as only a cut has a layer of its own from
//! there on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{DirtyBitmap, Disk as _, Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use super::bits;
use super::changes::{Look, granularity_bits};
use super::draft::Draft;
use super::entry::{BitmapEntry, CheckpointRecord, Instant};
use crate::group::Served;

/// The longest name, in bytes: QEMU's `BDRV_BITMAP_MAX_NAME_SIZE`.
const MAX_NAME: usize = 1023;

/// Bitmaps that a disk may have: QEMU's images have room for as many (`BME_MAX_BITMAPS` is 65535, the manifest is rewritten
/// with each change).
const MAX_BITMAPS: usize = 256;

/// The granularity of a bitmap that is given none, in bytes: QEMU's, for images without clusters.
pub const DEFAULT_GRANULARITY: u32 = 65_536;

/// A dirty bitmap, as clients are told of it: QEMU's `BlockDirtyInfo`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapInfo {
    /// Its name, unique among the disk's bitmaps.
    pub name: String,
    /// Bytes that are dirty.
    pub count: u64,
    /// Bytes that one bit speaks for.
    pub granularity: u32,
    /// Whether what is written becomes dirty.
    pub recording: bool,
    /// Whether an operation uses it, and nothing else may.
    pub busy: bool,
    /// Whether it outlives the daemon.
    pub persistent: bool,
    /// Whether it is of no use but to be removed: what it told is lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub inconsistent: bool,
}

/// A bitmap, by its disk and name.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct BitmapName {
    /// The disk's id.
    pub disk: String,
    /// Its name.
    pub name: String,
}

/// A change of marks, as part of a cut or by itself.
#[derive(Clone, Debug, PartialEq)]
pub enum MarkChange {
    /// Make a checkpoint of all disks of the cut.
    Checkpoint {
        /// Its name.
        name: String,
    },
    /// Make a bitmap, clean.
    Add {
        /// Which.
        bitmap: BitmapName,
        /// Bytes that one bit speaks for: a power of two, 512 at least.
        granularity: u32,
        /// Whether it outlives the daemon.
        persistent: bool,
        /// Whether it records from the start.
        recording: bool,
    },
    /// Remove one.
    Remove(BitmapName),
    /// Make one clean.
    Clear(BitmapName),
    /// Have one record.
    Enable(BitmapName),
    /// Have one record no more; what is dirty stays so.
    Disable(BitmapName),
    /// Make dirty in `target` what is dirty in any of `sources`, at the cut or now. Those may be of other disks of the same
    /// size.
    Merge {
        /// What is changed.
        target: BitmapName,
        /// What is read.
        sources: Vec<BitmapName>,
    },
}

/// The bitmaps that operations use.
#[derive(Clone, Debug, Default)]
pub(super) struct Busy(Arc<Mutex<BTreeSet<BitmapName>>>);

impl Busy {
    pub(super) fn names(&self) -> MutexGuard<'_, BTreeSet<BitmapName>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one.
    pub(super) fn take(&self, bitmap: &BitmapName) -> Result<()> {
        self.check(bitmap)?;
        self.names().insert(bitmap.clone());
        Ok(())
    }

    fn check(&self, bitmap: &BitmapName) -> Result<()> {
        match self.names().contains(bitmap) {
            false => Ok(()),
            true => {
                let story = format!(
                    "Bitmap '{}' is currently in use by another operation and cannot be used",
                    bitmap.name
                );
                Err(Error::new(ErrorKind::Busy, story))
            }
        }
    }
}

/// Makes changes on a draft, one after the other.
pub(super) struct Changer<'a> {
    pub(super) served: &'a BTreeMap<String, Served>,
    pub(super) busy: &'a Busy,
    /// The disks that are cut, and the instant; of a trial, any.
    pub(super) cuts: &'a BTreeMap<String, Instant>,
    /// What a checkpoint is told of the cut.
    pub(super) told: Option<&'a CheckpointRecord>,
    /// Nothing is written: whether the changes can be made.
    pub(super) is_trial: bool,
}

impl Changer<'_> {
    pub(super) fn make(&self, draft: &mut Draft<'_>, changes: &[MarkChange]) -> Result<()> {
        changes.iter().try_for_each(|change| self.change(draft, change))
    }

    fn change(&self, draft: &mut Draft<'_>, change: &MarkChange) -> Result<()> {
        match change {
            MarkChange::Checkpoint { name } => self.checkpoint(draft, name),
            MarkChange::Add { bitmap, granularity, persistent, recording } => {
                self.check_new(draft, bitmap, *granularity)?;
                let since = recording.then(|| self.cut(&bitmap.disk)).transpose()?;
                let entry = BitmapEntry {
                    name: bitmap.name.clone(),
                    granularity: *granularity,
                    persistent: *persistent,
                    since,
                    bits: None,
                };
                let disk = draft.manifest.disks.get_mut(&bitmap.disk);
                disk.into_iter().for_each(|disk| disk.marks.bitmaps.push(entry.clone()));
                Ok(())
            }
            MarkChange::Remove(bitmap) => {
                draft.manifest.bitmap(&bitmap.disk, &bitmap.name)?;
                self.busy.check(bitmap)?;
                let disk = draft.manifest.disks.get_mut(&bitmap.disk);
                let bitmaps = disk.map(|disk| &mut disk.marks.bitmaps);
                bitmaps.into_iter().for_each(|all| all.retain(|one| one.name != bitmap.name));
                Ok(())
            }
            MarkChange::Clear(bitmap) => {
                let entry = self.usable(draft, bitmap)?;
                let since = entry.since.map(|_| self.cut(&bitmap.disk)).transpose()?;
                let entry = draft.manifest.bitmap_mut(&bitmap.disk, &bitmap.name)?;
                (entry.bits, entry.since) = (None, since);
                Ok(())
            }
            MarkChange::Enable(bitmap) => {
                let entry = self.usable(draft, bitmap)?;
                if entry.since.is_none() {
                    let since = self.cut(&bitmap.disk)?;
                    draft.manifest.bitmap_mut(&bitmap.disk, &bitmap.name)?.since = Some(since);
                }
                Ok(())
            }
            MarkChange::Disable(bitmap) => {
                if self.usable(draft, bitmap)?.since.is_some() {
                    let dirty = self.dirty(draft, bitmap)?;
                    self.keep(draft, bitmap, &dirty)?.since = None;
                }
                Ok(())
            }
            MarkChange::Merge { target, sources } => self.merge(draft, target, sources),
        }
    }

    fn check_new(&self, draft: &Draft<'_>, bitmap: &BitmapName, granularity: u32) -> Result<()> {
        let refuse = |story: String| Err(Error::new(ErrorKind::InvalidInput, story));
        let bitmaps = &draft.manifest.disk(&bitmap.disk)?.marks.bitmaps;
        let capacity = self.served.get(&bitmap.disk).map_or(0, |disk| disk.chain.capacity());
        DirtyBitmap::check(capacity, granularity_bits(granularity.into())?)?;
        if bitmap.name.is_empty() {
            return refuse("Bitmap name cannot be empty".to_owned());
        }
        if bitmap.name.len() > MAX_NAME {
            return refuse(format!("Bitmap name is too long: {}", bitmap.name));
        }
        if bitmaps.iter().any(|one| one.name == bitmap.name) {
            return refuse(format!("Bitmap already exists: {}", bitmap.name));
        }
        if bitmaps.len() >= MAX_BITMAPS {
            return refuse(format!("disk '{}' has {MAX_BITMAPS} bitmaps: remove some", bitmap.disk));
        }
        Ok(())
    }

    /// What `target` records goes on as it did.
    fn merge(&self, draft: &mut Draft<'_>, target: &BitmapName, sources: &[BitmapName]) -> Result<()> {
        let own = BitmapEntry { since: None, ..self.usable(draft, target)?.clone() };
        let own = self.dirty_in(draft, &target.disk, &own)?;
        for source in sources {
            self.usable(draft, source)?;
            let more = self.dirty(draft, source)?;
            if more.capacity() != own.capacity() {
                let (own, more) = (own.capacity(), more.capacity());
                let story = format!(
                    "Bitmaps are of different sizes (destination size is {own} and source size is {more}) and can't be \
                     merged"
                );
                return Err(Error::new(ErrorKind::InvalidInput, story));
            }
            bits::add(&own, &more);
        }
        self.keep(draft, target, &own).map(drop)
    }

    /// Writes down what is dirty in a bitmap, apart from what it records.
    fn keep<'d>(
        &self,
        draft: &'d mut Draft<'_>,
        bitmap: &BitmapName,
        dirty: &DirtyBitmap,
    ) -> Result<&'d mut BitmapEntry> {
        let file = if self.is_trial { None } else { Some(draft.create(dirty)?) };
        let entry = draft.manifest.bitmap_mut(&bitmap.disk, &bitmap.name)?;
        entry.bits = file;
        Ok(entry)
    }

    fn dirty(&self, draft: &Draft<'_>, bitmap: &BitmapName) -> Result<DirtyBitmap> {
        self.dirty_in(draft, &bitmap.disk, draft.manifest.bitmap(&bitmap.disk, &bitmap.name)?)
    }

    /// What is dirty at the cut, or now if the disk is not cut; of a trial, nothing.
    fn dirty_in(&self, draft: &Draft<'_>, disk: &str, entry: &BitmapEntry) -> Result<DirtyBitmap> {
        let look = Look::new(draft.store(), &draft.manifest, self.served, disk)?;
        if self.is_trial {
            return DirtyBitmap::new(look.now().capacity, granularity_bits(entry.granularity.into())?);
        }
        let to = self.cuts.get(disk).copied().unwrap_or(look.now());
        dirty(&look, entry, to)
    }

    fn usable<'d>(&self, draft: &'d Draft<'_>, bitmap: &BitmapName) -> Result<&'d BitmapEntry> {
        let entry = draft.manifest.bitmap(&bitmap.disk, &bitmap.name)?;
        self.busy.check(bitmap)?;
        Ok(entry)
    }

    /// The instant at which a disk is cut.
    fn cut(&self, disk: &str) -> Result<Instant> {
        let story = || Error::new(ErrorKind::InvalidInput, format!("disk '{disk}' is not part of the cut"));
        self.cuts.get(disk).copied().ok_or_else(story)
    }

    fn checkpoint(&self, draft: &mut Draft<'_>, name: &str) -> Result<()> {
        super::checkpoint::check_new(&draft.manifest, name)?;
        let record = self.told.map(|record| CheckpointRecord { name: name.to_owned(), ..record.clone() });
        draft.manifest.checkpoints.extend(record);
        Ok(())
    }
}

/// What is dirty in a bitmap at an instant.
///
/// Errors: [`ErrorKind::Corrupt`], in QEMU's words, if that is lost.
pub(super) fn dirty(look: &Look<'_>, entry: &BitmapEntry, to: Instant) -> Result<DirtyBitmap> {
    let dirty = DirtyBitmap::new(to.capacity, granularity_bits(entry.granularity.into())?)?;
    let own = entry.bits.map(|file| look.store.bits().load(file)).transpose();
    let own = own.map(|own| own.iter().for_each(|own| bits::add(&dirty, own)));
    let told =
        own.and_then(|()| entry.since.map_or(Ok(()), |since| look.add_changes(&dirty, since, to.boundary)));
    told.map_err(|error| match error.kind() {
        ErrorKind::Corrupt => {
            let story =
                format!("Bitmap '{}' is inconsistent and cannot be used: take a full backup", entry.name);
            error.context(story)
        }
        _ => error,
    })?;
    Ok(dirty)
}
