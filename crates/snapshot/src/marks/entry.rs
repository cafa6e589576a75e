//! What the manifest remembers of marks.

use std::collections::BTreeSet;

use block::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::files::MOST_FILES;
use super::history::{Boundary, History, NOW};
use crate::manifest::{LayerEntry, Manifest};
use crate::model::{Grade, SnapshotRecord};

/// A checkpoint: an instant of one or more disks that what changed since can be asked for. It keeps no content.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckpointRecord {
    /// Its name, unique among the daemon's checkpoints.
    pub name: String,
    /// When it was, on the host's clock.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// How clean the guest's file systems were then.
    pub grade: Grade,
    /// Why it has that grade, in words.
    pub reason: String,
    /// The disks, all at the same instant.
    pub disks: Vec<CheckpointDisk>,
}

/// One disk's part of a checkpoint.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckpointDisk {
    /// The disk's id.
    pub id: String,
    /// The lowest number that a layer written since can have.
    pub boundary: u32,
    /// Bytes that the disk had.
    pub capacity: u64,
}

/// An instant of one disk.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Instant {
    pub(crate) boundary: Boundary,
    /// Bytes that the disk had.
    pub(crate) capacity: u64,
}

/// A dirty bitmap of a disk, QEMU's.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct BitmapEntry {
    pub(crate) name: String,
    /// Bytes that one bit speaks for.
    pub(crate) granularity: u32,
    pub(crate) persistent: bool,
    /// What changed since then is dirty; `None` while it does not record.
    pub(crate) since: Option<Instant>,
    /// The bits file of what is dirty besides.
    pub(crate) bits: Option<u64>,
}

/// One disk's marks.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct DiskMarks {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) bitmaps: Vec<BitmapEntry>,
    #[serde(default, skip_serializing_if = "History::is_empty")]
    pub(crate) history: History,
}

impl DiskMarks {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether all is of instants that a disk can have had whose next layer has the number `next`, and of files that there
    /// can be.
    pub(crate) fn is_sound(&self, next: u32) -> bool {
        let mut files = self.files();
        self.history.is_sound(next) && files.all(|number| number < MOST_FILES)
    }

    /// The bits files that are named.
    fn files(&self) -> impl Iterator<Item = u64> {
        self.bitmaps.iter().filter_map(|bitmap| bitmap.bits).chain(self.history.files())
    }
}

/// A layer that is read at its boundary, as long as this process wants.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct PinEntry {
    pub(crate) id: u64,
    pub(crate) disk: String,
    /// The number of the layer that holds it.
    pub(crate) holder: u32,
}

impl Manifest {
    /// The boundaries of a disk that may be asked for, apart from now.
    pub(crate) fn points(&self, id: &str) -> BTreeSet<Boundary> {
        let Some(disk) = self.disks.get(id) else { return BTreeSet::new() };
        let parts = self.checkpoints.iter().flat_map(|checkpoint| &checkpoint.disks);
        let checkpoints = parts.filter(|part| part.id == id).map(|part| part.boundary);
        let since = disk.marks.bitmaps.iter().filter_map(|bitmap| bitmap.since);
        let intact = self.snapshots.iter().filter(|snapshot| !self.deleting.contains(&snapshot.name));
        let held = intact.flat_map(|snapshot| &snapshot.disks).filter(|part| part.id == id);
        let held = held.filter_map(|part| disk.layers.iter().find(|layer| layer.path == part.path));
        let pinned = self.pins.iter().filter(|pin| pin.disk == id);
        let pinned = pinned.filter_map(|pin| disk.layers.iter().find(|layer| layer.number == pin.holder));
        let above = held.chain(pinned).map(|layer| layer.boundary());
        checkpoints.chain(since.map(|since| since.boundary)).chain(above).collect()
    }

    /// The checkpoint of that name.
    pub(crate) fn checkpoint(&self, name: &str) -> Result<&CheckpointRecord> {
        self.checkpoints
            .iter()
            .find(|checkpoint| checkpoint.name == name)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no checkpoint '{name}'")))
    }

    /// The snapshot of that name, as an instant. Not one that a job has begun to do away with: nothing was folded for it, so
    /// once its layer is merged, into the one above as well, what was written before it is not told from what was after.
    pub(super) fn asked(&self, name: &str) -> Result<&SnapshotRecord> {
        let snapshot = self.intact(name)?;
        match self.jobs.iter().any(|job| job.takes_away(name)) {
            false => Ok(snapshot),
            true => Err(Error::new(ErrorKind::Busy, format!("snapshot '{name}' is being deleted"))),
        }
    }

    /// A disk's bitmap of that name.
    pub(crate) fn bitmap(&self, id: &str, name: &str) -> Result<&BitmapEntry> {
        let found = self.disk(id)?.marks.bitmaps.iter().find(|bitmap| bitmap.name == name);
        found.ok_or_else(|| no_bitmap(name))
    }

    /// The same, to be changed.
    pub(crate) fn bitmap_mut(&mut self, id: &str, name: &str) -> Result<&mut BitmapEntry> {
        let bitmaps = self.disks.get_mut(id).map(|disk| &mut disk.marks.bitmaps);
        let found = bitmaps.and_then(|bitmaps| bitmaps.iter_mut().find(|bitmap| bitmap.name == name));
        found.ok_or_else(|| no_bitmap(name))
    }

    /// Whether this process reads a layer at its boundary: what is above it must stay apart.
    pub(crate) fn is_pinned(&self, id: &str, number: u32) -> bool {
        self.pins.iter().any(|pin| pin.disk == id && pin.holder == number)
    }

    /// Whether a layer of a disk must not be written as the active one again: it holds a snapshot, or what is written to it
    /// would count as older than a mark, or not at all.
    pub(crate) fn must_not_go_on(&self, id: &str, layer: &LayerEntry) -> bool {
        let folded = self.disks.get(id).is_some_and(|disk| disk.marks.history.is_folded(layer.number));
        let holds = self.held_by(id, &layer.path).next().is_some() || self.is_pinned(id, layer.number);
        holds || folded || self.points(id).range(layer.number + 1..NOW).next().is_some()
    }

    /// The bits files that are named.
    pub(crate) fn bits_files(&self) -> BTreeSet<u64> {
        self.disks.values().flat_map(|disk| disk.marks.files()).collect()
    }

    /// Takes over the marks of `draft`, a changed copy of this.
    pub(super) fn adopt_marks(&mut self, draft: &Self) {
        self.checkpoints.clone_from(&draft.checkpoints);
        for (id, disk) in &mut self.disks {
            if let Some(drafted) = draft.disks.get(id) {
                disk.marks.clone_from(&drafted.marks);
            }
        }
    }

    /// Forgets what nobody can ask for.
    pub(crate) fn prune_marks(&mut self) {
        let points: Vec<_> = self.disks.keys().map(|id| self.points(id)).collect();
        for (disk, points) in self.disks.values_mut().zip(points) {
            disk.marks.history.prune(&points);
        }
    }
}

/// In QEMU's words, and of QEMU's class: not that for devices.
fn no_bitmap(name: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("Dirty bitmap '{name}' not found"))
}
