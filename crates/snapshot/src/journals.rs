//! The journals of layers: what is acknowledged and not yet in the tables of their images.

use std::path::PathBuf;
use std::sync::Arc;

use block::{Context, Result, Storage};
use hostio::MappedFile;
use qcow2::Journal;

/// Where the journals of writable qcow2 images are.
#[derive(Clone, Debug)]
pub(crate) struct JournalFolder {
    /// The folder.
    pub(crate) path: PathBuf,
    /// The boot of the host; a journal of another boot is void.
    pub(crate) boot_id: String,
}

impl JournalFolder {
    fn files(&self, id: &str, number: u32) -> [PathBuf; 2] {
        ["a", "b"].map(|half| self.path.join(format!("{id}-{number:06}.{half}")))
    }

    /// Opens the journal of a layer, making it if there is none.
    pub(crate) fn open(&self, id: &str, number: u32) -> Result<Journal> {
        let open = |path: PathBuf| -> Result<Arc<dyn Storage>> { Ok(Arc::new(MappedFile::open(&path)?)) };
        let [a, b] = self.files(id, number);
        Journal::open(open(a)?, open(b)?, &self.boot_id)
    }

    /// Takes the journal of a layer away that has been sealed and flushed, or that is no more; and the note of a failure.
    pub(crate) fn remove(&self, id: &str, number: u32) -> Result<()> {
        self.void(id, number)?;
        self.failure_note(id, number).remove()
    }

    /// Takes the journal of a layer away whose sync has failed: what it names may be lost.
    pub(crate) fn void(&self, id: &str, number: u32) -> Result<()> {
        self.files(id, number).iter().try_for_each(|path| hostio::remove_file(path))
    }

    /// The note that a sync of this layer has failed, which may be there or not.
    pub(crate) fn failure_note(&self, id: &str, number: u32) -> FailureNote {
        let path = self.path.join(format!("{id}-{number:06}.failed"));
        FailureNote { path, boot_id: self.boot_id.clone() }
    }
}

/// A note for the next process that a sync of a layer has failed.
///
/// What is read of such a layer may never have come to the disk, and a later sync would not tell: see
/// [`HostFile::forget_cached`](hostio::HostFile::forget_cached). It ends with the boot of the host, as the page cache does,
/// and so the note need not be on stable storage either: it can be left by a host whose disks fail.
#[derive(Clone, Debug)]
pub(crate) struct FailureNote {
    path: PathBuf,
    boot_id: String,
}

impl FailureNote {
    pub(crate) fn leave(&self) -> Result<()> {
        std::fs::write(&self.path, &self.boot_id).context(|| format!("write {}", self.path.display()))
    }

    /// Whether it is there, of this boot.
    pub(crate) fn is_there(&self) -> Result<bool> {
        match std::fs::read(&self.path) {
            // One that was cut short is nobody else's.
            Ok(note) => Ok(note.len() < self.boot_id.len() || note == self.boot_id.as_bytes()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).context(|| format!("read {}", self.path.display())),
        }
    }

    pub(crate) fn remove(&self) -> Result<()> {
        hostio::remove_file(&self.path)
    }
}
