//! Copying a disk, or parts of it, to another disk.

use std::collections::VecDeque;
use std::sync::Arc;

use block::{ByteRange, DirtyBitmap, Disk, Error, Extent, Result, Source, Storage, blocking, read_disk, write_disk};

/// How much is resolved at once: the extents of so much are held while it is copied.
const WINDOW: u64 = 8 << 20;

/// How much is read and written at once. It fits the processor's second cache, so what was read is still there when it is
/// written.
const PIECE: u64 = 256 << 10;

/// What is not written if it is all zeroes, so that the target stays as sparse as the disk.
const GRAIN: usize = 4096;

/// What is copied where.
#[derive(Debug)]
pub(crate) struct Copy {
    source: Arc<dyn Disk>,
    target: Arc<dyn Disk>,
    /// Only what is marked; all if `None`.
    marked: Option<DirtyBitmap>,
    /// What is copied begins and ends at a multiple of so many bytes, a power of two: the target needs to know nothing of
    /// what was there before.
    unit: u64,
    /// Bytes of the target that are not written read as zeroes.
    on_zeroes: bool,
    /// Up to here all is resolved.
    resolved: u64,
    /// Resolved and not yet copied, with its place on the disk.
    pieces: VecDeque<(u64, Extent)>,
    buffer: Vec<u8>,
}

/// Which side of a copy failed. The piece is still to be copied.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The source could not be read.
    Read(Error),
    /// The target could not be written.
    Write(Error),
}

impl Copy {
    /// From `source` to `target`, which is as large and no less.
    pub(crate) fn new(
        source: Arc<dyn Disk>,
        target: Arc<dyn Disk>,
        marked: Option<DirtyBitmap>,
    ) -> Self {
        let on_zeroes = is_blank(&*target);
        let unit = u64::from(target.discard_granularity()).next_power_of_two().max(GRAIN as u64);
        let (pieces, buffer) = (VecDeque::new(), Vec::new());
        Self { source, target, marked, unit, on_zeroes, resolved: 0, pieces, buffer }
    }

    /// Bytes to copy in all.
    pub(crate) fn total(&self) -> u64 {
        let Some(marked) = &self.marked else { return self.source.capacity() };
        let (mut total, mut at) = (0, 0);
        while let Some(range) = self.next_marked(marked, at) {
            total += range.len;
            at = range.end();
        }
        total
    }

    /// Copies the next piece; its length, or `None` if there is none.
    pub(crate) fn step(&mut self) -> std::result::Result<Option<u64>, Failure> {
        if self.pieces.is_empty() && !self.resolve().map_err(Failure::Read)? {
            return Ok(None);
        }
        let Some((at, extent)) = self.pieces.pop_front() else { return Ok(Some(0)) };
        let len = match extent.source {
            Source::Zero => extent.len,
            _ => extent.len.min(PIECE),
        };
        let now = Extent { len, source: extent.source.clone() };
        if let Err(failure) = self.copy(at, &now) {
            self.pieces.push_front((at, extent));
            return Err(failure);
        }
        if len < extent.len {
            let rest = Extent { len: extent.len - len, source: extent.source.advanced(len) };
            self.pieces.push_front((at + len, rest));
        }
        Ok(Some(len))
    }

    /// Leaves the next piece out, which could not be copied; its range.
    pub(crate) fn skip(&mut self) -> Option<ByteRange> {
        let (at, extent) = self.pieces.pop_front()?;
        let len = extent.len.min(PIECE);
        if len < extent.len {
            let rest = Extent { len: extent.len - len, source: extent.source.advanced(len) };
            self.pieces.push_front((at + len, rest));
        }
        Some(ByteRange { offset: at, len })
    }

    /// Finds what is to be copied next; whether there is anything.
    fn resolve(&mut self) -> Result<bool> {
        let capacity = self.source.capacity();
        let next = match &self.marked {
            None => (self.resolved < capacity)
                .then(|| ByteRange { offset: self.resolved, len: capacity - self.resolved }),
            Some(marked) => self.next_marked(marked, self.resolved),
        };
        let Some(next) = next else { return Ok(false) };
        let window = ByteRange { len: next.len.min(WINDOW), ..next };
        let mut extents = Vec::new();
        self.source.resolve_read(window, &mut extents)?;
        let mut at = window.offset;
        for extent in extents {
            let len = extent.len;
            self.solid(at, extent)?;
            at += len;
        }
        self.resolved = window.end();
        Ok(true)
    }

    /// Enters an extent, the holes of its file as zeroes.
    fn solid(&mut self, mut at: u64, extent: Extent) -> Result<()> {
        let Source::File { storage, offset } = extent.source else {
            self.pieces.push_back((at, extent));
            return Ok(());
        };
        let (mut from, end) = (offset, offset + extent.len);
        while from < end {
            let rest = ByteRange { offset: from, len: end - from };
            let data = storage.next_data(from)?.and_then(|data| data.intersect(rest));
            let data = data.unwrap_or(ByteRange { offset: end, len: 0 });
            let file = Source::File { storage: Arc::clone(&storage), offset: data.offset };
            for (len, source) in [(data.offset - from, Source::Zero), (data.len, file)] {
                if len > 0 {
                    self.pieces.push_back((at, Extent { len, source }));
                    at += len;
                }
            }
            from = data.end();
        }
        Ok(())
    }

    /// The next marked range from `at` on, made of whole units.
    fn next_marked(&self, marked: &DirtyBitmap, at: u64) -> Option<ByteRange> {
        let capacity = self.source.capacity();
        let found = marked.next_dirty(ByteRange { offset: at, len: capacity.checked_sub(at)? })?;
        let offset = (found.offset & !(self.unit - 1)).max(at);
        let end = found.end().checked_next_multiple_of(self.unit).unwrap_or(capacity).min(capacity);
        Some(ByteRange { offset, len: end - offset })
    }

    fn copy(&mut self, at: u64, piece: &Extent) -> std::result::Result<(), Failure> {
        let range = ByteRange { offset: at, len: piece.len };
        match &piece.source {
            Source::Zero => self.zero(range).map_err(Failure::Write),
            Source::File { storage, offset } => {
                // A piece is at most `PIECE` long.
                self.buffer.resize(piece.len as usize, 0);
                storage.read_at(&mut self.buffer, *offset).map_err(Failure::Read)?;
                self.put(at)
            }
            Source::Bytes { .. } => {
                self.buffer.resize(piece.len as usize, 0);
                read_disk(&*self.source, at, &mut self.buffer).map_err(Failure::Read)?;
                self.put(at)
            }
        }
    }

    /// Writes what is in the buffer, runs of zeroes as such.
    fn put(&self, at: u64) -> std::result::Result<(), Failure> {
        let is_zero = |grain: &&[u8]| grain.iter().all(|&byte| byte == 0);
        let mut grains = self.buffer.chunks(GRAIN).peekable();
        let mut start = 0;
        while let Some(first) = grains.next() {
            let zero = is_zero(&first);
            let mut end = start + first.len();
            while let Some(grain) = grains.next_if(|grain| is_zero(grain) == zero) {
                end += grain.len();
            }
            let (to, len) = (at + start as u64, (end - start) as u64);
            let written = match zero {
                true => self.zero(ByteRange { offset: to, len }),
                false => write_disk(&*self.target, to, self.buffer.get(start..end).unwrap_or_default()),
            };
            written.map_err(Failure::Write)?;
            start = end;
        }
        Ok(())
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        if self.on_zeroes {
            return Ok(());
        }
        blocking(|waker| self.target.write_zeroes(range, true, waker))
    }
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
