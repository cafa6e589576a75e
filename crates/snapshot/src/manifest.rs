//! The manifest: which images make up each disk, and which snapshots there are.
//!
//! It is one small JSON file in the state directory, replaced whole. In PREPARE it names the new overlay *before*
//! the overlay is used: an empty overlay reads the same as the layer beneath, so whichever of the two manifests a
//! crash leaves, the chain it names holds what the guest wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use block::{Context, Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::jobs::JobRecord;
use crate::marks::{Boundary, CheckpointRecord, DiskMarks, PinEntry};
use crate::model::{ImageFormat, SnapshotDisk, SnapshotRecord};

/// The version of the file's layout that this code reads and writes.
const VERSION: u32 = 1;

/// All that must be known to find the disks again.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Manifest {
    version: u32,
    /// The boot of the host in which this was written. What was not synced then is in the page cache of that boot,
    /// or lost.
    pub(crate) boot_id: String,
    /// By disk id.
    pub(crate) disks: BTreeMap<String, DiskEntry>,
    /// The oldest first.
    pub(crate) snapshots: Vec<SnapshotRecord>,
    /// The snapshot whose overlays are prepared, while its cut is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pending: Option<String>,
    /// Snapshots whose deletion was begun: their images hold a mixture of then and now.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) deleting: BTreeSet<String>,
    /// Jobs that have not concluded, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) jobs: Vec<JobRecord>,
    /// Images that have left their chain and are about to be removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) unused: Vec<Unused>,
    /// In the order in which they were made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) checkpoints: Vec<CheckpointRecord>,
    /// What this process reads of layers; see [`Store::change_pins`](crate::store::Store::change_pins).
    #[serde(skip)]
    pub(crate) pins: Vec<PinEntry>,
}

/// An image that no chain has any more.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Unused {
    pub(crate) disk: String,
    pub(crate) layer: LayerEntry,
}

/// One disk's images.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct DiskEntry {
    /// The base first, the active layer last. Never empty.
    pub(crate) layers: Vec<LayerEntry>,
    /// The number of the next overlay; numbers are never used again.
    pub(crate) next: u32,
    /// The image that the user gave, once it has left the chain: pulled up whole, it is not used any more. The disk is
    /// known by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) base: Option<Base>,
    /// What is known of its changes, apart from what its layers tell.
    #[serde(default, skip_serializing_if = "DiskMarks::is_empty")]
    pub(crate) marks: DiskMarks,
}

/// An image that the user gave.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Base {
    pub(crate) path: PathBuf,
    pub(crate) format: ImageFormat,
}

impl DiskEntry {
    /// Its layers' numbers, the base's first.
    pub(crate) fn numbers(&self) -> Vec<u32> {
        self.layers.iter().map(|layer| layer.number).collect()
    }

    /// Refuses what no change of the manifest leaves behind: what counts with these numbers relies on it.
    fn check(&self) -> std::result::Result<(), &'static str> {
        if self.layers.is_empty() {
            return Err("has no layers");
        }
        let grows = |pair: &[LayerEntry]| matches!(pair, [low, high] if low.number < high.number);
        if !self.layers.windows(2).all(grows) {
            return Err("has layers whose numbers do not grow");
        }
        let highest = |layer: &LayerEntry| layer.merged.unwrap_or(layer.number);
        if self.layers.iter().any(|layer| !(layer.number..self.next).contains(&highest(layer))) {
            return Err("has a layer, or one that was merged into it, whose number was never given");
        }
        match self.marks.is_sound(self.next) {
            true => Ok(()),
            false => Err("has marks at instants that never were"),
        }
    }

    /// The image that the user gave.
    pub(crate) fn given(&self) -> Base {
        let first = self.layers.first().map(|layer| (layer.path.clone(), layer.format));
        let (path, format) = first.unwrap_or_else(|| (PathBuf::new(), ImageFormat::Raw));
        self.base.clone().unwrap_or(Base { path, format })
    }
}

/// One image.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct LayerEntry {
    /// Where it is, absolute.
    pub(crate) path: PathBuf,
    /// Its format.
    pub(crate) format: ImageFormat,
    /// Its number; the base is 0.
    pub(crate) number: u32,
    /// Whether it is on stable storage, with its tables. Until then it is brought there before it is only read: no
    /// flush of the guest would reach it any more.
    #[serde(default)]
    pub(crate) sealed: bool,
    /// The highest number of those that were merged down into it, if any were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) merged: Option<u32>,
}

impl LayerEntry {
    /// The boundary above it: what it holds was written before, what the layers above hold was written after.
    pub(crate) fn boundary(&self) -> Boundary {
        self.merged.unwrap_or(self.number).saturating_add(1)
    }
}

/// Which of a disk's layers may not be on stable storage.
#[derive(Clone, Debug)]
pub(crate) struct Unsealed<'a> {
    pub(crate) disk: &'a str,
    /// This one and all above it, by its number; the active layer, or one that is sealing.
    pub(crate) from: Option<u32>,
    /// Those of which a sync has failed.
    pub(crate) failed: Vec<u32>,
}

impl Manifest {
    /// One that knows nothing yet.
    pub(crate) fn empty(boot_id: &str) -> Self {
        let boot_id = boot_id.to_owned();
        Self {
            version: VERSION,
            boot_id,
            disks: BTreeMap::new(),
            snapshots: Vec::new(),
            pending: None,
            deleting: BTreeSet::new(),
            jobs: Vec::new(),
            unused: Vec::new(),
            checkpoints: Vec::new(),
            pins: Vec::new(),
        }
    }

    /// The manifest in `path`, or `None` if there is none.
    pub(crate) fn load(path: &Path) -> Result<Option<Self>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::from(error).context(format!("read {}", path.display()))),
        };
        let manifest = Self::parse(&bytes).context(|| format!("read {}", path.display()))?;
        Ok(Some(manifest))
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let corrupt = |story: String| Error::new(ErrorKind::Corrupt, story);
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|error| corrupt(format!("not a manifest of this version of frazil: {error}")))?;
        if manifest.version != VERSION {
            return Err(corrupt(format!("its version is {}, expected {VERSION}", manifest.version)));
        }
        for (id, disk) in &manifest.disks {
            disk.check().map_err(|story| corrupt(format!("disk {id} {story}")))?;
        }
        Ok(manifest)
    }

    /// Replaces the file at `path` by this; durable when it returns.
    pub(crate) fn store(&self, path: &Path) -> Result<()> {
        let mut bytes = serde_json::to_vec_pretty(self).map_err(std::io::Error::from)?;
        bytes.push(b'\n');
        hostio::replace_file(path, &bytes)
    }

    /// The snapshot of that name.
    pub(crate) fn snapshot(&self, name: &str) -> Result<&SnapshotRecord> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name).ok_or_else(|| {
            let story = format!("there is no snapshot '{name}'");
            Error::new(ErrorKind::NotFound, story)
        })
    }

    /// The disk of that id.
    pub(crate) fn disk(&self, id: &str) -> Result<&DiskEntry> {
        self.disks.get(id).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no disk '{id}'; see `frazil status`"))
        })
    }

    /// The index, in the disk's layers, of the image that holds the snapshot.
    pub(crate) fn layer_of(&self, name: &str, id: &str) -> Result<usize> {
        let snapshot = self.snapshot(name)?;
        let held = snapshot.disks.iter().find(|disk| disk.id == id).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("disk '{id}' is not part of snapshot '{name}'"))
        })?;
        self.disk(id)?.layers.iter().position(|layer| layer.path == held.path).ok_or_else(|| {
            let story =
                format!("the image {} of snapshot '{name}' is no longer in the chain", held.path.display());
            Error::new(ErrorKind::NotFound, story)
        })
    }

    /// The snapshot of that name, if its images still hold it.
    pub(crate) fn intact(&self, name: &str) -> Result<&SnapshotRecord> {
        let snapshot = self.snapshot(name)?;
        if self.deleting.contains(name) {
            let story =
                format!("deleting snapshot '{name}' was begun, its images hold it no more: delete it again");
            return Err(Error::new(ErrorKind::Busy, story));
        }
        Ok(snapshot)
    }

    /// The snapshots of a disk that one of its images holds.
    pub(crate) fn held_by(&self, id: &str, path: &Path) -> impl Iterator<Item = &SnapshotRecord> {
        let holds = move |held: &SnapshotDisk| held.id == id && held.path == path;
        self.snapshots.iter().filter(move |snapshot| snapshot.disks.iter().any(holds))
    }

    /// Enters a snapshot that was taken, or its new state.
    pub(crate) fn enter(&mut self, record: &SnapshotRecord) {
        self.pending = None;
        for disk in record.disks.iter().filter(|_| record.sealed) {
            let layers = self.disks.get_mut(&disk.id).map(|disk| &mut disk.layers[..]).unwrap_or_default();
            layers.iter_mut().filter(|layer| layer.path == disk.path).for_each(|layer| layer.sealed = true);
        }
        match self.snapshots.iter_mut().find(|snapshot| snapshot.name == record.name) {
            Some(known) => known.clone_from(record),
            None => self.snapshots.push(record.clone()),
        }
    }

    /// Takes a snapshot off the list.
    pub(crate) fn forget(&mut self, name: &str) {
        self.snapshots.retain(|snapshot| snapshot.name != name);
        self.deleting.remove(name);
    }

    /// Puts a new overlay on `beneath`, the layer that is active: what an undo could not take off again is not.
    pub(crate) fn push_layer(&mut self, id: &str, beneath: &LayerEntry, entry: &LayerEntry) {
        if let Some(disk) = self.disks.get_mut(id) {
            disk.next = disk.next.max(entry.number + 1);
            let active = disk.layers.iter().position(|layer| layer.number == beneath.number);
            disk.layers.truncate(active.map_or(usize::MAX, |active| active + 1));
            disk.layers.push(entry.clone());
        }
    }

    /// Takes it off again; its number stays used.
    pub(crate) fn pop_layer(&mut self, id: &str, entry: &LayerEntry) {
        if let Some(disk) = self.disks.get_mut(id) {
            disk.layers.retain(|layer| layer.number != entry.number);
        }
    }

    /// Notes whether a layer is on stable storage.
    pub(crate) fn set_sealed(&mut self, id: &str, number: u32, sealed: bool) {
        let layers = self.disks.get_mut(id).map(|disk| &mut disk.layers[..]).unwrap_or_default();
        layers.iter_mut().filter(|layer| layer.number == number).for_each(|layer| layer.sealed = sealed);
    }

    /// Notes that the layers of these disks are on stable storage, but for those given and those that a job writes to. Tells
    /// which snapshots that completes.
    pub(crate) fn mark_sealed(&mut self, disks: &[Unsealed<'_>]) -> Vec<String> {
        let moves = self.jobs.iter().flat_map(|job| &job.moves);
        let targets: BTreeSet<_> = moves.map(|one| (one.disk.clone(), one.target())).collect();
        for Unsealed { disk: id, from, failed } in disks {
            let layers = self.disks.get_mut(*id).map(|disk| &mut disk.layers[..]).unwrap_or_default();
            let end = layers.iter().position(|layer| Some(layer.number) == *from).unwrap_or(layers.len());
            let fixed = |layer: &LayerEntry| !targets.contains(&((*id).to_owned(), layer.number));
            let layers = layers.iter_mut().enumerate().filter(|(_, layer)| fixed(layer));
            layers.for_each(|(index, layer)| layer.sealed = index < end && !failed.contains(&layer.number));
        }
        let layers = self.disks.values().flat_map(|disk| &disk.layers);
        let sealed: BTreeSet<_> =
            layers.filter(|layer| layer.sealed).map(|layer| layer.path.clone()).collect();
        let mut completed = Vec::new();
        for snapshot in self.snapshots.iter_mut().filter(|snapshot| !snapshot.sealed) {
            snapshot.sealed = snapshot.disks.iter().all(|disk| sealed.contains(&disk.path));
            completed.extend(snapshot.sealed.then(|| snapshot.name.clone()));
        }
        completed
    }

    /// Takes a layer out of a disk's chain. Its image is removed later, but for the one that the user gave.
    pub(crate) fn remove_layer(&mut self, id: &str, entry: &LayerEntry) {
        let Some(disk) = self.disks.get_mut(id) else { return };
        disk.layers.retain(|layer| layer.number != entry.number);
        match entry.number {
            0 => disk.base = Some(Base { path: entry.path.clone(), format: entry.format }),
            _ => self.unused.push(Unused { disk: id.to_owned(), layer: entry.clone() }),
        }
    }

    /// The layers from `from` on were merged down into it: it holds the snapshot that `from` held, and is read instead of it.
    pub(crate) fn merge_down(&mut self, id: &str, from: &LayerEntry, to: &LayerEntry) {
        let parts = self.snapshots.iter_mut().flat_map(|snapshot| &mut snapshot.disks);
        for part in parts.filter(|part| part.id == id && part.path == from.path) {
            (part.path, part.format) = (to.path.clone(), to.format);
        }
        let pins = self.pins.iter_mut().filter(|pin| pin.disk == id && pin.holder == from.number);
        pins.for_each(|pin| pin.holder = to.number);
        let layers = self.disks.get_mut(id).map(|disk| &mut disk.layers[..]).unwrap_or_default();
        let highest = layers.iter().find(|layer| layer.number == from.number).map(LayerEntry::boundary);
        let target = layers.iter_mut().find(|layer| layer.number == to.number);
        if let Some((target, boundary)) = target.zip(highest) {
            target.merged = Some(boundary - 1);
        }
    }

    /// Snapshots held by layers of `id` from index `from` on, the oldest first.
    pub(crate) fn snapshots_from(&self, id: &str, from: usize) -> Vec<&SnapshotRecord> {
        let layers = self.disks.get(id).map_or(&[][..], |disk| disk.layers.get(from..).unwrap_or_default());
        let holds = |snapshot: &SnapshotRecord| {
            snapshot
                .disks
                .iter()
                .any(|held| held.id == id && layers.iter().any(|layer| layer.path == held.path))
        };
        self.snapshots.iter().filter(|snapshot| holds(snapshot)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_comes_back_as_it_was_stored() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest.json");
        assert_eq!(Manifest::load(&path).unwrap(), None);
        let mut manifest = Manifest::empty("boot");
        let layer = LayerEntry {
            path: "/images/a.raw".into(),
            format: ImageFormat::Raw,
            number: 0,
            sealed: false,
            merged: None,
        };
        manifest
            .disks
            .insert("vda".into(), DiskEntry { layers: vec![layer], next: 1, ..DiskEntry::default() });
        manifest.store(&path).unwrap();
        assert_eq!(Manifest::load(&path).unwrap(), Some(manifest));
    }

    #[test]
    fn what_is_not_a_manifest_is_refused_with_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest.json");
        let entry = r#"{"version":1,"boot-id":"b","disks":{"vda":{"layers":[],"next":1}},"snapshots":[]}"#;
        let numbered = |numbers: &str, next: u32, rest: &str| {
            let layer = |number: &str| format!(r#"{{"path":"/a","format":"raw","number":{number}}}"#);
            let layers: Vec<_> = numbers.split(' ').map(layer).collect();
            entry.replace(r#"[],"next":1"#, &format!(r#"[{}],"next":{next}{rest}"#, layers.join(",")))
        };
        std::fs::write(&path, numbered("0 1 4", 5, "")).unwrap();
        Manifest::load(&path).unwrap();
        let history = |history: &str| numbered("0 1", 2, &format!(r#","marks":{{"history":{{{history}}}}}"#));
        let numbers = [
            numbered("1 0", 2, ""),
            numbered("0 0", 2, ""),
            numbered("0 2", 2, ""),
            numbered("4294967295", u32::MAX, ""),
            numbered(r#"0,"merged":2"#, 2, ""),
            numbered(r#"1,"merged":0"#, 2, ""),
            history(r#""folded":[{"from":1,"to":1,"bits":null}]"#),
            history(r#""folded":[{"from":0,"to":1,"bits":18446744073709551615}]"#),
            history(r#""reverts":[{"to":4294967295,"at":4294967295}]"#),
        ];
        let others = ["", "{}", "[1,2", &entry.replace(":1,", ":9,"), entry];
        for bytes in others.into_iter().chain(numbers.iter().map(String::as_str)) {
            std::fs::write(&path, bytes).unwrap();
            let error = Manifest::load(&path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{bytes}");
            assert!(error.to_string().contains("manifest.json"), "{error}");
        }
    }
}
