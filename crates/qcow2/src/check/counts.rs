//! How often each cluster of a file is named, within a budget of memory.

use std::collections::BTreeMap;
use std::ops::Range;

use super::walk::{Kind, Reference};

/// Clusters in one chunk of counts.
const CHUNK: u64 = 4096;
/// Chunks held at a time: 256 MiB of counts, which is 4 TiB of 64 KiB clusters.
pub(super) const BUDGET: usize = 16384;

/// The bits of a cell that count; more references than these can tell are as good as these.
const COUNT: u32 = (1 << 28) - 1;
/// What names the cluster.
const OWNED: u32 = 1 << 28;
const L2: u32 = 1 << 29;
const DATA: u32 = 1 << 30;

/// Counts of the clusters of one pass: from `from` on, up to where memory got short.
#[derive(Debug)]
pub(super) struct Counts {
    from: u64,
    /// What is not counted in this pass.
    limit: u64,
    budget: usize,
    chunks: BTreeMap<u64, Box<[u32; CHUNK as usize]>>,
}

impl Counts {
    /// Counts clusters from `from` on, a chunk's first one.
    pub(super) fn new(from: u64, budget: usize) -> Self {
        Self { from, limit: u64::MAX, budget, chunks: BTreeMap::new() }
    }

    /// The clusters that are counted.
    pub(super) fn range(&self) -> Range<u64> {
        self.from..self.limit
    }

    /// Where the next pass is to begin, if one is needed.
    pub(super) fn next_pass(&self) -> Option<u64> {
        (self.limit != u64::MAX).then_some(self.limit)
    }

    pub(super) fn add(&mut self, reference: Reference, cluster_bits: u32) {
        let mark = match reference.kind {
            Kind::Owned => OWNED,
            Kind::L2 => L2,
            Kind::Data => DATA,
        };
        let first = reference.at >> cluster_bits;
        let last = (reference.at + reference.len.max(1) - 1) >> cluster_bits;
        for cluster in first.max(self.from)..=last {
            if cluster >= self.limit {
                break;
            }
            let Some(cell) = self.cell(cluster) else { continue };
            *cell = (*cell & !COUNT) | (*cell & COUNT).saturating_add(reference.times).min(COUNT) | mark;
        }
    }

    /// The cell of `cluster`, unless memory is short and others have to go first.
    fn cell(&mut self, cluster: u64) -> Option<&mut u32> {
        let chunk = cluster / CHUNK;
        if !self.chunks.contains_key(&chunk) && self.chunks.len() == self.budget {
            // The highest chunk waits for the next pass, be it this one or another.
            let (&last, _) = self.chunks.last_key_value()?;
            let last = last.max(chunk);
            self.chunks.remove(&last);
            self.limit = last * CHUNK;
            if chunk == last {
                return None;
            }
        }
        let cells = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; CHUNK as usize]));
        cells.get_mut((cluster % CHUNK) as usize)
    }

    /// How often `cluster` is named.
    pub(super) fn get(&self, cluster: u64) -> u32 {
        let chunk = self.chunks.get(&(cluster / CHUNK));
        chunk.map_or(0, |cells| cells[(cluster % CHUNK) as usize] & COUNT)
    }

    /// The clusters of `range` that are named, and how often.
    pub(super) fn named(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u32)> {
        let cells = self.cells(range);
        cells.filter(|(_, cell)| cell & COUNT != 0).map(|(cluster, cell)| (cluster, cell & COUNT))
    }

    /// Clusters that are a table, and at the same time something else.
    pub(super) fn overlaps(&self) -> impl Iterator<Item = u64> {
        let cells = self.cells(self.range());
        let twice = |cell: u32| match cell & !COUNT {
            OWNED => cell & COUNT > 1,
            kinds => kinds.count_ones() > 1,
        };
        cells.filter(move |(_, cell)| twice(*cell)).map(|(cluster, _)| cluster)
    }

    fn cells(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u32)> {
        let chunks =
            self.chunks.range(range.start / CHUNK..range.end.div_ceil(CHUNK).max(range.start / CHUNK));
        chunks.flat_map(move |(chunk, cells)| {
            let first = chunk * CHUNK;
            let from = range.start.saturating_sub(first) as usize;
            let to = range.end.saturating_sub(first).min(CHUNK) as usize;
            (first + from as u64..).zip(cells.get(from..to).unwrap_or(&[]).iter().copied())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(counts: &mut Counts, kind: Kind, at: u64, len: u64) {
        counts.add(Reference { kind, at, len, times: 1, copied: None }, 0);
    }

    #[test]
    fn what_does_not_fit_waits_for_the_next_pass() {
        let references = [5 * CHUNK, 1, 9 * CHUNK, 7 * CHUNK + 3, 1, 5 * CHUNK, 2 * CHUNK];
        let mut found = Vec::new();
        let (mut from, mut passes) = (0, 0);
        loop {
            let mut counts = Counts::new(from, 2);
            references.iter().for_each(|at| add(&mut counts, Kind::Data, *at, 1));
            assert!(counts.chunks.len() <= 2);
            found.extend(counts.named(counts.range()));
            passes += 1;
            match counts.next_pass() {
                Some(next) => from = next,
                None => break,
            }
        }
        let all = [(1, 2), (2 * CHUNK, 1), (5 * CHUNK, 2), (7 * CHUNK + 3, 1), (9 * CHUNK, 1)];
        assert_eq!((found, passes), (all.to_vec(), 3));
    }

    #[test]
    fn tables_overlap_nothing() {
        let mut counts = Counts::new(0, 2);
        for (kind, at, len) in [
            (Kind::Owned, 0, 2),
            (Kind::L2, 5, 1),
            (Kind::L2, 5, 1),
            (Kind::Data, 6, 2),
            (Kind::Data, 6, 1),
            (Kind::Owned, 10, 3),
            (Kind::Owned, 12, 1),
            (Kind::L2, 20, 1),
            (Kind::Data, 20, 1),
            (Kind::Owned, 1, 1),
        ] {
            add(&mut counts, kind, at, len);
        }
        assert_eq!(counts.overlaps().collect::<Vec<_>>(), [1, 12, 20]);
    }
}
