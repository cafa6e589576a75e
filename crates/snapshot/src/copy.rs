//! Copying a disk, or parts of it, to another disk: what exports and backups do.

use std::collections::VecDeque;
use std::sync::Arc;

use block::{ByteRange, DirtyBitmap, Disk, Error, Extent, Result, Source, blocking, read_disk, write_disk};
use qcow2::Image;

/// How much is resolved at once: the extents of so much are held while it is copied.
const WINDOW: u64 = 8 << 20;

/// How much is read and written at once. It fits the processor's second cache, so what was read is still there when it is
/// written.
const PIECE: u64 = 256 << 10;

/// A part of a disk is looked at for zeroes in pieces of so many bytes at least.
const GRAIN: u64 = 4096;

/// What is copied where.
#[derive(Debug)]
pub struct DiskCopy {
    source: Arc<dyn Disk>,
    target: Arc<dyn Disk>,
    /// The target, if what is written is to be compressed.
    compressing: Option<Arc<Image>>,
    /// Only what is marked; all if `None`.
    marked: Option<DirtyBitmap>,
    /// All that is written begins and ends at a multiple of so many bytes, a power of two: a cluster of the target, which so
    /// needs to know nothing of what is beneath it.
    unit: u64,
    /// What is not written reads as zeroes.
    on_zeroes: bool,
    /// Up to here it is known what is to be copied.
    resolved: u64,
    /// What is to be copied next.
    pieces: VecDeque<Piece>,
    buffer: Vec<u8>,
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
        let (pieces, buffer) = (VecDeque::new(), Vec::new());
        Self { source, target, compressing: None, marked, unit, on_zeroes, resolved: 0, pieces, buffer }
    }

    /// The same, compressed: `image` is the target, and whole clusters of it are written.
    pub fn compressed(self, image: Arc<Image>) -> Self {
        let unit = self.unit.max(image.cluster_size());
        Self { unit, compressing: Some(image), ..self }
    }

    /// Bytes to copy in all.
    pub fn total(&self) -> u64 {
        let Some(marked) = &self.marked else { return self.source.capacity() };
        let (mut total, mut at) = (0, 0);
        while let Some(range) = self.next_marked(marked, at) {
            total += range.len;
            at = range.end();
        }
        total
    }

    /// Copies the next piece; its length, or `None` if there is none.
    pub fn step(&mut self) -> std::result::Result<Option<u64>, CopyFailure> {
        if self.pieces.is_empty() && !self.resolve() {
            return Ok(None);
        }
        let Some(piece) = self.next_piece() else { return Ok(Some(0)) };
        self.copy(piece)?;
        self.done(piece);
        Ok(Some(piece.range.len))
    }

    /// Leaves the next piece out, which could not be copied; its range.
    pub fn skip(&mut self) -> Option<ByteRange> {
        let piece = self.next_piece()?;
        self.done(piece);
        Some(piece.range)
    }

    /// What is to be copied at once.
    fn next_piece(&self) -> Option<Piece> {
        let piece = *self.pieces.front()?;
        let longest = if piece.is_zero { u64::MAX } else { PIECE.max(self.unit) };
        Some(Piece { range: ByteRange { len: piece.range.len.min(longest), ..piece.range }, ..piece })
    }

    fn done(&mut self, piece: Piece) {
        if let Some(first) = self.pieces.front_mut() {
            let end = first.range.end();
            first.range = ByteRange { offset: piece.range.end(), len: end - piece.range.end() };
            if first.range.len == 0 {
                self.pieces.pop_front();
            }
        }
    }

    /// Finds what is to be copied next; whether there is anything.
    fn resolve(&mut self) -> bool {
        let capacity = self.source.capacity();
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
        self.source.resolve_read(window, &mut extents)?;
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
        let start = if data.len == 0 { data.offset } else { data.offset & !(self.unit - 1) }.max(from);
        let stop = data.end().next_multiple_of(self.unit).min(end).max(start);
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
        let capacity = self.source.capacity();
        let found = marked.next_dirty(ByteRange { offset: at, len: capacity.checked_sub(at)? })?;
        let offset = (found.offset & !(self.unit - 1)).max(at);
        let end = found.end().checked_next_multiple_of(self.unit).unwrap_or(capacity).min(capacity);
        Some(ByteRange { offset, len: end - offset })
    }

    fn copy(&mut self, piece: Piece) -> std::result::Result<(), CopyFailure> {
        if piece.is_zero {
            return self.zero(piece.range).map_err(CopyFailure::Write);
        }
        // At most a window.
        self.buffer.resize(piece.range.len as usize, 0);
        read_disk(&*self.source, piece.range.offset, &mut self.buffer).map_err(CopyFailure::Read)?;
        self.put(piece.range.offset).map_err(CopyFailure::Write)
    }

    /// Writes what is in the buffer, runs of zeroes as such: the target stays as sparse as what is in the disk.
    fn put(&self, at: u64) -> Result<()> {
        let is_zero = |unit: &&[u8]| unit.iter().all(|&byte| byte == 0);
        let mut units = self.buffer.chunks(self.unit as usize).peekable();
        let mut start = 0;
        while let Some(first) = units.next() {
            let zero = is_zero(&first);
            let mut end = start + first.len();
            while let Some(unit) = units.next_if(|unit| is_zero(unit) == zero) {
                end += unit.len();
            }
            let (to, len) = (at + start as u64, (end - start) as u64);
            match zero {
                true => self.zero(ByteRange { offset: to, len })?,
                false => self.write(to, self.buffer.get(start..end).unwrap_or_default())?,
            }
            start = end;
        }
        Ok(())
    }

    /// Writes whole units.
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let Some(image) = &self.compressing else { return write_disk(&*self.target, at, bytes) };
        let size = image.cluster_size();
        let mut clusters = (at..).step_by(size as usize).zip(bytes.chunks(size as usize));
        clusters.try_for_each(|(at, cluster)| image.write_compressed(at, cluster))
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        if self.on_zeroes {
            return Ok(());
        }
        blocking(|waker| self.target.write_zeroes(range, true, waker))
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
