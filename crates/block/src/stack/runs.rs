//! Runs: where the bytes of a part of the disk are, packed.

use crate::ByteRange;

/// In the place of a layer: the bytes are zero.
const NOBODY: u32 = u32::MAX;
/// In the place of an offset: the bytes are packed. No file is that long.
const PACKED: u64 = u64::MAX;

/// Where a run of bytes was found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Found {
    /// Nowhere, or as zeroes.
    Zero,
    /// In the data file of the layer with this index, from this offset on.
    Data { layer: usize, offset: u64 },
    /// In the layer with this index, compressed.
    Packed { layer: usize },
}

/// A run in 16 bytes. It ends where the next one begins.
#[derive(Clone, Copy, Debug)]
struct Packed {
    /// Bytes from the start of the list's range.
    start: u32,
    layer: u32,
    offset: u64,
}

impl Packed {
    fn new(start: u32, found: Found) -> Self {
        // A chain of 2^32 layers is longer than any that a process can open.
        let (layer, offset) = match found {
            Found::Zero => (NOBODY, 0),
            Found::Data { layer, offset } => (layer as u32, offset),
            Found::Packed { layer } => (layer as u32, PACKED),
        };
        Self { start, layer, offset }
    }

    fn found(self) -> Found {
        match (self.layer, self.offset) {
            (NOBODY, _) => Found::Zero,
            (layer, PACKED) => Found::Packed { layer: layer as usize },
            (layer, offset) => Found::Data { layer: layer as usize, offset },
        }
    }

    /// What is found `by` bytes on in this run.
    fn advanced(self, by: u32) -> Found {
        match self.found() {
            Found::Data { layer, offset } => Found::Data { layer, offset: offset + u64::from(by) },
            other => other,
        }
    }
}

/// Runs that cover a range of the disk, of at most 4 GiB, without a gap, in order.
#[derive(Clone, Debug)]
pub(super) struct Runs {
    range: ByteRange,
    list: Box<[Packed]>,
}

impl Runs {
    /// All zeroes.
    pub(super) fn zeroes(range: ByteRange) -> Self {
        Self { range, list: Box::new([Packed::new(0, Found::Zero)]) }
    }

    /// Those of `found`, in any order, which make up `range` exactly. What goes on from one to the next is made one.
    pub(super) fn collect(range: ByteRange, mut found: Vec<(ByteRange, Found)>) -> Self {
        found.sort_unstable_by_key(|(run, _)| run.offset);
        let mut list: Vec<Packed> = Vec::with_capacity(found.len());
        for (run, found) in found {
            let start = (run.offset - range.offset) as u32;
            match list.last() {
                Some(last) if last.advanced(start - last.start) == found => {}
                _ => list.push(Packed::new(start, found)),
            }
        }
        Self { range, list: list.into_boxed_slice() }
    }

    /// What they cover.
    pub(super) fn range(&self) -> ByteRange {
        self.range
    }

    /// Bytes of memory that they take.
    pub(super) fn memory(&self) -> u64 {
        size_of_val(&*self.list) as u64
    }

    /// Those of `part`, which lies within the range.
    pub(super) fn within(&self, part: ByteRange) -> Self {
        Self::collect(part, self.pieces(part).collect())
    }

    /// The runs of `part`, which lies within the range, in order.
    pub(super) fn pieces(&self, part: ByteRange) -> impl Iterator<Item = (ByteRange, Found)> {
        debug_assert!(self.range.intersect(part) == Some(part), "{part:?} is not within {:?}", self.range);
        let (start, end) = (part.offset - self.range.offset, part.end() - self.range.offset);
        let list = self.list.get(self.find(start)..).unwrap_or_default();
        let runs = list.iter().enumerate().take_while(move |(_, run)| u64::from(run.start) < end);
        runs.map(move |(index, run)| {
            let next = list.get(index + 1).map_or(end, |next| u64::from(next.start).min(end));
            let from = u64::from(run.start).max(start);
            let range = ByteRange { offset: self.range.offset + from, len: next - from };
            (range, run.advanced((from - u64::from(run.start)) as u32))
        })
    }

    /// The index of the run with the byte at `at`, from the start of the range.
    ///
    /// Of a disk that was written in pieces of one size, the runs are as good as evenly spread, so the search begins
    /// where the run would be then and seldom goes far. To halve the list from its middle would touch one line of cold
    /// memory after the other.
    fn find(&self, at: u64) -> usize {
        let is_past = |index: usize| self.list.get(index).is_none_or(|run| u64::from(run.start) > at);
        let mut low = (at * self.list.len() as u64 / self.range.len.max(1)) as usize;
        let mut step = 1;
        while low > 0 && is_past(low) {
            low = low.saturating_sub(step);
            step *= 2;
        }
        let mut high = low + 1;
        step = 1;
        while !is_past(high) {
            (low, high) = (high, high + step);
            step *= 2;
        }
        let between = self.list.get(low..high.min(self.list.len())).unwrap_or_default();
        low + between.partition_point(|run| u64::from(run.start) <= at).saturating_sub(1)
    }
}
