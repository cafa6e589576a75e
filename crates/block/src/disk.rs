//! Disks: resolve a range, do the I/O, complete.

use std::fmt::Debug;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Poll, Wake, Waker};

use crate::{ByteRange, Error, ErrorKind, Result, Storage};

/// A run of bytes of a disk and where they are.
///
/// Held until the I/O on it is over, by whoever does it: an image gives the room of bytes that are no more to others only
/// when nobody holds an extent that could name it.
#[derive(Clone, Debug)]
pub struct Extent {
    /// How many bytes.
    pub len: u64,
    /// Where they are.
    pub source: Source,
}

/// Where the bytes of an extent are.
#[derive(Clone, Debug)]
pub enum Source {
    /// They are all zero, and stored nowhere. Never part of a resolved write.
    Zero,
    /// In a host file, from this offset on.
    File {
        /// The file; the extent keeps it open.
        storage: Arc<dyn Storage>,
        /// The first byte's offset in the file.
        offset: u64,
    },
    /// In memory, from this offset on: they were compressed. Never part of a resolved write.
    Bytes {
        /// At least `offset` and the extent's length.
        bytes: Arc<[u8]>,
        /// The first byte's index.
        offset: usize,
    },
}

impl Source {
    /// What follows `len` bytes on.
    #[must_use]
    pub fn advanced(&self, len: u64) -> Self {
        match self.clone() {
            Self::Zero => Self::Zero,
            Self::File { storage, offset } => Self::File { storage, offset: offset + len },
            Self::Bytes { bytes, offset } => {
                Self::Bytes { bytes, offset: offset.saturating_add(len as usize) }
            }
        }
    }
}

/// What a guest, an export or a job reads and writes: an image, a raw file, or a whole chain.
///
/// Ranges are bytes. The disk checks every range against [`capacity`](Disk::capacity) and, for writes, that it is
/// writable: an error, never a panic. It does not ask for sector alignment, whoever speaks to a guest does.
///
/// No method blocks on another request. A `Pending` one has kept `waker` and wakes it once when it is worth asking
/// again; spurious wake-ups are allowed.
pub trait Disk: Send + Sync + Debug {
    /// Bytes the disk holds.
    fn capacity(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// The size in bytes from which a discard gives room back, a power of two; what a guest is told.
    fn discard_granularity(&self) -> u32;

    /// Appends to `out` where the bytes of `range` are, in order, their lengths adding up to `range.len`.
    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()>;

    /// Appends to `out` where to write the bytes of `range`, in order. All are [`Source::File`]. Once the data I/O
    /// has succeeded the caller completes the guard, and only then is the write done; on failure it drops it.
    ///
    /// May do small I/O itself: load a table, or copy the rest of a subcluster that `range` covers in part.
    fn resolve_write(
        &self,
        range: ByteRange,
        waker: &Waker,
        out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>>;

    /// Tells that nobody needs the bytes of `range`. They read as zeroes afterwards, or as before where giving them
    /// back would cost more than it gains (parts of a cluster).
    fn discard(&self, range: ByteRange, waker: &Waker) -> Poll<Result<()>>;

    /// Makes `range` read as zeroes; gives its room back if `unmap`, keeps it allocated where it is if not.
    fn write_zeroes(&self, range: ByteRange, unmap: bool, waker: &Waker) -> Poll<Result<()>>;

    /// Begins a flush: the caller asks for its steps, one by one, until it is done.
    fn flush(&self) -> Box<dyn Flush>;
}

/// Where a resolved write is completed; dropping it aborts the write.
#[must_use = "a write is done only once its guard is completed"]
#[derive(Debug, Default)]
pub struct WriteGuard(Option<Box<dyn PendingWrite>>);

impl WriteGuard {
    /// The write goes where the bytes already are: nothing to complete.
    pub fn in_place() -> Self {
        Self(None)
    }

    /// The write goes to new room, which `pending` will publish.
    pub fn allocating(pending: Box<dyn PendingWrite>) -> Self {
        Self(Some(pending))
    }

    /// The data is in its place: publish it. On an error the write has failed, and the old bytes show.
    pub fn complete(self) -> Result<()> {
        self.0.map_or(Ok(()), PendingWrite::complete)
    }
}

/// A write to new room, not yet visible. Dropping it gives the room back.
pub trait PendingWrite: Send + Debug {
    /// Makes the new room visible to reads, and sure to survive the death of the process.
    fn complete(self: Box<Self>) -> Result<()>;
}

/// What a flush needs next.
#[derive(Debug)]
pub enum FlushStep {
    /// Sync these, all of them, in any order, and report with the next [`Flush::step`].
    Sync(Vec<Arc<dyn Storage>>),
    /// All that was acknowledged before the flush began is on stable storage.
    Done,
}

/// A flush under way. The caller does the syncs, for only it knows how to wait for them; dropping it early leaves the
/// rest to the next flush. It is not dropped while a sync is under way: nobody would hear that the sync failed, and the
/// kernel tells of it once.
pub trait Flush: Send {
    /// The next step, given how the syncs of the last one went (`Ok` at first). After an error or
    /// [`FlushStep::Done`] the flush is over. A failed sync is final: the disk latches it.
    fn step(&mut self, last: Result<()>, waker: &Waker) -> Poll<Result<FlushStep>>;
}

/// Runs `ask` until it is ready, sleeping in between: for jobs and tests, never for a virtqueue's worker.
pub fn blocking<T>(mut ask: impl FnMut(&Waker) -> Poll<T>) -> T {
    let parked = Arc::new(Parked::default());
    let waker = Waker::from(Arc::clone(&parked));
    loop {
        if let Poll::Ready(value) = ask(&waker) {
            return value;
        }
        parked.wait();
    }
}

#[derive(Default)]
struct Parked {
    woken: Mutex<bool>,
    condition: Condvar,
}

impl Parked {
    fn wait(&self) {
        let mut woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
        while !*woken {
            woken = self.condition.wait(woken).unwrap_or_else(PoisonError::into_inner);
        }
        *woken = false;
    }
}

impl Wake for Parked {
    fn wake(self: Arc<Self>) {
        *self.woken.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.condition.notify_one();
    }
}

impl dyn Flush {
    /// Runs the whole flush here and now, waiting for every sync.
    pub fn run(&mut self) -> Result<()> {
        let mut last = Ok(());
        loop {
            let step = {
                let mut given = Some(last);
                blocking(|waker| self.step(given.take().unwrap_or(Ok(())), waker))?
            };
            match step {
                FlushStep::Done => return Ok(()),
                FlushStep::Sync(storages) => last = storages.iter().try_for_each(|storage| storage.sync()),
            }
        }
    }
}

/// Fills `buf` from a disk, for jobs, probes and tests: it waits and copies.
pub fn read_disk(disk: &dyn Disk, offset: u64, buf: &mut [u8]) -> Result<()> {
    let mut extents = Vec::new();
    disk.resolve_read(checked(offset, buf.len())?, &mut extents)?;
    let mut rest = buf;
    for extent in extents {
        let (part, after) = rest.split_at_mut(to_usize(extent.len)?);
        match extent.source {
            Source::Zero => part.fill(0),
            Source::File { storage, offset } => storage.read_at(part, offset)?,
            Source::Bytes { bytes, offset } => {
                let found = bytes.get(offset..).and_then(|bytes| bytes.get(..part.len()));
                part.copy_from_slice(found.ok_or_else(too_short)?);
            }
        }
        rest = after;
    }
    Ok(())
}

/// Writes `buf` to a disk, for jobs and tests: it waits and copies.
pub fn write_disk(disk: &dyn Disk, offset: u64, buf: &[u8]) -> Result<()> {
    let range = checked(offset, buf.len())?;
    let mut extents = Vec::new();
    let guard = blocking(|waker| {
        extents.clear();
        disk.resolve_write(range, waker, &mut extents)
    })?;
    let mut rest = buf;
    for extent in extents {
        let (part, after) = rest.split_at(to_usize(extent.len)?);
        match extent.source {
            Source::File { storage, offset } => storage.write_at(part, offset)?,
            Source::Zero | Source::Bytes { .. } => {
                return Err(Error::new(ErrorKind::Corrupt, "a write was resolved to no file"));
            }
        }
        rest = after;
    }
    guard.complete()
}

fn checked(offset: u64, len: usize) -> Result<ByteRange> {
    ByteRange::new(offset, len as u64)
        .ok_or_else(|| Error::new(ErrorKind::OutOfRange, "the range ends past 2^64"))
}

fn too_short() -> Error {
    Error::new(ErrorKind::Corrupt, "an extent is longer than its bytes")
}

fn to_usize(len: u64) -> Result<usize> {
    usize::try_from(len).map_err(|_| Error::new(ErrorKind::OutOfRange, "the extent is larger than memory"))
}
