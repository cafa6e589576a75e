//! The image as a disk.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use block::{ByteRange, Disk, Error, ErrorKind, Extent, Flush, Result, Storage, WriteGuard};

use crate::alloc::Allocator;
use crate::bitmaps::Bitmaps;
use crate::entry::{Entry, Geometry, GuestCluster};
use crate::epoch::Epochs;
use crate::flush::{Flushes, ImageFlush};
use crate::journal::Journal;
use crate::mapping::Mapping;
use crate::metadata::Metadata;
use crate::pack::{Packer, Packing};
use crate::packed::PackedCache;
use crate::pending::Claims;
use crate::publish::{Change, Freed};

/// What an image is made of, found and opened by the caller: the names in its header are not looked at.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The image file.
    pub storage: Arc<dyn Storage>,
    /// The external data file, for an image that has one.
    pub data_file: Option<Arc<dyn Storage>>,
    /// What is beneath.
    pub backing: Option<Arc<dyn Disk>>,
    /// Bytes of RAM for entries of the mapping, 16 for each cluster (so 8 KiB at 128 KiB clusters for 64 MiB of disk). With
    /// 0, an image that is only read keeps a few KiB of what was looked at last until it is told to forget it
    /// ([`block::Layer::forget`]), and no table.
    pub cache_bytes: u64,
}

impl Parts {
    /// An image in one file, with room in RAM for the mapping of some 128 GiB at Frazil's cluster size.
    pub fn new(storage: Arc<dyn Storage>, backing: Option<Arc<dyn Disk>>) -> Self {
        Self { storage, data_file: None, backing, cache_bytes: 16 << 20 }
    }
}

/// How to open an image.
#[derive(Debug)]
pub enum Mode {
    /// For reading; nothing is ever written.
    ReadOnly,
    /// For writing, with the image's own journal. What the journal holds is put into the image's tables first.
    Writable(Journal),
    /// As [`Writable`](Self::Writable), for an image that others know by its runs ([`block::Layer`]) while it changes:
    /// clusters that are freed keep their bytes, and are not used again before the next opening.
    Job(Journal),
}

/// An open qcow2 image, with what is beneath it. See the crate's documentation for the rules it keeps.
pub struct Image(pub(crate) Arc<Inner>);

/// What an image, its pending writes and its flushes share.
pub(crate) struct Inner {
    /// The image file.
    pub(crate) storage: Arc<dyn Storage>,
    /// Where the guest's data is: the image file, or an external one.
    pub(crate) data: Arc<dyn Storage>,
    pub(crate) epochs: Epochs,
    pub(crate) backing: Option<Arc<dyn Disk>>,
    /// But for the capacity, which may have grown since.
    pub(crate) geometry: Geometry,
    pub(crate) capacity: AtomicU64,
    pub(crate) mapping: Mapping,
    pub(crate) packed: PackedCache,
    /// Bytes of the image file when it was opened, its last cluster filled up.
    pub(crate) limit: u64,
    /// What lies past this position in the data file reads as zeroes: the file ends there, and nobody makes it longer.
    pub(crate) readable: u64,
    pub(crate) writer: Option<Writer>,
}

/// What only a writable image has.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) core: Mutex<Core>,
    pub(crate) flushes: Mutex<Flushes>,
    pub(crate) sealed: AtomicBool,
    /// A sync failed: nothing is acknowledged any more.
    pub(crate) failed: AtomicBool,
    /// Those that the image carries: whatever is written is marked in them before it is acknowledged.
    pub(crate) bitmaps: Option<Bitmaps>,
    /// Held by who writes a compressed cluster; before the lock of writes.
    pub(crate) packer: Mutex<Packer>,
    /// Held by who makes the disk larger.
    pub(crate) growing: Mutex<()>,
    /// Whether freed clusters keep their bytes.
    pub(crate) keeps_freed: bool,
}

/// What writes to new room share. Entries change only under its lock.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) claims: Claims,
    pub(crate) journal: Journal,
    pub(crate) allocator: Allocator,
    pub(crate) metadata: Metadata,
    /// The entries that changed since a flush last took them.
    pub(crate) dirty: BTreeMap<GuestCluster, Change>,
    /// What entries named before they changed.
    pub(crate) freed: Vec<Freed>,
    pub(crate) packing: Packing,
    /// The entries that a flush has taken and not yet made durable.
    pub(crate) batch: Arc<BTreeMap<GuestCluster, Entry>>,
    /// How many flushes have made their batch durable.
    pub(crate) settled: u64,
}

impl Writer {
    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn flushes(&self) -> MutexGuard<'_, Flushes> {
        self.flushes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn check_latch(&self) -> Result<()> {
        match self.failed.load(Ordering::Acquire) {
            true => Err(Error::new(
                ErrorKind::Latched,
                "an earlier sync of the image failed; it takes no more writes",
            )),
            false => Ok(()),
        }
    }
}

impl Inner {
    /// Bytes of the disk.
    pub(crate) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    pub(crate) fn check(&self, range: ByteRange) -> Result<()> {
        match range.is_within(self.capacity()) {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::OutOfRange,
                format!("bytes {}..{} are past the end of the disk", range.offset, range.end()),
            )),
        }
    }

    /// The writer, if it may write now.
    pub(crate) fn writer(&self) -> Result<&Writer> {
        let writer = self.writer.as_ref().filter(|writer| !writer.sealed.load(Ordering::Acquire));
        let writer = writer.ok_or_else(|| Error::new(ErrorKind::ReadOnly, "the image is read-only"))?;
        writer.check_latch().map(|()| writer)
    }

    /// The writer, if a guest may write `range` now: it is marked as written.
    pub(crate) fn begin_writing(&self, range: ByteRange) -> Result<&Writer> {
        let writer = self.writer()?;
        self.check(range)?;
        if let Some(bitmaps) = &writer.bitmaps {
            bitmaps.mark(range);
        }
        Ok(writer)
    }
}

impl Image {
    /// Whether a sync of it has failed, which is final.
    pub fn has_failed(&self) -> bool {
        self.0.writer.as_ref().is_some_and(|writer| writer.failed.load(Ordering::Acquire))
    }

    /// No more writes will be resolved. Those in flight still complete; the next flush then leaves nothing behind.
    /// Takes a few nanoseconds: it is called while the gate is closed.
    pub fn seal(&self) {
        if let Some(writer) = &self.0.writer {
            writer.sealed.store(true, Ordering::Release);
        }
    }

    /// Whether the file holds all that was acknowledged, in RAM there is nothing more to be flushed. (Whether data is
    /// on stable storage only a flush tells.)
    pub fn is_clean(&self) -> bool {
        self.pending() == 0
    }

    /// Clusters whose mapping has changed since it was last flushed. Each costs memory and journal space, so
    /// housekeeping flushes when they get many.
    pub fn pending(&self) -> usize {
        self.0.writer.as_ref().map_or(0, |writer| {
            let core = writer.core();
            core.dirty.len() + core.batch.len()
        })
    }
}

impl Disk for Image {
    fn capacity(&self) -> u64 {
        self.0.capacity()
    }

    fn read_only(&self) -> bool {
        self.0.writer.as_ref().is_none_or(|writer| writer.sealed.load(Ordering::Acquire))
    }

    fn discard_granularity(&self) -> u32 {
        self.0.geometry.subcluster_size() as u32
    }

    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        self.0.check(range)?;
        self.0.resolve_read(range, out)
    }

    fn resolve_write(
        &self,
        range: ByteRange,
        waker: &Waker,
        out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>> {
        match self.0.begin_writing(range) {
            Ok(writer) => self.0.resolve_write(writer, range, waker, out),
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    fn discard(&self, range: ByteRange, waker: &Waker) -> Poll<Result<()>> {
        self.0.discard(range, waker)
    }

    fn write_zeroes(&self, range: ByteRange, unmap: bool, waker: &Waker) -> Poll<Result<()>> {
        self.0.write_zeroes(range, unmap, waker)
    }

    fn flush(&self) -> Box<dyn Flush> {
        Box::new(ImageFlush::new(Arc::clone(&self.0)))
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { storage, backing, geometry, writer, .. } = self;
        f.debug_struct("Image")
            .field("storage", storage)
            .field("geometry", geometry)
            .field("backing", backing)
            .field("writable", &writer.is_some())
            .finish_non_exhaustive()
    }
}
