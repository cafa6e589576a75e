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

use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use block::{Disk, Error, ErrorKind, Result, Source, Storage};
use hostio::{Completion, Ring};

use crate::cache::CacheMode;
use crate::errors::{Errors, is_hosts};
use crate::guest::GuestBuffer;
use crate::request::{Op, Status};
use crate::slot::{Piece, Slot};

mod flush;

/// Bytes of the bounce buffer.
const SCRATCH: usize = 256 * 1024;

/// So many reads are resolved between two looks at the clock.
const CLOCKED: usize = 4;

/// After so long the reads that are resolved are moved, before others are looked for: many times what a batch takes if
/// all is in memory, and less than what a table takes that is on a disk.
const LOOKING: Duration = Duration::from_micros(100);

/// Bytes of the answer to a request for the serial (virtio 1.3, section 5.2.6).
pub(crate) const ID_LEN: usize = 20;

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

    /// Begins what was popped, or the first of it if that takes long to resolve: the rest stays in `popped`.
    ///
    /// Reads are resolved before the first byte is moved: moving bytes pushes what resolving looks at out of the
    /// processor's caches. Not the writes, for a write that is resolved may make others wait for it.
    pub(crate) fn begin_some(&mut self, popped: &mut Vec<u16>, slots: &mut [Slot]) {
        let resolved = self.resolve_reads(popped, slots);
        for index in popped.drain(..resolved) {
            if let Some(slot) = slots.get_mut(usize::from(index)) {
                self.begin(index, slot);
            }
        }
    }

    /// Resolves the reads among the first of these requests; of how many. What was resolved must not wait for the tables of a
    /// long chain that others need.
    fn resolve_reads(&self, popped: &[u16], slots: &mut [Slot]) -> usize {
        // Not for a few: the clock costs as much as a read that is resolved from memory.
        let start = (popped.len() > CLOCKED).then(Instant::now);
        let mut count = 0;
        for few in popped.chunks(CLOCKED) {
            for index in few {
                if let Some(slot) = slots.get_mut(usize::from(*index))
                    && let Some(Op::Read(range)) = slot.op
                    && let Err(error) = self.disk.resolve_read(range, &mut slot.extents)
                {
                    slot.fail(error);
                }
            }
            count += few.len();
            if start.is_some_and(|start| start.elapsed() >= LOOKING) {
                break;
            }
        }
        count
    }

    /// Begins, or asks the disk again for, what `slot.op` says. A read has been resolved.
    pub(crate) fn begin(&mut self, index: u16, slot: &mut Slot) {
        match slot.op.unwrap_or(Op::Refuse(Status::IoError)) {
            Op::Refuse(status) => self.finish(index, slot, status),
            Op::Id => {
                let copied = slot.buffer.copy_from(slot.buffer.whole(), &self.serial);
                slot.written = copied as u32;
                self.finish(index, slot, Status::Ok);
            }
            Op::Read(range) => self.transfer(index, slot, range.len),
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

    /// Whether operations have ended in the ring.
    pub(crate) fn has_completions(&mut self) -> bool {
        self.ring.has_completions()
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
        slot.invalid = !is_hosts(error.kind());
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
