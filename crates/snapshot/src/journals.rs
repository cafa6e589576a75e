//! The journals of layers: what is acknowledged and not yet in the tables of their images.

use std::path::PathBuf;
use std::sync::Arc;

use block::{Result, Storage};
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

    /// Takes the journal of a layer away that has been sealed and flushed, or that is no more.
    pub(crate) fn remove(&self, id: &str, number: u32) -> Result<()> {
        self.files(id, number).iter().try_for_each(|path| hostio::remove_file(path))
    }
}
