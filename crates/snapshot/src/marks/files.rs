//! The folder of bits files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use block::{Context, DirtyBitmap, Result};
use tracing::warn;

use super::bits;

/// No file has this number or a higher one, so the next one's is a number too.
pub(super) const MOST_FILES: u64 = 1 << 63;

/// The state directory's folder of bits files, each named by a number.
#[derive(Debug)]
pub(crate) struct Files {
    folder: PathBuf,
    /// The number of the next one. Never one that a manifest may still name.
    next: AtomicU64,
    /// Held by whoever changes marks: from the reading of the manifest to the removal of the files that it does not name
    /// any more.
    turn: Mutex<()>,
}

impl Files {
    /// The files in `folder`, which is there. `named` are those that the manifest names.
    pub(crate) fn open(folder: &Path, named: &BTreeSet<u64>) -> Result<Self> {
        let files = Self { folder: folder.to_owned(), next: AtomicU64::new(0), turn: Mutex::default() };
        let highest = files.there()?.into_iter().chain(named.iter().copied()).max();
        files.next.store(highest.map_or(0, |highest| highest + 1), Ordering::Relaxed);
        files.keep(named);
        Ok(files)
    }

    /// The right to change marks.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a new file, on stable storage when this returns its number.
    pub(super) fn create(&self, bits: &DirtyBitmap) -> Result<u64> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.path(number);
        let written = bits::write(&path, bits).and_then(|()| hostio::sync_dir(&self.folder));
        written.inspect_err(|_| self.remove(number))?;
        Ok(number)
    }

    /// The bits in a file.
    pub(super) fn load(&self, number: u64) -> Result<DirtyBitmap> {
        bits::read(&self.path(number))
    }

    /// Removes all files but these. What can not be removed only takes room.
    pub(super) fn keep(&self, named: &BTreeSet<u64>) {
        match self.there() {
            Ok(there) => there.difference(named).for_each(|number| self.remove(*number)),
            Err(error) => warn!(%error, "bits files that are not needed are left behind"),
        }
    }

    fn remove(&self, number: u64) {
        if let Err(error) = hostio::remove_file(&self.path(number)) {
            warn!(%error, "a bits file that is not needed is left behind");
        }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number}.bits"))
    }

    fn there(&self) -> Result<BTreeSet<u64>> {
        let what = || format!("read {}", self.folder.display());
        let mut numbers = BTreeSet::new();
        for entry in std::fs::read_dir(&self.folder).context(what)? {
            let name = entry.context(what)?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".bits")?.parse::<u64>().ok());
            numbers.extend(number.filter(|number| *number < MOST_FILES));
        }
        Ok(numbers)
    }
}
