//! What clients ask of dirty bitmaps.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use block::{DirtyBitmap, ErrorKind, Result};

use super::bitmap::{BitmapInfo, BitmapName, Busy, dirty};
use super::changes::{Look, granularity_bits};
use super::cutting::Pin;
use super::draft::Draft;
use super::entry::BitmapEntry;
use super::tally::Tallies;
use crate::group::Served;
use crate::manager::Manager;
use crate::store::Store;

/// What the manager keeps of marks in memory.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    pub(super) busy: Busy,
    pub(super) next_pin: AtomicU64,
    tallies: Tallies,
}

/// A bitmap that an operation uses: nobody else may, until this is dropped.
#[derive(Debug)]
pub struct BitmapLock {
    store: Arc<Store>,
    served: BTreeMap<String, Served>,
    busy: Busy,
    bitmap: BitmapName,
}

impl BitmapLock {
    /// What was dirty at the instant of a pin of its disk.
    pub fn dirty(&self, at: &Pin) -> Result<DirtyBitmap> {
        let draft = Draft::new(&self.store);
        let look = Look::new(&self.store, &draft.manifest, &self.served, &self.bitmap.disk)?;
        let entry = draft.manifest.bitmap(&self.bitmap.disk, &self.bitmap.name)?;
        dirty(&look, entry, at.instant())
    }

    /// Has it be clean at the instant of a pin of its disk, but for what `left` marks: besides that what was written since is
    /// dirty, if it records. On stable storage when this returns.
    pub fn restart(&self, at: &Pin, left: impl FnOnce(&DirtyBitmap)) -> Result<()> {
        let mut draft = Draft::new(&self.store);
        let (disk, name) = (&self.bitmap.disk, &self.bitmap.name);
        let granularity = granularity_bits(draft.manifest.bitmap(disk, name)?.granularity.into())?;
        let dirty = DirtyBitmap::new(at.instant().capacity, granularity)?;
        left(&dirty);
        let bits = (dirty.dirty_bytes() > 0).then(|| draft.create(&dirty)).transpose()?;
        let entry = draft.manifest.bitmap_mut(disk, name)?;
        (entry.bits, entry.since) = (bits, entry.since.map(|_| at.instant()));
        draft.commit(|_| Ok(()))
    }
}

impl Drop for BitmapLock {
    fn drop(&mut self) {
        self.busy.names().remove(&self.bitmap);
    }
}

impl Manager {
    /// A disk's dirty bitmaps.
    pub fn bitmaps(&self, disk: &str) -> Result<Vec<BitmapInfo>> {
        let tallies = &self.marks.tallies;
        let begun: Vec<_> = {
            let draft = Draft::new(&self.store);
            let bitmaps = &draft.manifest.disk(disk)?.marks.bitmaps;
            tallies.keep(disk, bitmaps);
            if bitmaps.is_empty() {
                return Ok(Vec::new());
            }
            let look = Look::new(&self.store, &draft.manifest, &self.disks, disk)?;
            bitmaps.iter().map(|entry| (entry.clone(), tallies.begin(&look, entry))).collect()
        };
        let counted = begun
            .into_iter()
            .map(|(entry, tally)| self.info(disk, &entry, tally.and_then(|tally| tally.count(tallies))));
        counted.collect()
    }

    /// Whether a disk has a dirty bitmap of that name.
    pub fn has_bitmap(&self, disk: &str, name: &str) -> Result<bool> {
        let manifest = self.store.manifest();
        Ok(manifest.disk(disk)?.marks.bitmaps.iter().any(|entry| entry.name == name))
    }

    fn info(&self, disk: &str, entry: &BitmapEntry, counted: Result<u64>) -> Result<BitmapInfo> {
        let (count, inconsistent) = match counted {
            Ok(count) => (count, false),
            Err(error) if error.kind() == ErrorKind::Corrupt => (0, true),
            Err(error) => return Err(error),
        };
        let name = BitmapName { disk: disk.to_owned(), name: entry.name.clone() };
        Ok(BitmapInfo {
            count,
            granularity: entry.granularity,
            // QEMU shows one that is of no use as not recording.
            recording: entry.since.is_some() && !inconsistent,
            busy: self.marks.busy.names().contains(&name),
            persistent: entry.persistent,
            inconsistent,
            name: name.name,
        })
    }

    /// What is dirty in a bitmap now. While the guest writes that moves on.
    pub fn bitmap_dirty(&self, disk: &str, name: &str) -> Result<DirtyBitmap> {
        let draft = Draft::new(&self.store);
        let look = Look::new(&self.store, &draft.manifest, &self.disks, disk)?;
        dirty(&look, draft.manifest.bitmap(disk, name)?, look.now())
    }

    /// Takes a bitmap for an operation.
    ///
    /// Errors: [`ErrorKind::Busy`] if another one has it.
    pub fn bitmap_lock(&self, disk: &str, name: &str) -> Result<BitmapLock> {
        let bitmap = BitmapName { disk: disk.to_owned(), name: name.to_owned() };
        // Nobody is about to change or remove it.
        let draft = Draft::new(&self.store);
        draft.manifest.bitmap(disk, name)?;
        self.marks.busy.take(&bitmap)?;
        let (store, served) = (Arc::clone(&self.store), self.disks.clone());
        Ok(BitmapLock { store, served, busy: self.marks.busy.clone(), bitmap })
    }
}
