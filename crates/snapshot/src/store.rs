//! The state directory: one daemon's memory of its disks.
//!
//! ```text
//! STATE/lock             held by the one process that uses the directory
//! STATE/manifest.json    disks, layers, snapshots: replaced whole (see `manifest`)
//! STATE/thaw-owed.json   exists while a guest may be frozen
//! STATE/journal/         what active qcow2 layers have acknowledged but not flushed
//! STATE/layers/          overlays of disks whose base is not a regular file
//! ```

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Context, Disk, Error, ErrorKind, Result};
use hostio::{Cache, HostFile};
use qcow2::CreateOptions;
use tracing::warn;

use crate::layer::{Access, JournalFolder, Layer};
use crate::manifest::{DiskEntry, LayerEntry, Manifest};
use crate::model::ImageFormat;

/// How many numbers are tried for an overlay whose file name is taken by the rest of a crashed attempt.
const MAX_LEFTOVERS: u32 = 1000;

/// An open state directory.
#[derive(Debug)]
pub(crate) struct Store {
    folder: PathBuf,
    _lock: File,
    journals: JournalFolder,
    manifest: Mutex<Manifest>,
}

impl Store {
    /// Opens the directory, making it if need be (mode 0700), for this process alone.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        for path in [folder.to_owned(), folder.join("journal"), folder.join("layers")] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.context(|| format!("make the folder {}", path.display()))?;
        }
        let folder = folder.canonicalize().context(|| format!("open {}", folder.display()))?;
        let lock = lock(&folder)?;
        let boot_id = hostio::boot_id()?;
        let loaded = Manifest::load(&folder.join("manifest.json"))?;
        let journals = JournalFolder { path: folder.join("journal"), boot_id: boot_id.clone() };
        let manifest = Mutex::new(Manifest::empty(&boot_id));
        let store = Self { folder, _lock: lock, journals, manifest };
        if let Some(manifest) = loaded {
            *store.manifest() = manifest;
            store.settle(&boot_id)?;
        }
        Ok(store)
    }

    /// Undoes what the last process left half done.
    fn settle(&self, boot_id: &str) -> Result<()> {
        self.update(|manifest| {
            if let Some(name) = manifest.pending.take() {
                // Its overlay stays: whether or not the guest wrote to it, the chain reads right.
                warn!(snapshot = name, "the daemon ended during this snapshot's cut: it was not taken");
            }
            let rebooted = manifest.boot_id != boot_id;
            manifest.snapshots.retain(|snapshot| {
                let lost = rebooted && !snapshot.sealed;
                if lost {
                    warn!(
                        snapshot = snapshot.name,
                        "the host went down before this snapshot was synced: dropped"
                    );
                }
                !lost
            });
            boot_id.clone_into(&mut manifest.boot_id);
            Ok(())
        })
    }

    /// Where a small file of the state directory is.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The manifest as it is on disk.
    pub(crate) fn manifest(&self) -> MutexGuard<'_, Manifest> {
        self.manifest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the manifest, on disk first. On an error nothing has changed.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Manifest) -> Result<()>) -> Result<()> {
        let mut manifest = self.manifest();
        let mut changed = manifest.clone();
        change(&mut changed)?;
        changed.store(&self.folder.join("manifest.json"))?;
        *manifest = changed;
        Ok(())
    }

    /// Makes the disk known with this base image; if it is known already, the base must be the same.
    pub(crate) fn declare(&self, id: &str, path: &Path, format: ImageFormat) -> Result<()> {
        // Not resolved further: a device's stable name must stay, what it links to changes with each boot.
        let path = std::path::absolute(path).context(|| format!("disk {id}: {}", path.display()))?;
        if let Ok(known) = self.manifest().disk(id) {
            let base = &known.layers[0];
            if base.path == path && base.format == format {
                return Ok(());
            }
            let story = format!(
                "the state directory {} knows disk {id} with the base image {}, not {}: give that one, or use \
                 another state directory",
                self.folder.display(),
                base.path.display(),
                path.display()
            );
            return Err(Error::new(ErrorKind::InvalidInput, story));
        }
        let layers = vec![LayerEntry { path, format, number: 0 }];
        self.update(|manifest| {
            manifest.disks.insert(id.to_owned(), DiskEntry { layers, next: 1 });
            Ok(())
        })
    }

    /// Opens the first `count` layers of a disk, all read-only but for the one with the index `writable`. What an
    /// earlier process acknowledged but did not flush is brought into the images first.
    pub(crate) fn open_layers(
        &self,
        id: &str,
        count: usize,
        cache: Cache,
        writable: Option<usize>,
    ) -> Result<Vec<Arc<Layer>>> {
        let entries = self.manifest().disk(id)?.layers.clone();
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        for (index, entry) in entries.iter().take(count).enumerate() {
            let backing = || layers.last().map(|layer| layer.disk());
            let is_writable = writable == Some(index);
            if !is_writable && (self.journals.exists(id, entry.number) || self.is_unsealed(entry)) {
                self.recover(id, entry, backing())?;
            }
            let access = if is_writable { Access::Write { journals: &self.journals } } else { Access::Read };
            layers.push(Arc::new(Layer::open(id, entry, backing(), cache, access)?));
        }
        Ok(layers)
    }

    fn is_unsealed(&self, entry: &LayerEntry) -> bool {
        let manifest = self.manifest();
        let mut unsealed = manifest.snapshots.iter().filter(|snapshot| !snapshot.sealed);
        unsealed.any(|snapshot| snapshot.disks.iter().any(|disk| disk.path == entry.path))
    }

    /// Does the SEAL that a killed process could not: what it acknowledged goes from the journal into the image.
    fn recover(&self, id: &str, entry: &LayerEntry, backing: Option<Arc<dyn Disk>>) -> Result<()> {
        let access = Access::Write { journals: &self.journals };
        Layer::open(id, entry, backing, Cache::Writeback, access)?.flush()?;
        self.journals.remove(id, entry.number)
    }

    /// Marks all snapshots sealed whose layers [`open_layers`](Self::open_layers) has recovered.
    pub(crate) fn all_sealed(&self) -> Result<()> {
        if self.manifest().snapshots.iter().all(|snapshot| snapshot.sealed) {
            return Ok(());
        }
        self.update(|manifest| {
            manifest.snapshots.iter_mut().for_each(|snapshot| snapshot.sealed = true);
            Ok(())
        })
    }

    /// Creates an empty overlay on `top` and opens it for writing. It is on stable storage when this returns, and in
    /// no manifest yet.
    pub(crate) fn create_overlay(
        &self,
        id: &str,
        base: &Layer,
        top: &Layer,
        cache: Cache,
    ) -> Result<Arc<Layer>> {
        let folder = match base.storage().is_device() {
            true => self.folder.join("layers"),
            false => base.entry.path.parent().unwrap_or(Path::new("/")).to_owned(),
        };
        let stem = base.entry.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let first = self.manifest().disk(id)?.next;
        for number in first..first.saturating_add(MAX_LEFTOVERS) {
            let path = folder.join(format!("{stem}.{id}-{number:06}.qcow2"));
            let entry = LayerEntry { path, format: ImageFormat::Qcow2, number };
            // Never over another file: it may be the rest of a crashed attempt, or not ours at all.
            if entry.path.exists() {
                continue;
            }
            if let Err(error) = Self::fill_overlay(&entry, top) {
                hostio::remove_file(&entry.path)?;
                return Err(error);
            }
            self.journals.remove(id, number)?;
            let access = Access::Write { journals: &self.journals };
            return Ok(Arc::new(Layer::open(id, &entry, Some(top.disk()), cache, access)?));
        }
        let story = format!("{} is full of leftover overlays of disk {id}", folder.display());
        Err(Error::new(ErrorKind::Busy, story))
    }

    fn fill_overlay(entry: &LayerEntry, top: &Layer) -> Result<()> {
        let file = HostFile::create(&entry.path, Cache::Writeback)?;
        let backing = backing_name(&entry.path, &top.entry);
        let options = CreateOptions::overlay(top.disk().capacity(), Some(backing));
        qcow2::create(&file, &options).context(|| format!("create {}", entry.path.display()))?;
        hostio::sync_dir(entry.path.parent().unwrap_or(Path::new("/")))
    }

    /// Takes an image that Frazil made out of the world, and its journal. Base images are never removed.
    pub(crate) fn remove_layer(&self, id: &str, entry: &LayerEntry) -> Result<()> {
        self.journals.remove(id, entry.number)?;
        if entry.number == 0 {
            return Ok(());
        }
        hostio::remove_file(&entry.path)
    }

    /// The layer is sealed and flushed: its journal has nothing more to say, and others may read the image.
    pub(crate) fn layer_sealed(&self, id: &str, layer: &Layer) -> Result<()> {
        self.journals.remove(id, layer.entry.number)?;
        layer.share()
    }
}

/// How an overlay's header names the layer beneath: by file name where both are in one folder, so that the folder can
/// be moved.
fn backing_name(overlay: &Path, beneath: &LayerEntry) -> (String, String) {
    let name = match (overlay.parent() == beneath.path.parent(), beneath.path.file_name()) {
        (true, Some(name)) => name.to_string_lossy().into_owned(),
        _ => beneath.path.to_string_lossy().into_owned(),
    };
    let format = match beneath.format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
    };
    (name, format.to_owned())
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.context(|| format!("open {}", path.display()))?;
    file.try_lock().map_err(|_| {
        let story = format!(
            "the state directory {} is in use by a running frazil: speak to it with --control",
            folder.display()
        );
        Error::new(ErrorKind::Busy, story)
    })?;
    Ok(file)
}
