//! The state directory: one daemon's memory of its disks.
//!
//! ```text
//! STATE/lock             held by the one process that uses the directory
//! STATE/manifest.json    disks, layers, snapshots: replaced whole (see `manifest`)
//! STATE/thaw-owed.json   exists while a guest may be frozen
//! STATE/journal/         what active qcow2 layers have acknowledged but not flushed
//! STATE/layers/          overlays of disks whose base is not a regular file
//! STATE/marks/           what changed, of layers that were merged, and of dirty bitmaps
//! STATE/jobs/            notes of backups under way
//! ```

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Context, Error, ErrorKind, Result};
use hostio::{Cache, HostFile};
use qcow2::CreateOptions;
use tracing::{info, warn};

use crate::backing::AllowedFolders;
use crate::journals::JournalFolder;
use crate::layer::{Access, Beneath, Layer, Opening};
use crate::manifest::{DiskEntry, LayerEntry, Manifest, Unsealed, Unused};
use crate::marks::{BitsFiles, PinEntry};
use crate::model::{ImageFormat, SnapshotDisk, SnapshotRecord};

/// Where notes are of jobs that end with the daemon.
pub(crate) const NOTES: &str = "jobs";

/// How many numbers are tried for an overlay whose file name is taken by the rest of a crashed attempt.
const MAX_LEFTOVERS: u32 = 1000;

/// An open state directory.
#[derive(Debug)]
pub(crate) struct Store {
    folder: PathBuf,
    _lock: File,
    journals: JournalFolder,
    /// Where the files may be that base images name.
    folders: AllowedFolders,
    manifest: Mutex<Manifest>,
    /// Held by whoever changes the manifest, as long as the change is being written.
    writing: Mutex<()>,
    bits: BitsFiles,
}

impl Store {
    /// Opens the directory, making it if need be (mode 0700), for this process alone.
    pub(crate) fn open(folder: &Path, folders: AllowedFolders) -> Result<Self> {
        let folders_of_it = ["journal", "layers", "marks", NOTES].map(|name| folder.join(name));
        for path in [folder.to_owned()].into_iter().chain(folders_of_it) {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.context(|| format!("make the folder {}", path.display()))?;
        }
        let folder = folder.canonicalize().context(|| format!("open {}", folder.display()))?;
        let lock = lock(&folder)?;
        let boot_id = hostio::boot_id()?;
        let loaded = Manifest::load(&folder.join("manifest.json"))?;
        let journals = JournalFolder { path: folder.join("journal"), boot_id: boot_id.clone() };
        let manifest = Mutex::new(Manifest::empty(&boot_id));
        let named = loaded.as_ref().map(Manifest::bits_files).unwrap_or_default();
        let bits = BitsFiles::open(&folder.join("marks"), &named)?;
        let writing = Mutex::default();
        let store = Self { folder, _lock: lock, journals, folders, manifest, writing, bits };
        if let Some(manifest) = loaded {
            *store.manifest() = manifest;
            store.settle(&boot_id)?;
            store.remove_unused();
        }
        Ok(store)
    }

    /// Undoes what the last process left half done.
    fn settle(&self, boot_id: &str) -> Result<()> {
        let mut settled = self.manifest().clone();
        if let Some(name) = settled.pending.take() {
            // Its overlay stays: whether or not the guest wrote to it, the chain reads right.
            warn!(snapshot = name, "the daemon ended during this snapshot's cut: it was not taken");
        }
        let rebooted = settled.boot_id != boot_id;
        let unsealed: Vec<_> = settled.snapshots.iter().filter(|one| !one.sealed).cloned().collect();
        let mut is_unsynced = false;
        for SnapshotRecord { name, disks, .. } in &unsealed {
            if rebooted {
                warn!(snapshot = name, "the host went down before this snapshot was synced: dropped");
                settled.forget(name);
            } else if self.has_failed(&settled, disks)? {
                warn!(
                    snapshot = name,
                    "this snapshot could not be synced, and a part of it may be lost: dropped"
                );
                settled.forget(name);
                is_unsynced = true;
            } else {
                info!(snapshot = name, "the daemon ended before this snapshot was synced: it stands");
            }
        }
        // They live as long as the daemon did. The files of their bits go with the next change of marks.
        settled.disks.values_mut().for_each(|disk| disk.marks.bitmaps.retain(|bitmap| bitmap.persistent));
        boot_id.clone_into(&mut settled.boot_id);
        if settled == *self.manifest() {
            return Ok(());
        }
        let written = self.update(|manifest| {
            manifest.clone_from(&settled);
            Ok(())
        });
        if let Err(error) = written {
            if is_unsynced {
                // The next start would not know: opening the layers does away with the note.
                return Err(error.context("forget a snapshot that could not be synced"));
            }
            // No reason to keep a guest from its disks: the next change writes it, or the next start does it again.
            warn!(%error, "the state directory can not be written");
            *self.manifest() = settled;
        }
        Ok(())
    }

    /// Whether a sync of one of these images has failed in this boot, and the image has not been opened since.
    fn has_failed(&self, manifest: &Manifest, images: &[SnapshotDisk]) -> Result<bool> {
        for SnapshotDisk { id, path, .. } in images {
            let layers = manifest.disks.get(id).map_or(&[][..], |disk| &disk.layers);
            for layer in layers.iter().filter(|layer| layer.path == *path) {
                if self.journals.failure_note(id, layer.number).is_there()? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// The state directory.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where a small file of the state directory is.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The manifest as it is on disk.
    pub(crate) fn manifest(&self) -> MutexGuard<'_, Manifest> {
        self.manifest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the manifest, on disk first. On an error nothing has changed. Nobody who reads it waits for the disk.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Manifest) -> Result<()>) -> Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.manifest().clone();
        let mut changed = known.clone();
        change(&mut changed)?;
        let path = self.file("manifest.json");
        if let Err(error) = changed.store(&path) {
            // It may stand under its name all the same, and the caller is about to remove what it names.
            let _ = known.store(&path);
            return Err(error);
        }
        *self.manifest() = changed;
        Ok(())
    }

    /// Changes what this process reads, of which nothing is on disk.
    pub(crate) fn change_pins(&self, change: impl FnOnce(&mut Vec<PinEntry>)) {
        // Who is changing the manifest has a copy of them.
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut self.manifest().pins);
    }

    /// The files of changes.
    pub(crate) fn bits(&self) -> &BitsFiles {
        &self.bits
    }

    /// Enters a snapshot that was taken, which can not be undone: if it can not be written now, the next change of
    /// the manifest writes it.
    pub(crate) fn enter(&self, record: &SnapshotRecord) -> Result<()> {
        let written = self.update(|manifest| {
            manifest.enter(record);
            Ok(())
        });
        written.inspect_err(|_| self.manifest().enter(&SnapshotRecord { sealed: false, ..record.clone() }))
    }

    /// Makes the disk known with this base image; if it is known already, the base must be the same.
    pub(crate) fn declare(
        &self,
        id: &str,
        path: &Path,
        format: ImageFormat,
        how: Opening,
        read_only: bool,
    ) -> Result<()> {
        // Not resolved further: a device's stable name must stay, what it links to changes with each boot.
        let path = std::path::absolute(path).context(|| format!("disk {id}: {}", path.display()))?;
        if !read_only {
            self.refuse_buried(id, &path)?;
        }
        if let Ok(known) = self.manifest().disk(id) {
            let base = known.given();
            if base.path == path && base.format == format {
                return Ok(());
            }
            let story = format!(
                "the state directory {} knows disk {id} with the {} base image {}, not the {} image {}: give that \
                 one, or use another state directory",
                self.folder.display(),
                format_name(base.format),
                base.path.display(),
                format_name(format),
                path.display()
            );
            return Err(Error::new(ErrorKind::InvalidInput, story));
        }
        let base = LayerEntry { path, format, number: 0, sealed: read_only, merged: None };
        // Opened before it is remembered: a mistake must not be.
        let access = if read_only { Access::Read } else { Access::Write { journals: &self.journals } };
        Layer::open(id, &base, Beneath::Named(&self.folders), how, access)?;
        self.update(|manifest| {
            manifest
                .disks
                .insert(id.to_owned(), DiskEntry { layers: vec![base], next: 1, ..DiskEntry::default() });
            Ok(())
        })
    }

    /// A disk that got another id must not write into the image beneath the snapshots that it had under the old one.
    fn refuse_buried(&self, id: &str, path: &Path) -> Result<()> {
        let is_beneath = |disk: &DiskEntry| {
            disk.layers
                .split_last()
                .is_some_and(|(_, beneath)| beneath.iter().any(|layer| layer.path == path))
        };
        let manifest = self.manifest();
        match manifest.disks.iter().find(|(other, disk)| *other != id && is_beneath(disk)) {
            None => Ok(()),
            Some((other, _)) => {
                let story = format!(
                    "{} lies beneath the snapshots of disk {other}, which writing to it would spoil: serve it with \
                     id={other}",
                    path.display()
                );
                Err(Error::new(ErrorKind::InvalidInput, story))
            }
        }
    }

    /// Opens the first `count` layers of a disk, all read-only but for the one with the index `writable`. What an
    /// earlier process acknowledged but did not flush is brought into the images first.
    pub(crate) fn open_layers(
        &self,
        id: &str,
        count: usize,
        how: Opening,
        writable: Option<usize>,
    ) -> Result<Vec<Arc<Layer>>> {
        let entries = self.manifest().disk(id)?.layers.clone();
        let (mut layers, mut beneath) = (Vec::new(), Beneath::Named(&self.folders));
        for (index, entry) in entries.iter().take(count).enumerate() {
            let is_writable = writable == Some(index);
            let is_sound = entry.sealed && !self.journals.failure_note(id, entry.number).is_there()?;
            if !is_writable && !is_sound {
                self.recover(id, entry, beneath.clone())?;
            }
            let access = match writable {
                Some(writable) if writable == index => Access::Write { journals: &self.journals },
                None if index + 1 == count => Access::ReadActive,
                _ => Access::Read,
            };
            let layer = Arc::new(Layer::open(id, entry, beneath, how, access)?);
            let stack = if is_writable { layer.view(0) } else { layer.stack() };
            beneath = Beneath::Layers(Arc::new(stack));
            layers.push(layer);
        }
        Ok(layers)
    }

    /// Does the SEAL that a killed process could not: what it acknowledged goes from the journal into the image.
    fn recover(&self, id: &str, entry: &LayerEntry, beneath: Beneath<'_>) -> Result<()> {
        let access = Access::Write { journals: &self.journals };
        let layer = Layer::open(id, entry, beneath, Opening::OFFLINE, access)?;
        layer.seal();
        layer.flush()?;
        self.journals.remove(id, entry.number)
    }

    /// Remembers that the layers of these disks are on stable storage, but for those given:
    /// [`open_layers`](Self::open_layers) or a seal has synced them. Tells which snapshots that completes.
    pub(crate) fn mark_sealed(&self, disks: &[Unsealed<'_>]) -> Result<Vec<String>> {
        let mut marked = self.manifest().clone();
        marked.mark_sealed(disks);
        let mut completed = Vec::new();
        if marked != *self.manifest() {
            self.update(|manifest| {
                completed = manifest.mark_sealed(disks);
                Ok(())
            })?;
        }
        Ok(completed)
    }

    /// Where the layers above this base grow: beside it, so that they move with it.
    pub(crate) fn growth_folder(&self, base: &Layer) -> PathBuf {
        match base.storage().is_device() {
            true => self.file("layers"),
            false => base.entry.path.parent().unwrap_or(Path::new("/")).to_owned(),
        }
    }

    /// Creates an empty overlay on `top` and opens it for writing. It is on stable storage when this returns, and in
    /// no manifest yet. On an error there is none.
    pub(crate) fn create_overlay(
        &self,
        id: &str,
        base: &Layer,
        top: &Arc<Layer>,
        how: Opening,
    ) -> Result<Arc<Layer>> {
        let folder = self.growth_folder(base);
        let given = self.manifest().disk(id)?.given();
        let stem = given.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let first = self.manifest().disk(id)?.next;
        for number in first..first.saturating_add(MAX_LEFTOVERS) {
            let path = folder.join(format!("{stem}.{id}-{number:06}.qcow2"));
            let entry = LayerEntry { path, format: ImageFormat::Qcow2, number, sealed: false, merged: None };
            let file = match HostFile::create(&entry.path, Cache::Writeback) {
                Ok(file) => file,
                // Never over another file: it may be the rest of a crashed attempt, or not ours at all.
                Err(_) if entry.path.symlink_metadata().is_ok() => continue,
                Err(error) => return Err(error),
            };
            let made = self.fill_overlay(id, &entry, file, top, how);
            return made.inspect_err(|_| self.discard(id, &entry));
        }
        let story = format!("{} is full of leftover overlays of disk {id}", folder.display());
        Err(Error::new(ErrorKind::Busy, story))
    }

    fn fill_overlay(
        &self,
        id: &str,
        entry: &LayerEntry,
        file: HostFile,
        top: &Arc<Layer>,
        how: Opening,
    ) -> Result<Arc<Layer>> {
        let backing = backing_name(&entry.path, &top.entry);
        let options = CreateOptions::overlay(top.disk().capacity(), Some(backing));
        qcow2::create(&file, &options).context(|| format!("create {}", entry.path.display()))?;
        drop(file);
        hostio::sync_dir(entry.path.parent().unwrap_or(Path::new("/")))?;
        self.journals.remove(id, entry.number)?;
        let access = Access::Write { journals: &self.journals };
        let beneath = Beneath::Layers(Arc::new(top.stack()));
        Ok(Arc::new(Layer::open(id, entry, beneath, how, access)?))
    }

    /// Takes an image that Frazil made, and that no manifest names, out of the world, and its journal. What can not be
    /// removed is only a waste of room. Base images are never removed.
    pub(crate) fn discard(&self, id: &str, entry: &LayerEntry) {
        let image = if entry.number == 0 { Ok(()) } else { hostio::remove_file(&entry.path) };
        if let Err(error) = image.and(self.journals.remove(id, entry.number)) {
            warn!(%error, "a layer that is not needed is left behind");
        }
    }

    /// Removes images that have left their chains, and then the manifest's note of them.
    pub(crate) fn remove_unused(&self) {
        let unused = self.manifest().unused.clone();
        if unused.is_empty() {
            return;
        }
        unused.iter().for_each(|Unused { disk, layer }| self.discard(disk, layer));
        let noted = self.update(|manifest| {
            manifest.unused.retain(|one| !unused.contains(one));
            Ok(())
        });
        if let Err(error) = noted {
            warn!(%error, "images that are removed will be looked for once more");
        }
    }

    /// Where the journals are.
    pub(crate) fn journals(&self) -> &JournalFolder {
        &self.journals
    }

    /// The layer is sealed and flushed: its journal has nothing more to say, and others may read the image.
    pub(crate) fn layer_sealed(&self, id: &str, layer: &Layer) -> Result<()> {
        self.journals.remove(id, layer.entry.number)?;
        layer.share()
    }
}

/// How an overlay's header names the layer beneath: by file name where both are in one folder, so that the folder can
/// be moved.
pub(crate) fn backing_name(overlay: &Path, beneath: &LayerEntry) -> (String, String) {
    let is_beside = overlay.parent() == beneath.path.parent();
    let name = beneath.path.file_name().unwrap_or_default().to_string_lossy();
    // With a colon in it, a bare name would be taken for a protocol by QEMU.
    let name = match is_beside && !name.contains(':') {
        true => name.into_owned(),
        false => beneath.path.to_string_lossy().into_owned(),
    };
    (name, format_name(beneath.format).to_owned())
}

/// The format's name in headers.
pub(crate) fn format_name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
    }
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.context(|| format!("open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let story = format!(
                "the state directory {} is in use by a running frazil: speak to it with --control",
                folder.display()
            );
            Err(Error::new(ErrorKind::Busy, story))
        }
        Err(TryLockError::Error(error)) => {
            Err(Error::from(error).context(format!("lock {}", path.display())))
        }
    }
}
