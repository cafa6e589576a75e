//! Host clusters: where the next one is, and the refcounts of those in use.
//!
//! Clusters are taken at the end of the file and never given back while the image is open, so no cluster changes its
//! meaning under I/O. A refcount is written only for what a flush is about to name in a table, and is then one: so
//! counting is idempotent, and a flush that failed half-way is simply done again.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Context, Error, ErrorKind, Result, Storage};

use crate::bytes::be64;
use crate::entry::{Geometry, HostOffset};
use crate::header::Header;
use crate::metadata::Metadata;

/// Hands out host clusters at the end of the file.
#[derive(Debug)]
pub(crate) struct Allocator {
    geometry: Geometry,
    next: AtomicU64,
    /// Bytes that the refcount table can account for.
    limit: u64,
}

impl Allocator {
    pub(crate) fn new(geometry: Geometry, file_len: u64, refcounts: &Refcounts) -> Self {
        let per_block = geometry.refcounts_per_block() * geometry.cluster_size();
        // The L2 entry's offset field ends at bit 55.
        let limit = (refcounts.table.len() as u64).saturating_mul(per_block).min(1 << 56);
        Self { geometry, next: AtomicU64::new(file_len.next_multiple_of(geometry.cluster_size())), limit }
    }

    /// The end of the cluster at `at`, if it can be counted and named.
    fn end_of(&self, at: u64) -> Option<u64> {
        at.checked_add(self.geometry.cluster_size()).filter(|end| *end <= self.limit)
    }

    /// A cluster that nothing uses.
    pub(crate) fn take(&self) -> Result<HostOffset> {
        match self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| self.end_of(next)) {
            Ok(at) => Ok(HostOffset(at)),
            Err(_) => Err(Error::new(
                ErrorKind::NoSpace,
                "the image's refcount table is full: convert the image, with larger clusters",
            )),
        }
    }

    /// Never hands out the cluster at `used`, nor one before it. `false` if it could not have handed it out.
    pub(crate) fn skip(&self, used: HostOffset) -> bool {
        let end = self.end_of(used.0);
        end.inspect(|end| _ = self.next.fetch_max(*end, Ordering::Relaxed)).is_some()
    }
}

/// The refcount table in RAM, and the writing of 16-bit refcounts.
#[derive(Debug)]
pub(crate) struct Refcounts {
    geometry: Geometry,
    at: HostOffset,
    /// Where each refcount block is, zero for none. What is not in `unlinked` is on disk as well.
    table: Vec<u64>,
    /// Blocks that are in the file but not yet in the table on disk.
    unlinked: BTreeSet<usize>,
}

impl Refcounts {
    /// Reads and checks the refcount table, and tells `metadata` about it and its blocks.
    pub(crate) fn open(storage: &dyn Storage, header: &Header, metadata: &mut Metadata) -> Result<Self> {
        let geometry = header.geometry();
        let clusters = u64::from(header.refcount_table_clusters);
        let mut bytes = vec![0; (clusters * geometry.cluster_size()) as usize];
        let limit = storage.len()?.next_multiple_of(geometry.cluster_size());
        storage.read_at(&mut bytes, header.refcount_table.0).context(|| "read the refcount table")?;
        metadata.add(header.refcount_table, clusters)?;
        let mut table = Vec::with_capacity(bytes.len() / 8);
        for entry in bytes.chunks_exact(8) {
            let block = be64(entry, 0);
            if !geometry.is_aligned(block) || block >= limit {
                return Err(Error::new(ErrorKind::Corrupt, "a refcount table entry points to no block"));
            }
            if block != 0 {
                metadata.add(HostOffset(block), 1)?;
            }
            table.push(block);
        }
        Ok(Self { geometry, at: header.refcount_table, table, unlinked: BTreeSet::new() })
    }

    /// Writes a refcount of one for each cluster (given by its index in the file) that `clusters` holds, making
    /// refcount blocks where there are none; those count themselves.
    pub(crate) fn set_to_one(
        &mut self,
        storage: &dyn Storage,
        allocator: &Allocator,
        mut clusters: BTreeSet<u64>,
    ) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        // Again those of a flush that failed after it made them.
        clusters.extend(self.unlinked.iter().filter_map(|index| self.index_of_block(*index)));
        while let Some(first) = clusters.pop_first() {
            let block = self.block_for(storage, allocator, first / per_block, &mut clusters)?;
            let block_end = (first / per_block + 1) * per_block;
            let mut end = first + 1;
            while end < block_end && clusters.remove(&end) {
                end += 1;
            }
            let ones = 1_u16.to_be_bytes().repeat((end - first) as usize);
            storage.write_at(&ones, block.0 + first % per_block * 2).context(|| "write refcounts")?;
        }
        Ok(())
    }

    fn block_for(
        &mut self,
        storage: &dyn Storage,
        allocator: &Allocator,
        index: u64,
        clusters: &mut BTreeSet<u64>,
    ) -> Result<HostOffset> {
        let index = index as usize;
        let slot = self.table.get_mut(index);
        let slot = slot.ok_or_else(|| Error::new(ErrorKind::NoSpace, "the refcount table is full"))?;
        if *slot == 0 {
            let at = allocator.take()?;
            let size = self.geometry.cluster_size();
            block::write_zeroes(storage, block::ByteRange { offset: at.0, len: size })?;
            *slot = at.0;
            self.unlinked.insert(index);
            clusters.insert(at.0 >> self.geometry.cluster_bits);
        }
        Ok(HostOffset(*slot))
    }

    /// The file's cluster that holds block `index`.
    fn index_of_block(&self, index: usize) -> Option<u64> {
        self.table.get(index).map(|at| at >> self.geometry.cluster_bits)
    }

    /// Whether the table on disk lacks blocks.
    pub(crate) fn has_unlinked(&self) -> bool {
        !self.unlinked.is_empty()
    }

    /// Writes the table entry of one new block, whose contents must be on stable storage by now.
    ///
    /// One at a time, the last one first: a block is taken after the first cluster that it counts, so what counts the
    /// block itself is the same block or a later one, and that has to be named before it.
    pub(crate) fn link_block(&self, storage: &dyn Storage) -> Result<()> {
        let Some(&index) = self.unlinked.last() else { return Ok(()) };
        let at = self.table.get(index).copied().unwrap_or_default();
        storage
            .write_at(&at.to_be_bytes(), self.at.0 + index as u64 * 8)
            .context(|| "write the refcount table")
    }

    /// The entry written last is on stable storage.
    pub(crate) fn block_linked(&mut self) {
        self.unlinked.pop_last();
    }
}
