//! Copying a disk, or parts of it, to another disk: what exports and backups do.
//!
//! ```text
//!   source ──▶ windows ──▶ pieces ──▶ a turn: two threads, each reads a piece and writes it ──▶ target
//!            (what is zero?)  ▲                        │
//!                             └── what failed, what is left
//! ```
//! Both threads of a turn take whole pieces, so that what was read is still in the processor's cache when it is written, while
//! the other one reads or writes. Between two turns nothing is in flight: what was told of them is what is in the target.

mod ends;
mod turn;

use std::collections::VecDeque;
use std::sync::Arc;

use block::{ByteRange, DirtyBitmap, Disk, Error, Extent, Result, Source};
use qcow2::Image;

use ends::Ends;
use turn::{Turn, WORKERS};

/// How much is resolved at once: the extents of so much are held while it is copied.
const WINDOW: u64 = 8 << 20;

/// How much is read and written at once. It fits the processor's second cache, so what was read is still there when it is
/// written.
const PIECE: u64 = 256 << 10;

/// How much is looked up ahead of a turn, and how many pieces of it there may be.
const AHEAD: u64 = 4 << 20;
const MAX_PIECES: usize = 64;

/// A part of a disk is looked at for zeroes in pieces of so many bytes at least.
const GRAIN: u64 = 4096;

/// What is copied where.
#[derive(Debug)]
pub struct DiskCopy {
    ends: Ends,
    /// Only what is marked; all if `None`.
    marked: Option<DirtyBitmap>,
    /// Up to here it is known what is to be copied.
    resolved: u64,
    /// What is to be copied next.
    pieces: VecDeque<Piece>,
    /// Why the first of these could not be copied, if nobody has been told yet.
    failure: Option<CopyFailure>,
    left_out: Vec<ByteRange>,
    /// Each thread's, kept from turn to turn.
    buffers: [Vec<u8>; WORKERS],
}

/// A part of the disk, at most a window long.
#[derive(Clone, Copy, Debug)]
struct Piece {
    range: ByteRange,
    /// Whether it is known to be zero.
    is_zero: bool,
}

/// Which side of a copy failed. The piece is still to be copied.
#[derive(Debug)]
pub enum CopyFailure {
    /// The source could not be read.
    Read(Error),
    /// The target could not be written.
    Write(Error),
}

impl CopyFailure {
    /// Why, whichever side it was.
    pub fn error(self) -> Error {
        match self {
            Self::Read(error) | Self::Write(error) => error,
        }
    }
}

impl DiskCopy {
    /// From `source` to `target`, which is as large.
    pub fn new(source: Arc<dyn Disk>, target: Arc<dyn Disk>, marked: Option<DirtyBitmap>) -> Self {
        // What is marked may be zero and not have been before: what is beneath an increment, today or once it is put on top
        // of the backup before it, must not show there.
        let on_zeroes = marked.is_none() && is_blank(&*target);
        let unit = u64::from(target.discard_granularity()).next_power_of_two().clamp(GRAIN, WINDOW);
        Self {
            ends: Ends { source, target, compressing: None, unit, on_zeroes },
            marked,
            resolved: 0,
            pieces: VecDeque::new(),
            failure: None,
            left_out: Vec::new(),
            buffers: Default::default(),
        }
    }

    /// The same, compressed: `image` is the target, and whole clusters of it are written.
    pub fn compressed(mut self, image: Arc<Image>) -> Self {
        self.ends.unit = self.ends.unit.max(image.cluster_size());
        self.ends.compressing = Some(image);
        self
    }

    /// Bytes to copy in all.
    pub fn total(&self) -> u64 {
        let Some(marked) = &self.marked else { return self.ends.source.capacity() };
        let (mut total, mut at) = (0, 0);
        while let Some(range) = self.next_marked(marked, at) {
            total += range.len;
            at = range.end();
        }
        total
    }

    /// Copies some pieces, `most` bytes of them or a little more, one piece at least; how many bytes, or `None` if there are
    /// none to copy. It returns soon, also where the target is slow.
    ///
    /// A failure is told by itself, after what was copied. Its piece is tried again by the next step, or
    /// [left out](Self::skip).
    pub fn step(&mut self, most: u64) -> std::result::Result<Option<u64>, CopyFailure> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        // Something, however little is asked for: nothing ahead means that all is copied.
        let enough = AHEAD.min(most).max(1);
        while self.pieces.len() < MAX_PIECES && self.bytes_ahead() < enough && self.resolve() {}
        if self.pieces.is_empty() {
            return Ok(None);
        }
        let turn = Turn::new(std::mem::take(&mut self.pieces), self.longest(), most);
        let (copied, failure);
        (copied, self.pieces, failure) = turn.take(&self.ends, &mut self.buffers);
        match failure {
            Some(failure) if copied == 0 => Err(failure),
            failure => {
                self.failure = failure;
                Ok(Some(copied))
            }
        }
    }

    /// Leaves the next piece out, which could not be copied; its range.
    pub fn skip(&mut self) -> Option<ByteRange> {
        let longest = self.longest();
        let piece = Piece::next_of(&mut self.pieces, longest)?;
        // Where nothing can be copied any more there is one range, not millions.
        match self.left_out.last_mut().filter(|last| last.end() == piece.range.offset) {
            Some(last) => last.len += piece.range.len,
            None => self.left_out.push(piece.range),
        }
        Some(piece.range)
    }

    /// Whether nothing was left out so far.
    pub fn is_whole(&self) -> bool {
        self.left_out.is_empty()
    }

    /// Marks what was to be copied and has not been: what was left out, and what is still to come.
    pub fn mark_left(&self, left: &DirtyBitmap) {
        let rest = ByteRange {
            offset: self.resolved,
            len: self.ends.source.capacity().saturating_sub(self.resolved),
        };
        let pieces = self.pieces.iter().map(|piece| piece.range);
        for range in self.left_out.iter().copied().chain(pieces).chain([rest]) {
            let Some(marked) = &self.marked else {
                left.mark(range);
                continue;
            };
            let mut at = range.offset;
            while let Some(found) =
                marked.next_dirty(ByteRange { offset: at, len: range.end().saturating_sub(at) })
            {
                left.mark(found);
                at = found.end();
            }
        }
    }

    /// Bytes of one piece of data, at most.
    fn longest(&self) -> u64 {
        PIECE.max(self.ends.unit)
    }

    fn bytes_ahead(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.range.len).sum()
    }

    /// Finds what is to be copied next; whether there is anything.
    fn resolve(&mut self) -> bool {
        let capacity = self.ends.source.capacity();
        let next = match &self.marked {
            None => (self.resolved < capacity)
                .then(|| ByteRange { offset: self.resolved, len: capacity - self.resolved }),
            Some(marked) => self.next_marked(marked, self.resolved),
        };
        let Some(next) = next else { return false };
        // Both ends are those of units, or of the disk: a window is made of whole units.
        let end = next.end().min((next.offset & !(WINDOW - 1)) + WINDOW);
        let window = ByteRange { offset: next.offset, len: end - next.offset };
        // Where a part can not be read, the reading of pieces finds out which.
        let parts = self.data(window).unwrap_or_else(|_| vec![window]);
        let mut zero_from = window.offset;
        for part in parts {
            zero_from = self.enter(zero_from, part, window.end());
        }
        self.enter(zero_from, ByteRange { offset: window.end(), len: 0 }, window.end());
        self.resolved = window.end();
        true
    }

    /// The parts of a window that are not known to be zero.
    fn data(&self, window: ByteRange) -> Result<Vec<ByteRange>> {
        let mut extents = Vec::new();
        self.ends.source.resolve_read(window, &mut extents)?;
        let (mut parts, mut at) = (Vec::new(), window.offset);
        for extent in extents {
            if !matches!(extent.source, Source::Zero) {
                let solid = solid(&extent)?.into_iter();
                parts.extend(solid.map(|data| ByteRange { offset: at + data.offset, len: data.len }));
            }
            at += extent.len;
        }
        Ok(parts)
    }

    /// Enters the zeroes from `from` on, whole units of them, and then the data, with the rest of its units. Returns where
    /// the next zeroes may begin.
    fn enter(&mut self, from: u64, data: ByteRange, end: u64) -> u64 {
        let start = if data.len == 0 { data.offset } else { data.offset & !(self.ends.unit - 1) }.max(from);
        let stop = data.end().next_multiple_of(self.ends.unit).min(end).max(start);
        let zeroes = ByteRange { offset: from, len: start - from };
        for (range, is_zero) in [(zeroes, true), (ByteRange { offset: start, len: stop - start }, false)] {
            if range.len > 0 {
                self.pieces.push_back(Piece { range, is_zero });
            }
        }
        stop
    }

    /// The next marked range from `at` on, made of whole units.
    fn next_marked(&self, marked: &DirtyBitmap, at: u64) -> Option<ByteRange> {
        let capacity = self.ends.source.capacity();
        let found = marked.next_dirty(ByteRange { offset: at, len: capacity.checked_sub(at)? })?;
        let offset = (found.offset & !(self.ends.unit - 1)).max(at);
        let end = found.end().checked_next_multiple_of(self.ends.unit).unwrap_or(capacity).min(capacity);
        Some(ByteRange { offset, len: end - offset })
    }
}

impl Piece {
    /// Takes what is to be copied at once from the front; of data at most `longest` bytes.
    fn next_of(pieces: &mut VecDeque<Self>, longest: u64) -> Option<Self> {
        let first = pieces.front_mut()?;
        let len = if first.is_zero { first.range.len } else { first.range.len.min(longest) };
        let piece = Self { range: ByteRange { len, ..first.range }, ..*first };
        first.range = ByteRange { offset: piece.range.end(), len: first.range.len - len };
        if first.range.len == 0 {
            pieces.pop_front();
        }
        Some(piece)
    }
}

/// The parts of an extent that are not holes of its file, from its own begin on.
fn solid(extent: &Extent) -> Result<Vec<ByteRange>> {
    let Source::File { storage, offset } = &extent.source else {
        return Ok(vec![ByteRange { offset: 0, len: extent.len }]);
    };
    let mut parts = Vec::new();
    let (mut at, end) = (*offset, offset + extent.len);
    while at < end {
        let rest = ByteRange { offset: at, len: end - at };
        let Some(data) = storage.next_data(at)?.and_then(|data| data.intersect(rest)) else { break };
        parts.push(ByteRange { offset: data.offset - offset, len: data.len });
        at = data.end();
    }
    Ok(parts)
}

/// Whether a disk is known to read as zeroes, all of it.
fn is_blank(disk: &dyn Disk) -> bool {
    let mut extents = Vec::new();
    let resolved = disk.resolve_read(ByteRange { offset: 0, len: disk.capacity() }, &mut extents);
    let blank = |extent: &Extent| match &extent.source {
        Source::Zero => true,
        Source::File { storage, offset } => {
            let data = storage.next_data(*offset);
            data.is_ok_and(|data| data.is_none_or(|data| data.offset >= offset + extent.len))
        }
        Source::Bytes { .. } => false,
    };
    resolved.is_ok() && extents.iter().all(blank)
}

#[cfg(test)]
mod tests;
