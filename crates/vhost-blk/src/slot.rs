//! A request in flight: what it asks for, what it was resolved to, and what is left to do.

use std::ops::Range;
use std::sync::Arc;

use block::{ByteRange, Ended, Error, ErrorKind, Extent, Flush, Kind, Outcome, Storage, WriteGuard};
use vm_memory::{GuestAddress, Permissions};

use crate::guest::{GuestBuffer, Hold};
use crate::request::{Op, Request, Segments, Status};

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
    /// Whether it failed because it made no sense.
    pub(crate) invalid: bool,
    /// Bytes written to the chain's data.
    pub(crate) written: u32,
    /// How often it was tried after it had been parked.
    pub(crate) tries: u32,
    /// Where its bytes are, a piece for each.
    pub(crate) extents: Vec<Extent>,
    pub(crate) pieces: Vec<Piece>,
    /// Operations in the ring.
    pub(crate) pending: u32,
    pub(crate) failed: Option<Error>,
    pub(crate) guard: Option<WriteGuard>,
    pub(crate) flush: Option<Box<dyn Flush>>,
    pub(crate) syncs: Vec<Arc<dyn Storage>>,
}

/// What is left to move of one extent.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) iovecs: Range<usize>,
    /// Offset in the extent's file.
    pub(crate) offset: u64,
    pub(crate) left: u64,
}

impl Slot {
    /// Makes it this request's, with `segments` of it, in the memory that `hold` holds.
    pub(crate) fn fill(&mut self, head: u16, request: &Request, segments: &Segments, hold: &Hold) {
        let access = if matches!(request.op, Op::Write(_)) { Permissions::Read } else { Permissions::Write };
        let mapped = self.buffer.map(hold, segments.data(&request.op), access);
        self.op = Some(if mapped { request.op } else { Op::Refuse(Status::IoError) });
        (self.head, self.status_at, self.written) = (head, request.status, 0);
    }

    /// Lets go of everything that the request held, but for the room in its vectors.
    pub(crate) fn clear(&mut self) {
        debug_assert_eq!(self.pending, 0, "the kernel still has operations on this buffer");
        self.buffer.clear();
        self.extents.clear();
        self.pieces.clear();
        (self.op, self.failed, self.guard, self.flush) = (None, None, None, None);
        self.syncs.clear();
        (self.tries, self.invalid) = (0, false);
    }

    /// What is to be counted of it, once it has ended.
    pub(crate) fn ended(&self) -> Option<Ended> {
        let nowhere = ByteRange { offset: 0, len: 0 };
        let (kind, range) = match self.op? {
            Op::Read(range) => (Kind::Read, range),
            Op::Write(range) => (Kind::Write, range),
            Op::Flush => (Kind::Flush, nowhere),
            Op::Discard(range) => (Kind::Discard, range),
            Op::WriteZeroes { range, .. } => (Kind::WriteZeroes, range),
            Op::Id | Op::Refuse(_) => return None,
        };
        let outcome = match (self.status, self.invalid) {
            (Status::Ok, _) => Outcome::Done,
            (_, false) => Outcome::Failed,
            (_, true) => Outcome::Invalid,
        };
        Some(Ended { kind, offset: range.offset, len: range.len, outcome })
    }

    /// Lets go of everything of the disk's, so that the request can be begun anew, and nobody waits for it meanwhile.
    pub(crate) fn park(&mut self) {
        debug_assert_eq!(self.pending, 0, "the kernel still has operations on this buffer");
        self.buffer.rewind();
        (self.extents, self.pieces, self.syncs) = (Vec::new(), Vec::new(), Vec::new());
        (self.failed, self.guard, self.flush) = (None, None, None);
    }

    /// Keeps the first thing that went wrong.
    pub(crate) fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
    }
}

impl Piece {
    /// `done` bytes of it have been moved.
    pub(crate) fn advance(&mut self, buffer: &mut GuestBuffer, done: u64) {
        let done = done.min(self.left);
        self.iovecs = buffer.advance(self.iovecs.clone(), done);
        self.offset += done;
        self.left -= done;
    }

    /// The error of a file that ends too soon.
    pub(crate) fn no_bytes(&self) -> Error {
        Error::new(ErrorKind::Io, format!("the file ends at or before {}", self.offset))
    }
}
