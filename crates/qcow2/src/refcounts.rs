//! Refcounts: the table and its blocks in the file, and what is to be written to them.
//!
//! Each count to be written is known as a number, never as a difference, and kept until it was written. So a flush that
//! failed half-way is simply done again.
//!
//! A cluster counts one when a flush is about to name it; it counts less only when nothing on stable storage names it
//! any more. New blocks and tables lie at the end of the file: what counts them is the same block or a later one.

use std::collections::{BTreeMap, BTreeSet};

use block::{ByteRange, Context, Error, ErrorKind, Result, Storage};

use crate::bytes::be64;
use crate::entry::{Geometry, HostOffset};
use crate::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use crate::header_update;
use crate::image::Inner;
use crate::refcount_bits::RefcountWidth;

/// Bytes of a block that are read and written at a time.
const WINDOW: u64 = 4096;

/// The refcounts of an image that is being written.
#[derive(Debug)]
pub(crate) struct Refcounts {
    geometry: Geometry,
    width: RefcountWidth,
    at: HostOffset,
    /// Where each refcount block is, zero for none. What is not in `unlinked` is on disk as well.
    table: Vec<u64>,
    /// Blocks that are in the file but not yet in the table on disk.
    unlinked: BTreeSet<usize>,
    /// Those of them that have been written to it, but for a sync.
    linking: Vec<usize>,
    /// Counts of clusters, by their index in the file, that are to be on disk before anything names them.
    raised: BTreeMap<u64, u64>,
    /// Counts of clusters that are named less often than before.
    lowered: BTreeMap<u64, u64>,
    grown: Option<Grown>,
}

/// A larger table that the header does not name yet, for sure.
#[derive(Debug)]
struct Grown {
    /// Where the table was before, and its length in clusters; and larger ones that were made since and are too short by
    /// now. The header may name any of them.
    old: Vec<(HostOffset, u64)>,
    /// Whether the header may name the new one already: then it is written like any other.
    exposed: bool,
}

impl Refcounts {
    /// Reads and checks the refcount table, and tells `found` where it and its blocks are, in clusters.
    pub(crate) fn open(
        storage: &dyn Storage,
        header: &Header,
        mut found: impl FnMut(HostOffset, u64) -> Result<()>,
    ) -> Result<Self> {
        let geometry = header.geometry();
        let clusters = u64::from(header.refcount_table_clusters);
        let mut bytes = vec![0; (clusters * geometry.cluster_size()) as usize];
        let limit = storage.len()?.next_multiple_of(geometry.cluster_size());
        storage.read_at(&mut bytes, header.refcount_table.0).context(|| "read the refcount table")?;
        found(header.refcount_table, clusters)?;
        let mut table = Vec::with_capacity(bytes.len() / 8);
        for entry in bytes.chunks_exact(8) {
            let block = be64(entry, 0);
            if !geometry.is_aligned(block) || block >= limit {
                return Err(Error::new(ErrorKind::Corrupt, "a refcount table entry points to no block"));
            }
            if block != 0 {
                found(HostOffset(block), 1)?;
            }
            table.push(block);
        }
        Ok(Self {
            geometry,
            width: header.refcount_width(),
            at: header.refcount_table,
            table,
            unlinked: BTreeSet::new(),
            linking: Vec::new(),
            raised: BTreeMap::new(),
            lowered: BTreeMap::new(),
            grown: None,
        })
    }

    fn per_block(&self) -> u64 {
        self.width.per_block(self.geometry.cluster_size())
    }

    /// Clusters that the largest table can count.
    pub(crate) fn limit(geometry: Geometry, width: RefcountWidth) -> u64 {
        (MAX_REFCOUNT_TABLE_BYTES / 8).saturating_mul(width.per_block(geometry.cluster_size()))
    }

    /// Clusters that refcount blocks, and tables of these, may still take: each block once, each table half as long again as
    /// the one before.
    pub(crate) fn reserve(&self) -> u64 {
        let most = MAX_REFCOUNT_TABLE_BYTES / 8;
        let there = self.table.iter().filter(|block| **block != 0).count() as u64;
        let clusters = Self::limit(self.geometry, self.width).min(1 << (56 - self.geometry.cluster_bits));
        let blocks = most.min(clusters.div_ceil(self.per_block())).saturating_sub(there);
        let grows = (self.table.len() as u64) < most;
        blocks + if grows { 3 * MAX_REFCOUNT_TABLE_BYTES / self.geometry.cluster_size() } else { 0 }
    }

    fn index(&self, at: HostOffset) -> u64 {
        at.0 >> self.geometry.cluster_bits
    }

    /// `count` clusters from `at` on will be named, once each.
    pub(crate) fn raise(&mut self, at: HostOffset, count: u64) {
        for cluster in self.index(at)..self.index(at) + count {
            self.lowered.remove(&cluster);
            self.raised.insert(cluster, 1);
        }
    }

    /// One more compressed cluster will be named that is in `clusters`; all or none are counted.
    ///
    /// What a journal replayed may have been counted before, so it can reach the highest count there is, and then is counted
    /// enough: nobody packs more into a host cluster than can be counted.
    pub(crate) fn share(&mut self, storage: &dyn Storage, clusters: std::ops::Range<u64>) -> Result<()> {
        for cluster in clusters.clone() {
            if !self.raised.contains_key(&cluster) {
                self.load(storage, cluster)?;
            }
        }
        for cluster in clusters {
            let lowered = self.lowered.remove(&cluster);
            let known = self.raised.get(&cluster).copied().or(lowered).unwrap_or(0);
            self.raised.insert(cluster, known.saturating_add(1).min(self.width.max()));
        }
        Ok(())
    }

    /// Gets to know the count of `cluster`, to [`lower`](Self::lower) it.
    pub(crate) fn load(&mut self, storage: &dyn Storage, cluster: u64) -> Result<()> {
        if !self.lowered.contains_key(&cluster) {
            let mut found = 0;
            self.counts(storage, cluster..cluster + 1, |_, count| found = count)?;
            self.lowered.insert(cluster, found);
        }
        Ok(())
    }

    /// A name of `cluster`, whose count is loaded, is gone from stable storage. `true` if it was the last one.
    pub(crate) fn lower(&mut self, cluster: u64) -> bool {
        match self.lowered.get_mut(&cluster) {
            Some(count @ 1..) => {
                *count -= 1;
                *count == 0
            }
            // The image was corrupt. It stays so.
            _ => false,
        }
    }

    /// Calls `found` with each of `clusters`, which one block counts, and its count on disk.
    fn counts(
        &self,
        storage: &dyn Storage,
        clusters: std::ops::Range<u64>,
        mut found: impl FnMut(u64, u64),
    ) -> Result<()> {
        let (block, first) = (clusters.start / self.per_block(), clusters.start % self.per_block());
        let at = self.table.get(block as usize).copied().unwrap_or(0);
        let bytes = self.width.bytes(first..first + (clusters.end - clusters.start));
        let mut buffer = vec![0; (bytes.end - bytes.start) as usize];
        if at != 0 {
            storage.read_at(&mut buffer, at + bytes.start).context(|| "read refcounts")?;
        }
        // The first byte may begin with the counts of others.
        let skipped = first - bytes.start * 8 / u64::from(self.width.bits());
        for (index, cluster) in clusters.enumerate() {
            found(cluster, self.width.get(&buffer, index + skipped as usize));
        }
        Ok(())
    }

    /// Which of `clusters` have a refcount of zero, and how far it looked. Where there is no block, nothing is found.
    pub(crate) fn zeroes(
        &self,
        storage: &dyn Storage,
        clusters: std::ops::Range<u64>,
    ) -> Result<(u64, Vec<u64>)> {
        let block = clusters.start / self.per_block();
        let end = clusters.end.min((block + 1) * self.per_block());
        let mut zeroes = Vec::new();
        if self.table.get(block as usize).is_some_and(|at| *at != 0) {
            self.counts(storage, clusters.start..end, |cluster, count| {
                if count == 0 && !self.raised.contains_key(&cluster) {
                    zeroes.push(cluster);
                }
            })?;
        }
        Ok((end, zeroes))
    }

    /// Writes what was raised, making room for it: blocks where there are none, which count themselves, and a larger
    /// table. All of it is to be synced before anything is linked.
    pub(crate) fn write_raised(&mut self, image: &Inner) -> Result<()> {
        let storage = &*image.storage;
        // Of the clusters looked at, the highest. New ones come from the end of the file, so they are higher.
        let mut next = 0;
        while let Some((&cluster, _)) = self.raised.range(next..).next() {
            let block = cluster / self.per_block();
            if block >= self.table.len() as u64 {
                let last = self.raised.last_key_value().map_or(cluster, |(last, _)| *last);
                self.grow(image, last / self.per_block())?;
            }
            if self.table.get(block as usize) == Some(&0) {
                self.make_block(image, block as usize)?;
            }
            next = (block + 1) * self.per_block();
        }
        let raised = std::mem::take(&mut self.raised);
        let written = self.write_counts(storage, &raised).and_then(|()| self.write_table(storage));
        self.raised = raised;
        written
    }

    fn make_block(&mut self, image: &Inner, block: usize) -> Result<()> {
        let at = image.take_table(1)?;
        let zeroed = ByteRange { offset: at.0, len: self.geometry.cluster_size() };
        if let Err(error) = block::write_zeroes(&*image.storage, zeroed) {
            image.give_back_table(at);
            return Err(error.context("write a new refcount block"));
        }
        if let Some(entry) = self.table.get_mut(block) {
            *entry = at.0;
        }
        self.unlinked.insert(block);
        self.raise(at, 1);
        Ok(())
    }

    /// Makes the table larger, so that it has an entry for `block`, and for what it takes to grow.
    fn grow(&mut self, image: &Inner, block: u64) -> Result<()> {
        let size = self.geometry.cluster_size();
        let bytes = ((block + 1) * 8 * 3 / 2).next_multiple_of(size).min(MAX_REFCOUNT_TABLE_BYTES);
        if bytes / 8 <= block {
            return Err(Error::new(ErrorKind::NoSpace, "the refcount table can grow no more"));
        }
        let at = image.take_table(bytes / size)?;
        // One that grew in a flush that failed is counted like any other, and goes with the others.
        let mut old = self.grown.take().map_or_else(Vec::new, |grown| grown.old);
        old.push((self.at, (self.table.len() as u64 * 8).div_ceil(size)));
        self.at = at;
        self.table.resize((bytes / 8) as usize, 0);
        self.grown = Some(Grown { old, exposed: false });
        self.raise(at, bytes / size);
        Ok(())
    }

    fn write_counts(&self, storage: &dyn Storage, counts: &BTreeMap<u64, u64>) -> Result<()> {
        let in_window = (WINDOW.min(self.geometry.cluster_size()) * 8) / u64::from(self.width.bits());
        let mut counts = counts.iter().peekable();
        let mut buffer = Vec::new();
        while let Some((first, _)) = counts.peek() {
            let window = *first / in_window;
            let (block, index) =
                (window * in_window / self.per_block(), window * in_window % self.per_block());
            let bytes = self.width.bytes(index..index + in_window);
            let at = self.table.get(block as usize).copied().unwrap_or(0);
            if at == 0 {
                return Err(Error::new(ErrorKind::Corrupt, "a cluster in use has no refcount block"));
            }
            let at = at + bytes.start;
            buffer.resize((bytes.end - bytes.start) as usize, 0);
            storage.read_at(&mut buffer, at).context(|| "read refcounts")?;
            while let Some((cluster, count)) = counts.next_if(|(cluster, _)| *cluster / in_window == window) {
                self.width.set(&mut buffer, (cluster % in_window) as usize, *count)?;
            }
            storage.write_at(&buffer, at).context(|| "write refcounts")?;
        }
        Ok(())
    }

    /// Writes all of a larger table that the header can not name yet.
    fn write_table(&self, storage: &dyn Storage) -> Result<()> {
        if self.grown.as_ref().is_none_or(|grown| grown.exposed) {
            return Ok(());
        }
        let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        storage.write_at(&bytes, self.at.0).context(|| "write a larger refcount table")
    }

    /// Names a new table, or new blocks. `false` if all are named; else it is to be synced, and [`linked`](Self::linked)
    /// told.
    ///
    /// What counts a block is itself or a later one, and that has to be named before it. So all go together that count
    /// themselves, or are counted by what is named already: the last one at least.
    pub(crate) fn link(&mut self, storage: &dyn Storage) -> Result<bool> {
        self.linking.clear();
        if let Some(grown) = &mut self.grown {
            if !grown.exposed {
                // They are all in the table that was written, and synced.
                self.unlinked.clear();
            }
            grown.exposed = true;
            let clusters = (self.table.len() as u64 * 8).div_ceil(self.geometry.cluster_size());
            header_update::write_refcount_table(storage, self.at, clusters as u32)?;
            return Ok(true);
        }
        for &index in &self.unlinked {
            let at = self.table.get(index).copied().unwrap_or_default();
            let counted_by = (self.index(HostOffset(at)) / self.per_block()) as usize;
            if counted_by == index || !self.unlinked.contains(&counted_by) {
                let written = storage.write_at(&at.to_be_bytes(), self.at.0 + index as u64 * 8);
                written.context(|| "write the refcount table")?;
                self.linking.push(index);
            }
        }
        Ok(!self.linking.is_empty())
    }

    /// What was named last is on stable storage. Returns the clusters of tables that are no more.
    pub(crate) fn linked(&mut self) -> Vec<(HostOffset, u64)> {
        for index in self.linking.drain(..) {
            self.unlinked.remove(&index);
        }
        self.grown.take().map_or_else(Vec::new, |grown| grown.old)
    }

    /// What was raised is on stable storage.
    pub(crate) fn settle(&mut self) {
        self.raised.clear();
    }

    /// Writes what was lowered. After an error all of it is to be written again.
    pub(crate) fn write_lowered(&mut self, storage: &dyn Storage) -> Result<()> {
        let lowered = std::mem::take(&mut self.lowered);
        let written = self.write_counts(storage, &lowered);
        if written.is_err() {
            self.lowered = lowered;
        }
        written
    }
}
