//! Runs: where the bytes of a part of the disk are, packed.

use crate::ByteRange;
use list::{List, Run};

mod list;

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

impl Found {
    /// What is found `by` bytes on in a run of this.
    fn advanced(self, by: u32) -> Self {
        match self {
            Self::Data { layer, offset } => Self::Data { layer, offset: offset + u64::from(by) },
            other => other,
        }
    }
}

/// Runs that cover a range of the disk, of at most 4 GiB, without a gap, in order.
#[derive(Clone, Debug)]
pub(super) struct Runs {
    range: ByteRange,
    list: List,
}

impl Runs {
    /// All zeroes.
    pub(super) fn zeroes(range: ByteRange) -> Self {
        Self { range, list: List::new(&[Run { start: 0, found: Found::Zero }]) }
    }

    /// Those of `found`, in any order, which make up `range` exactly. What goes on from one to the next is made one.
    pub(super) fn collect(range: ByteRange, mut found: Vec<(ByteRange, Found)>) -> Self {
        found.sort_unstable_by_key(|(run, _)| run.offset);
        let mut list: Vec<Run> = Vec::with_capacity(found.len());
        for (run, found) in found {
            let start = (run.offset - range.offset) as u32;
            match list.last() {
                Some(last) if last.found.advanced(start - last.start) == found => {}
                _ => list.push(Run { start, found }),
            }
        }
        Self { range, list: List::new(&list) }
    }

    /// What they cover.
    pub(super) fn range(&self) -> ByteRange {
        self.range
    }

    /// Bytes of memory that they take.
    pub(super) fn memory(&self) -> u64 {
        self.list.memory()
    }

    /// Those of `part`, which lies within the range.
    pub(super) fn within(&self, part: ByteRange) -> Self {
        Self::collect(part, self.pieces(part).collect())
    }

    /// The runs of `part`, which lies within the range, in order.
    pub(super) fn pieces(&self, part: ByteRange) -> impl Iterator<Item = (ByteRange, Found)> {
        debug_assert!(self.range.intersect(part) == Some(part), "{part:?} is not within {:?}", self.range);
        let (start, end) = (part.offset - self.range.offset, part.end() - self.range.offset);
        let mut index = self.find(start);
        let mut next = self.list.get(index);
        std::iter::from_fn(move || {
            let run = next.filter(|run| u64::from(run.start) < end)?;
            index += 1;
            next = self.list.get(index);
            let until = next.map_or(end, |next| u64::from(next.start).min(end));
            let from = u64::from(run.start).max(start);
            let range = ByteRange { offset: self.range.offset + from, len: until - from };
            Some((range, run.found.advanced((from - u64::from(run.start)) as u32)))
        })
    }

    /// The index of the run with the byte at `at`, from the start of the range.
    ///
    /// Of a disk that was written in pieces of one size, the runs are as good as evenly spread, so the search begins
    /// where the run would be then and seldom goes far. To halve the list from its middle would touch one line of cold
    /// memory after the other.
    fn find(&self, at: u64) -> usize {
        let is_past = |index: usize| self.list.start(index).is_none_or(|start| u64::from(start) > at);
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
        // The run at `low` begins at or before the byte, that at `high` past it.
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if is_past(middle) { high = middle } else { low = middle }
        }
        low
    }
}
