//! Grace periods: when room that was freed may be used again.
//!
//! A request holds the extents it resolved to until its I/O is over. Each extent names the file through the *epoch* that
//! was the image's when the request began, before it looked at any entry. A cluster that is freed changes its entry
//! first; then a new epoch begins. So who has the new one can not know the cluster any more, and once nobody has the
//! old one or any before it, nothing is under way there.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use block::{ByteRange, Result, Storage};

/// The file that holds the guest's data, as those see it who resolved in one epoch.
#[derive(Debug)]
pub(crate) struct Epoch(Arc<dyn Storage>);

impl Storage for Epoch {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }

    fn sync(&self) -> Result<()> {
        self.0.sync()
    }

    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }

    fn punch_hole(&self, range: ByteRange) -> Result<()> {
        self.0.punch_hole(range)
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        self.0.next_data(offset)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.fd()
    }

    fn direct_alignment(&self) -> Option<NonZeroU32> {
        self.0.direct_alignment()
    }

    fn in_memory(&self) -> bool {
        self.0.in_memory()
    }
}

/// The epoch that an image is in.
#[derive(Debug)]
pub(crate) struct Epochs(ArcSwap<Epoch>);

impl Epochs {
    pub(crate) fn new(data: Arc<dyn Storage>) -> Self {
        Self(ArcSwap::from_pointee(Epoch(data)))
    }

    /// The present one. To be taken before any entry is looked at, and held while what they said is used.
    pub(crate) fn now(&self) -> Guard<Arc<Epoch>> {
        self.0.load()
    }

    /// Begins a new one, and returns the one that has ended.
    pub(crate) fn next(&self) -> Arc<Epoch> {
        let data = Arc::clone(&self.0.load().0);
        self.0.swap(Arc::new(Epoch(data)))
    }
}

/// Freed clusters that somebody may still be reading or writing.
#[derive(Debug, Default)]
pub(crate) struct Quarantine(VecDeque<(Arc<Epoch>, Vec<u64>)>);

impl Quarantine {
    /// Adds clusters that no entry has named since `ended` or longer.
    pub(crate) fn push(&mut self, ended: Arc<Epoch>, clusters: Vec<u64>) {
        self.0.push_back((ended, clusters));
    }

    /// Those that nobody can be using any more. An epoch's end also waits for those before it.
    pub(crate) fn release(&mut self) -> Option<Vec<u64>> {
        let (epoch, _) = self.0.front_mut()?;
        // Nobody gets hold of an epoch that has ended, so the last holder stays the last.
        Arc::get_mut(epoch)?;
        self.0.pop_front().map(|(_, clusters)| clusters)
    }

    /// All that are in it.
    pub(crate) fn clusters(&self) -> impl Iterator<Item = u64> {
        self.0.iter().flat_map(|(_, clusters)| clusters.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::testing::MemStorage;

    #[test]
    fn clusters_wait_for_all_who_may_know_them() {
        let epochs = Epochs::new(Arc::new(MemStorage::default()));
        let mut quarantine = Quarantine::default();
        let early = epochs.now();
        quarantine.push(epochs.next(), vec![1]);
        let late = epochs.now();
        quarantine.push(epochs.next(), vec![2, 3]);
        let latest = epochs.now();
        drop(late);
        assert_eq!(quarantine.release(), None, "the second may go only after the first");
        assert!(quarantine.clusters().eq([1, 2, 3]));
        drop(early);
        assert_eq!(quarantine.release(), Some(vec![1]));
        assert_eq!(quarantine.release(), Some(vec![2, 3]));
        assert_eq!(quarantine.release(), None);
        drop(latest);
    }
}
