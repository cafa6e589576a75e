//! Filters: a disk as it was when the filter was put on.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{ByteRange, DirtyBitmap, Error, ErrorKind, Result};
use snapshot::{BitmapInfo, Pin};

use super::Node;

/// A `copy-before-write` node.
#[derive(Debug)]
pub(crate) struct Filter {
    /// The disk that it is on.
    pub(crate) disk: String,
    /// QEMU's fleecing image, which stays empty here.
    pub(super) fleece: Arc<Node>,
    view: Mutex<View>,
    /// Whether the guest's requests go through it, as QEMU would say.
    is_on: AtomicBool,
}

/// What a filter shows.
#[derive(Debug, Default)]
pub(crate) struct View {
    /// The disk as it was; `None` if nobody has needed it yet.
    pub(crate) pin: Option<Arc<Pin>>,
    /// Whether somebody has begun to read it: from then on it stays as it is. Before that a transaction may cut anew, so
    /// that its backups and its bitmaps are of one instant.
    pub(crate) used: bool,
}

impl Filter {
    pub(super) fn new(disk: String, fleece: Arc<Node>) -> Self {
        Self { disk, fleece, view: Mutex::default(), is_on: AtomicBool::new(false) }
    }

    pub(crate) fn set_on(&self, is_on: bool) {
        self.is_on.store(is_on, Ordering::Release);
    }

    /// Whether this is its fleecing image.
    pub(crate) fn has_fleece(&self, node: &Arc<Node>) -> bool {
        Arc::ptr_eq(&self.fleece, node)
    }

    /// Whether it is put on its disk.
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Acquire)
    }

    pub(crate) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A `snapshot-access` node: what a filter shows, to read.
#[derive(Debug)]
pub(crate) struct Access {
    pub(crate) filter: Arc<Filter>,
    /// Keeps the filter's node from being deleted.
    pub(super) node: Arc<Node>,
    bitmaps: Mutex<NodeBitmaps>,
}

/// The bitmaps of a node, by name. It never changes, so nothing is recorded in them: they hold what was merged into them, and
/// each is worth the bytes that one bit speaks for, and what is dirty.
pub(crate) type NodeBitmaps = BTreeMap<String, (u32, Vec<ByteRange>)>;

impl Access {
    pub(super) fn new(filter: Arc<Filter>, node: Arc<Node>) -> Self {
        Self { filter, node, bitmaps: Mutex::default() }
    }

    pub(crate) fn bitmaps(&self) -> MutexGuard<'_, NodeBitmaps> {
        self.bitmaps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its bitmaps, as they are told of.
    pub(super) fn bitmap_infos(&self) -> Vec<BitmapInfo> {
        let info = |(name, (granularity, dirty)): (&String, &(u32, Vec<ByteRange>))| BitmapInfo {
            name: name.clone(),
            count: dirty.iter().map(|range| range.len).sum(),
            granularity: *granularity,
            recording: true,
            busy: false,
            persistent: false,
            inconsistent: false,
        };
        self.bitmaps().iter().map(info).collect()
    }

    /// One of its bitmaps, for a disk of `capacity` bytes.
    pub(crate) fn bitmap(&self, name: &str, capacity: u64) -> Result<DirtyBitmap> {
        bitmap_of(&self.bitmaps(), name, capacity)
    }
}

/// One of a node's bitmaps, for a disk of `capacity` bytes.
pub(crate) fn bitmap_of(bitmaps: &NodeBitmaps, name: &str, capacity: u64) -> Result<DirtyBitmap> {
    let (granularity, dirty) = bitmaps.get(name).ok_or_else(|| not_found(name))?;
    let bitmap = DirtyBitmap::new(capacity, granularity.trailing_zeros())?;
    dirty.iter().for_each(|range| bitmap.mark(*range));
    Ok(bitmap)
}

/// Ranges in their order, with nothing twice.
pub(crate) fn tidy(ranges: &mut Vec<ByteRange>) {
    ranges.sort_unstable_by_key(|range| range.offset);
    ranges.dedup_by(|next, last| {
        let touches = next.offset <= last.end();
        if touches {
            last.len = last.end().max(next.end()) - last.offset;
        }
        touches
    });
}

/// QEMU's words for a bitmap that is not there.
pub(crate) fn not_found(name: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("Dirty bitmap '{name}' not found"))
}
