//! Carrying out one worker's requests: resolve, do the I/O, complete.
//!
//! ```text
//!  begin ─▶ resolve ─▶ pieces ─▶ (ring) ─▶ transferred ─▶ complete the guard ─▶ [flush] ─▶ finished
//!              │                                                                   │
//!              └── Pending: deferred, asked again when the bell rings ◀────────────┘
//! ```
//! A change that the host could not carry out ends as *stalled* where the disk's policy parks it: the worker takes it
//! out of its slot, and begins it anew later.
//!
//! How a piece's bytes move depends on the file:
//! - without a descriptor, or where `O_DIRECT` would not take the guest's buffer: through a bounce buffer, at once;
//! - past the page cache: through io_uring;
//! - in a file that is only in memory: at once, for `RWF_NOWAIT` is not to be had there;
//! - through the page cache, a read: at once what is cached (`RWF_NOWAIT`), the rest through io_uring;
//! - through the page cache, a write: at once. It is a copy in memory, and io_uring would hand it to a kernel thread
//!   (buffered writes are not attempted inline on most file systems), which costs more than the copy itself. The price:
//!   a host with too much dirty memory makes the worker wait in it.
#![allow(unsafe_code, reason = "one block: who queues I/O on guest memory promises to leave it alone")]

use std::ops::Range;
use std::sync::Arc;
use std::task::{Poll, Waker};

use block::{Disk, Error, ErrorKind, Extent, Flush, FlushStep, Result, Source, Storage, WriteGuard};
use hostio::{Completion, Ring};
use vm_memory::GuestAddress;

use crate::cache::CacheMode;
use crate::errors::Errors;
use crate::guest::GuestBuffer;
use crate::request::{Op, Status};

/// Bytes of the bounce buffer.
const SCRATCH: usize = 256 * 1024;

/// Bytes of the answer to a request for the serial (virtio 1.3, section 5.2.6).
pub(crate) const ID_LEN: usize = 20;

/// One request in flight. Slots are used again, so that a request allocates nothing once its vectors have grown.
#[derive(Default)]
pub(crate) struct Slot {
    pub(crate) op: Option<Op>,
    /// The chain's first descriptor.
    pub(crate) head: u16,
    pub(crate) status_at: Option<GuestAddress>,
    pub(crate) buffer: GuestBuffer,
    /// How it ended.
    pub(crate) status: Status,
    /// Bytes written to the chain's data.
    pub(crate) written: u32,
    /// How often it was tried after it had been parked.
    pub(crate) tries: u32,
    extents: Vec<Extent>,
    pieces: Vec<Piece>,
    /// Operations in the ring.
    pending: u32,
    failed: Option<Error>,
    guard: Option<WriteGuard>,
    flush: Option<Box<dyn Flush>>,
    syncs: Vec<Arc<dyn Storage>>,
}

/// What is left to move of one extent.
#[derive(Debug)]
struct Piece {
    iovecs: Range<usize>,
    /// Offset in the extent's file.
    offset: u64,
    left: u64,
}

impl Slot {
    /// Lets go of everything that the request held, but for the room in its vectors.
    pub(crate) fn clear(&mut self) {
        debug_assert_eq!(self.pending, 0, "the kernel still has operations on this buffer");
        self.buffer.clear();
        self.extents.clear();
        self.pieces.clear();
        (self.op, self.failed, self.guard, self.flush) = (None, None, None, None);
        self.syncs.clear();
        self.tries = 0;
    }

    /// Lets go of everything of the disk's, so that the request can be begun anew, and nobody waits for it meanwhile.
    pub(crate) fn park(&mut self) {
        debug_assert_eq!(self.pending, 0, "the kernel still has operations on this buffer");
        self.buffer.rewind();
        (self.extents, self.pieces, self.syncs) = (Vec::new(), Vec::new(), Vec::new());
        (self.failed, self.guard, self.flush) = (None, None, None);
    }

    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
    }
}

/// A worker's means. Slots are named by their index.
pub(crate) struct Engine {
    disk: Arc<dyn Disk>,
    serial: [u8; ID_LEN],
    cache: Arc<CacheMode>,
    ring: Ring,
    /// Rings the worker's bell.
    waker: Waker,
    scratch: Box<[u8]>,
    errors: Errors,
    /// Slots that wait for the bell, in the order in which they began.
    deferred: Vec<u16>,
    /// Slots that have ended, and whose used ring entries are to be written.
    pub(crate) finished: Vec<u16>,
    /// Slots of requests to be parked, and why.
    pub(crate) stalled: Vec<(u16, ErrorKind)>,
}

impl Engine {
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        serial: [u8; ID_LEN],
        cache: Arc<CacheMode>,
        ring: Ring,
        waker: Waker,
        errors: Errors,
    ) -> Self {
        Self {
            disk,
            serial,
            cache,
            ring,
            waker,
            scratch: vec![0; SCRATCH].into_boxed_slice(),
            errors,
            deferred: Vec::new(),
            finished: Vec::new(),
            stalled: Vec::new(),
        }
    }

    /// Begins, or asks the disk again for, what `slot.op` says.
    pub(crate) fn begin(&mut self, index: u16, slot: &mut Slot) {
        match slot.op.unwrap_or(Op::Refuse(Status::IoError)) {
            Op::Refuse(status) => self.finish(index, slot, status),
            Op::Id => {
                let copied = slot.buffer.copy_from(slot.buffer.whole(), &self.serial);
                slot.written = copied as u32;
                self.finish(index, slot, Status::Ok);
            }
            Op::Read(range) => match self.disk.resolve_read(range, &mut slot.extents) {
                Ok(()) => self.transfer(index, slot, range.len),
                Err(error) => self.fail(index, slot, error),
            },
            Op::Write(range) => {
                slot.extents.clear();
                match self.disk.resolve_write(range, &self.waker, &mut slot.extents) {
                    Poll::Pending => self.deferred.push(index),
                    Poll::Ready(Ok(guard)) => {
                        slot.guard = Some(guard);
                        self.transfer(index, slot, range.len);
                    }
                    Poll::Ready(Err(error)) => self.fail(index, slot, error),
                }
            }
            Op::Flush => self.begin_flush(index, slot),
            Op::Discard(range) => {
                let asked = self.disk.discard(range, &self.waker);
                self.written(index, slot, asked);
            }
            Op::WriteZeroes { range, unmap } => {
                let asked = self.disk.write_zeroes(range, unmap, &self.waker);
                self.written(index, slot, asked);
            }
        }
    }

    /// Asks again for every deferred request.
    pub(crate) fn retry(&mut self, slots: &mut [Slot]) {
        let waiting = self.deferred.len();
        for index in std::mem::take(&mut self.deferred) {
            let Some(slot) = slots.get_mut(usize::from(index)) else { continue };
            match slot.flush.is_some() {
                true => self.step_flush(index, slot, Ok(())),
                false => self.begin(index, slot),
            }
        }
        debug_assert!(self.deferred.len() <= waiting, "a retry defers at most what it was given");
    }

    /// Takes the completions that there are; `false` if there was none.
    pub(crate) fn reap(&mut self, slots: &mut [Slot]) -> bool {
        let mut any = false;
        while let Some(completion) = self.ring.next_completion() {
            any = true;
            let (index, part) = ((completion.tag >> 32) as u16, completion.tag as u32 as usize);
            if let Some(slot) = slots.get_mut(usize::from(index)) {
                slot.pending -= 1;
                match slot.flush.is_some() {
                    true => self.synced(index, slot, completion),
                    false => self.moved(index, slot, part, completion),
                }
            }
        }
        any
    }

    /// Submits what the requests have queued.
    pub(crate) fn submit(&mut self) -> Result<()> {
        self.ring.submit()
    }

    /// The ring, whose descriptor is readable while there are completions.
    pub(crate) fn ring(&self) -> &Ring {
        &self.ring
    }

    fn transfer(&mut self, index: u16, slot: &mut Slot, len: u64) {
        slot.pieces.clear();
        let (mut first, mut resolved) = (0, 0);
        // All cuts come before the first operation: they move iovecs.
        for extent in &slot.extents {
            let end = slot.buffer.cut(first, extent.len);
            let offset = if let Source::File { offset, .. } = extent.source { offset } else { 0 };
            slot.pieces.push(Piece { iovecs: first..end, offset, left: extent.len });
            first = end;
            resolved += extent.len;
        }
        if resolved != len {
            slot.fail(Error::new(ErrorKind::Corrupt, format!("{resolved} of {len} bytes were resolved")));
        }
        for part in 0..slot.pieces.len() {
            if slot.failed.is_none()
                && let Err(error) = self.move_piece(index, slot, part)
            {
                slot.fail(error);
            }
        }
        if slot.pending == 0 {
            self.transferred(index, slot);
        }
    }

    /// Moves a piece, or queues what is left of it.
    fn move_piece(&mut self, index: u16, slot: &mut Slot, part: usize) -> Result<()> {
        let write = matches!(slot.op, Some(Op::Write(_)));
        let Slot { extents, pieces, buffer, pending, .. } = slot;
        let (Some(extent), Some(piece)) = (extents.get(part), pieces.get_mut(part)) else { return Ok(()) };
        let storage = match &extent.source {
            Source::File { storage, .. } => &**storage,
            Source::Zero | Source::Bytes { .. } if write => {
                return Err(Error::new(ErrorKind::Corrupt, "a write was resolved to no file"));
            }
            Source::Zero => {
                buffer.fill_zero(piece.iovecs.clone());
                return Ok(());
            }
            Source::Bytes { bytes, offset } => {
                let bytes = bytes.get(*offset..).unwrap_or_default();
                return match buffer.copy_from(piece.iovecs.clone(), bytes) as u64 >= piece.left {
                    true => Ok(()),
                    false => Err(Error::new(ErrorKind::Corrupt, "an extent is longer than its bytes")),
                };
            }
        };
        let Some(fd) = storage.fd() else {
            return bounce(buffer, piece, storage, write, &mut self.scratch);
        };
        if let Some(alignment) = storage.direct_alignment() {
            let alignment = alignment.get();
            let fits = piece.offset.is_multiple_of(u64::from(alignment))
                && buffer.is_aligned(piece.iovecs.clone(), alignment as usize);
            if !fits {
                return bounce(buffer, piece, storage, write, &mut self.scratch);
            }
        } else if write || storage.in_memory() {
            while piece.left > 0 {
                match buffer.move_now(write, piece.iovecs.clone(), fd, piece.offset)? {
                    0 => return Err(piece.no_bytes()),
                    done => piece.advance(buffer, done),
                }
            }
            return Ok(());
        } else if let Some(done) = buffer.read_cached(piece.iovecs.clone(), fd, piece.offset) {
            piece.advance(buffer, done);
            if piece.left == 0 {
                return Ok(());
            }
        }
        let tag = tag(index, part);
        // SAFETY: `pending` keeps the slot, and with it the buffer, as it is until the completion is reaped.
        let queued =
            unsafe { buffer.queue(&mut self.ring, write, piece.iovecs.clone(), fd, piece.offset, tag) };
        match queued {
            Ok(()) => *pending += 1,
            // The kernel is short of something: the slow way needs nothing of the ring.
            Err(_) => return bounce(buffer, piece, storage, write, &mut self.scratch),
        }
        Ok(())
    }

    fn moved(&mut self, index: u16, slot: &mut Slot, part: usize, completion: Completion) {
        let Slot { pieces, buffer, .. } = slot;
        let Some(piece) = pieces.get_mut(part) else { return };
        let going_on = match completion.result {
            Ok(0) => Err(piece.no_bytes()),
            Ok(done) => {
                piece.advance(buffer, u64::from(done));
                if piece.left == 0 { Ok(()) } else { self.move_piece(index, slot, part) }
            }
            Err(error) if is_transient(&error) => self.move_piece(index, slot, part),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = going_on {
            slot.fail(error);
        }
        if slot.pending == 0 {
            self.transferred(index, slot);
        }
    }

    /// All pieces have been moved, or one has failed and no other is under way.
    fn transferred(&mut self, index: u16, slot: &mut Slot) {
        let guard = slot.guard.take();
        if let Some(error) = slot.failed.take() {
            return self.fail(index, slot, error);
        }
        match (slot.op, guard) {
            (_, Some(guard)) => {
                let completed = Poll::Ready(guard.complete());
                self.written(index, slot, completed);
            }
            (Some(Op::Read(range)), None) => {
                slot.written = u32::try_from(range.len).unwrap_or(u32::MAX);
                self.finish(index, slot, Status::Ok);
            }
            _ => self.finish(index, slot, Status::IoError),
        }
    }

    /// The disk has been changed, as far as `asked` says: with the write cache off, it is flushed too.
    fn written(&mut self, index: u16, slot: &mut Slot, asked: Poll<Result<()>>) {
        match asked {
            Poll::Pending => self.deferred.push(index),
            Poll::Ready(Err(error)) => self.fail(index, slot, error),
            Poll::Ready(Ok(())) if self.cache.is_writeback() => self.finish(index, slot, Status::Ok),
            Poll::Ready(Ok(())) => self.begin_flush(index, slot),
        }
    }

    fn begin_flush(&mut self, index: u16, slot: &mut Slot) {
        slot.flush = Some(self.disk.flush());
        self.step_flush(index, slot, Ok(()));
    }

    fn step_flush(&mut self, index: u16, slot: &mut Slot, mut last: Result<()>) {
        loop {
            let Some(flush) = &mut slot.flush else { return };
            // After a failed sync no later one could be trusted, so none is tried.
            let lost = last.is_err();
            match flush.step(last, &self.waker) {
                Poll::Pending => return self.deferred.push(index),
                Poll::Ready(Err(error)) if lost => return self.report(index, slot, &error),
                Poll::Ready(Err(error)) => return self.fail(index, slot, error),
                Poll::Ready(Ok(FlushStep::Done)) => return self.finish(index, slot, Status::Ok),
                Poll::Ready(Ok(FlushStep::Sync(storages))) => slot.syncs = storages,
            }
            last = self.begin_syncs(index, slot);
            if slot.pending > 0 {
                // Told with the others when the last one has ended.
                if let Err(error) = last {
                    slot.fail(error);
                }
                return;
            }
        }
    }

    /// Begins the syncs that the ring can do, does the others.
    fn begin_syncs(&mut self, index: u16, slot: &mut Slot) -> Result<()> {
        let mut result = Ok(());
        for (part, storage) in slot.syncs.iter().enumerate() {
            match storage.fd().map(|fd| self.ring.sync_data(fd, tag(index, part))) {
                Some(Ok(())) => slot.pending += 1,
                _ => result = result.and(storage.sync()),
            }
        }
        result
    }

    fn synced(&mut self, index: u16, slot: &mut Slot, completion: Completion) {
        if let Err(error) = completion.result {
            slot.fail(error.into());
        }
        if slot.pending == 0 {
            let last = slot.failed.take().map_or(Ok(()), Err);
            self.step_flush(index, slot, last);
        }
    }

    /// The request failed: it is answered or parked.
    fn fail(&mut self, index: u16, slot: &mut Slot, error: Error) {
        if self.errors.parks(slot.op.as_ref(), &error) {
            if slot.tries == 0 {
                self.errors.parked(slot.op.as_ref(), &error);
            }
            self.stalled.push((index, error.kind()));
        } else {
            self.report(index, slot, &error);
        }
    }

    fn report(&mut self, index: u16, slot: &mut Slot, error: &Error) {
        self.errors.reported(slot.op.as_ref(), error);
        let status = match error.kind() {
            ErrorKind::Unsupported => Status::Unsupported,
            _ => Status::IoError,
        };
        self.finish(index, slot, status);
    }

    pub(crate) fn finish(&mut self, index: u16, slot: &mut Slot, status: Status) {
        slot.status = status;
        if status != Status::Ok {
            slot.written = 0;
        }
        self.finished.push(index);
    }
}

impl Piece {
    fn advance(&mut self, buffer: &mut GuestBuffer, done: u64) {
        let done = done.min(self.left);
        self.iovecs = buffer.advance(self.iovecs.clone(), done);
        self.offset += done;
        self.left -= done;
    }

    fn no_bytes(&self) -> Error {
        Error::new(ErrorKind::Io, format!("the file ends at or before {}", self.offset))
    }
}

/// Moves a piece through the bounce buffer.
fn bounce(
    buffer: &mut GuestBuffer,
    piece: &mut Piece,
    storage: &dyn Storage,
    write: bool,
    scratch: &mut [u8],
) -> Result<()> {
    match write {
        true => buffer.write_bounced(piece.iovecs.clone(), storage, piece.offset, scratch),
        false => buffer.read_bounced(piece.iovecs.clone(), storage, piece.offset, scratch),
    }
}

/// What the ring calls an operation: the slot, and the number of the piece or sync.
fn tag(index: u16, part: usize) -> u64 {
    u64::from(index) << 32 | part as u64
}

fn is_transient(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock)
}
