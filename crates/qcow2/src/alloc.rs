//! Host clusters: which are free, and who gets the next one.
//!
//! ```text
//!   taken ──▶ named by an entry ──▶ freed ──(flush: nothing on disk names it)──▶ quarantine ──▶ free ──▶ taken …
//!     └──────────────────────(write aborted)──────────────────────────────────────────────────────▲
//! ```
//!
//! A cluster comes from the free list if that has any, else from the end of the file. The free list is fed from the
//! quarantine, and by a *scan* of the refcounts of what the file had when it was opened: it goes through them once, a
//! piece with each flush that finds few free clusters. What is freed before the scan has come by is left to it.

use std::collections::HashSet;
use std::sync::Arc;

use block::{Error, ErrorKind, Result};

use crate::entry::{Geometry, HostOffset};
use crate::epoch::{Epoch, Quarantine};

/// With fewer free clusters than this, a flush looks for more.
const FEW: usize = 256;

/// The clusters of an image's file that nothing uses. Under the lock of the image's writes.
#[derive(Debug)]
pub(crate) struct Allocator {
    cluster_bits: u32,
    /// Clusters by their index in the file, the lowest last.
    free: Vec<u64>,
    quarantine: Quarantine,
    /// The first cluster past the end.
    next: u64,
    /// The end of what can be named and counted.
    limit: u64,
    /// Clusters before that which tables may still need: a flush must not lack the room to count and map what was written.
    reserved: u64,
    /// What the scan has not seen yet, of the file as it was when it was opened.
    scan: std::ops::Range<u64>,
    /// Whether what is freed is used again.
    reuses: bool,
}

impl Allocator {
    /// For a file of `file_len` bytes in which `limit` clusters can be counted. Without `reuses` all clusters come
    /// from the end of the file.
    pub(crate) fn new(geometry: Geometry, file_len: u64, limit: u64, reuses: bool) -> Self {
        let end = file_len.div_ceil(geometry.cluster_size());
        Self {
            cluster_bits: geometry.cluster_bits,
            free: Vec::new(),
            quarantine: Quarantine::default(),
            next: end,
            // The L2 entry's offset field ends at bit 55.
            limit: limit.min(1 << (56 - geometry.cluster_bits)),
            reserved: 0,
            scan: if reuses { 0..end } else { 0..0 },
            reuses,
        }
    }

    /// From now on tables will take at most so many clusters.
    pub(crate) fn reserve(&mut self, clusters: u64) {
        self.reserved = clusters;
    }

    /// A cluster for data, that nothing uses. None if that could leave tables without room.
    pub(crate) fn take(&mut self) -> Result<HostOffset> {
        let limit = self.limit.saturating_sub(self.reserved);
        if self.next > limit {
            return Err(full());
        }
        if self.free.is_empty() {
            while let Some(clusters) = self.release() {
                self.add(clusters);
            }
        }
        match self.free.pop() {
            Some(cluster) => Ok(HostOffset(cluster << self.cluster_bits)),
            None => self.take_before(limit, 1),
        }
    }

    /// `count` clusters in a row for a table, behind all that were ever taken.
    pub(crate) fn take_at_end(&mut self, count: u64) -> Result<HostOffset> {
        let at = self.take_before(self.limit, count)?;
        self.reserved = self.reserved.saturating_sub(count);
        Ok(at)
    }

    fn take_before(&mut self, limit: u64, count: u64) -> Result<HostOffset> {
        let end = self.next.checked_add(count).filter(|end| *end <= limit);
        let end = end.ok_or_else(full)?;
        let at = HostOffset(self.next << self.cluster_bits);
        self.next = end;
        Ok(at)
    }

    /// Takes back a cluster that no entry ever named, and in which no I/O is under way.
    pub(crate) fn give_back(&mut self, unused: HostOffset) {
        self.free.push(unused.0 >> self.cluster_bits);
    }

    /// Never hands out the cluster at `used`, nor one at the end before it. `false` if it could not have handed it out.
    pub(crate) fn skip(&mut self, used: HostOffset) -> bool {
        let end = (used.0 >> self.cluster_bits) + 1;
        if end > self.limit {
            return false;
        }
        self.next = self.next.max(end);
        true
    }

    /// The end of the clusters that are or were in use, in bytes.
    pub(crate) fn end(&self) -> u64 {
        self.next << self.cluster_bits
    }

    /// Takes clusters that nothing on disk names since before `ended` ended, to use them again.
    pub(crate) fn free(&mut self, ended: Arc<Epoch>, clusters: Vec<u64>) {
        if self.reuses && !clusters.is_empty() {
            self.quarantine.push(ended, clusters);
        }
    }

    /// Freed clusters that nobody can be reading or writing any more. They are to be [`added`](Self::add).
    pub(crate) fn release(&mut self) -> Option<Vec<u64>> {
        self.quarantine.release()
    }

    /// Which clusters the scan is to look at next, at most `most`; `None` if there is no need.
    pub(crate) fn wants(&self, most: u64) -> Option<std::ops::Range<u64>> {
        let wants = self.free.len() < FEW && !self.scan.is_empty();
        wants.then(|| self.scan.start..self.scan.end.min(self.scan.start + most))
    }

    /// The scan found that of the clusters before `end` these have a refcount of zero.
    pub(crate) fn scanned(&mut self, end: u64, clusters: Vec<u64>) {
        // Those come out of the quarantine by themselves.
        let waiting: HashSet<u64> = self.quarantine.clusters().collect();
        self.scan.start = end;
        self.add(clusters.into_iter().filter(|cluster| !waiting.contains(cluster)).collect());
    }

    /// Hands these out before the file grows.
    pub(crate) fn add(&mut self, clusters: Vec<u64>) {
        let scan = self.scan.clone();
        self.free.extend(clusters.into_iter().filter(|cluster| !scan.contains(cluster)));
        self.free.sort_unstable_by(|one, other| other.cmp(one));
    }
}

fn full() -> Error {
    let story = "the image's refcount table can grow no more: convert the image, with larger clusters";
    Error::new(ErrorKind::NoSpace, story)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::Epochs;
    use block::testing::MemStorage;

    const CLUSTER: u64 = 1 << 16;

    fn allocator(clusters: u64, limit: u64) -> (Allocator, Epochs) {
        let geometry = Geometry::new(1 << 30, 16, false);
        let epochs = Epochs::new(Arc::new(MemStorage::default()));
        (Allocator::new(geometry, clusters * CLUSTER - 1, limit, true), epochs)
    }

    fn take(allocator: &mut Allocator) -> u64 {
        allocator.take().unwrap().0 / CLUSTER
    }

    #[test]
    fn what_is_freed_is_used_again_once_nobody_can_be_using_it() {
        let (mut allocator, epochs) = allocator(4, 100);
        assert_eq!([take(&mut allocator), take(&mut allocator)], [4, 5]);
        let reader = epochs.now();
        allocator.free(epochs.next(), vec![5, 4]);
        assert_eq!(take(&mut allocator), 6);
        drop(reader);
        assert_eq!([4, 5, 7], [0; 3].map(|_| take(&mut allocator)));
        allocator.give_back(HostOffset(6 * CLUSTER));
        assert_eq!(take(&mut allocator), 6);
    }

    #[test]
    fn the_scan_and_the_quarantine_never_give_the_same_cluster() {
        let (mut allocator, epochs) = allocator(10, 100);
        let reader = epochs.now();
        allocator.free(epochs.next(), vec![1, 2, 8]);
        assert_eq!(allocator.wants(5), Some(0..5));
        allocator.scanned(5, vec![1, 2, 3]);
        assert_eq!([3, 10], [0; 2].map(|_| take(&mut allocator)));
        drop(reader);
        // The eighth is left to the scan.
        assert_eq!([1, 2, 11], [0; 3].map(|_| take(&mut allocator)));
        assert_eq!(allocator.wants(5), Some(5..10));
        allocator.scanned(10, vec![8]);
        assert_eq!([8, 12], [0; 2].map(|_| take(&mut allocator)));
        assert_eq!(allocator.wants(5), None);
    }

    #[test]
    fn the_end_of_what_can_be_counted_is_the_end() {
        let (mut allocator, _) = allocator(4, 6);
        assert!(allocator.skip(HostOffset(4 * CLUSTER)) && !allocator.skip(HostOffset(6 * CLUSTER)));
        assert_eq!(take(&mut allocator), 5);
        assert_eq!(allocator.take().unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(allocator.end(), 6 * CLUSTER);
    }

    #[test]
    fn what_is_reserved_is_for_tables_only() {
        let (mut allocator, _) = allocator(4, 8);
        allocator.reserve(3);
        assert_eq!(take(&mut allocator), 4);
        assert_eq!(allocator.take().unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(allocator.take_at_end(3).unwrap().0, 5 * CLUSTER);
        // They have had their share: what is free may be used.
        allocator.give_back(HostOffset(6 * CLUSTER));
        assert_eq!(take(&mut allocator), 6);
        // Where they may need more than there is, they come first.
        allocator.reserve(1);
        allocator.give_back(HostOffset(6 * CLUSTER));
        assert_eq!(allocator.take().unwrap_err().kind(), ErrorKind::NoSpace);
    }
}
