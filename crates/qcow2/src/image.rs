//! The image as a disk.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use block::{ByteRange, Disk, Error, ErrorKind, Extent, Flush, Result, Storage, WriteGuard};

use crate::alloc::Allocator;
use crate::entry::{Geometry, GuestCluster, HostOffset, State};
use crate::flush::{Flushes, ImageFlush};
use crate::journal::{Journal, Record};
use crate::pending::{Claim, Claims};
use crate::table::Tables;

/// How to open an image.
#[derive(Debug)]
pub enum Mode {
    /// For reading; nothing is ever written.
    ReadOnly,
    /// For writing, with the image's own journal. What the journal holds is put into the image's tables first.
    Writable(Journal),
}

/// An open qcow2 image, with what is beneath it. See the crate's documentation for the rules it keeps.
pub struct Image(pub(crate) Arc<Inner>);

/// What an image, its pending writes and its flushes share.
pub(crate) struct Inner {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) backing: Option<Arc<dyn Disk>>,
    pub(crate) geometry: Geometry,
    pub(crate) tables: Tables,
    /// Where the L1 table is.
    pub(crate) l1: HostOffset,
    /// What lies past this position in the file reads as zeroes: the file ends there, and nobody makes it longer.
    pub(crate) readable: u64,
    pub(crate) writer: Option<Writer>,
}

/// What only a writable image has.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) allocator: Allocator,
    pub(crate) core: Mutex<Core>,
    pub(crate) flushes: Mutex<Flushes>,
    pub(crate) sealed: AtomicBool,
    /// A sync failed: nothing is acknowledged any more.
    pub(crate) failed: AtomicBool,
}

/// What writes to new room share. Entries change only under its lock.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) claims: Claims,
    pub(crate) journal: Journal,
    /// The newest published state of each cluster that changed since a flush last took them.
    pub(crate) dirty: BTreeMap<GuestCluster, State>,
    /// How many a flush has taken and not yet made durable.
    pub(crate) unflushed: usize,
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
    pub(crate) fn check(&self, range: ByteRange) -> Result<()> {
        match range.is_within(self.geometry.capacity) {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::OutOfRange,
                format!("bytes {}..{} are past the end of the disk", range.offset, range.end()),
            )),
        }
    }

    /// The writer, if `range` may be written now.
    pub(crate) fn check_writable(&self, range: ByteRange) -> Result<&Writer> {
        let writer = self.writer.as_ref().filter(|writer| !writer.sealed.load(Ordering::Acquire));
        let writer = writer.ok_or_else(|| Error::new(ErrorKind::ReadOnly, "the image is read-only"))?;
        writer.check_latch()?;
        self.check(range)?;
        Ok(writer)
    }

    /// Makes new states of clusters visible, all or none, and sure to survive the death of the process. `advance`
    /// gives a cluster's next state from the one it has.
    pub(crate) fn publish(
        &self,
        core: &mut Core,
        claims: &[Claim],
        advance: impl Fn(State, &Claim) -> State,
    ) -> Result<()> {
        let mut changes = Vec::with_capacity(claims.len());
        for claim in claims {
            let entry = self.tables.entry_for_write(&*self.storage, claim.cluster)?;
            let (state, home) = (entry.state(), entry.home());
            let host = if home.is_none() { HostOffset(0) } else { home.writable_offset()? };
            let next = advance(state, claim);
            if next != state {
                changes.push((entry, Record { cluster: claim.cluster, host, state: next }));
            }
        }
        let records: Vec<Record> = changes.iter().map(|(_, record)| *record).collect();
        core.journal.append(&records)?;
        for (entry, record) in changes {
            entry.set_state(record.state);
            core.dirty.insert(record.cluster, record.state);
        }
        Ok(())
    }
}

impl Image {
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
            core.dirty.len() + core.unflushed
        })
    }
}

impl Disk for Image {
    fn capacity(&self) -> u64 {
        self.0.geometry.capacity
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
        self.0.resolve_write(range, waker, out)
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
