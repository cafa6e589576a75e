//! Changes of what an image says of itself, while it is open and written.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use block::{ByteRange, Context, Error, ErrorKind, Flush, Result, blocking};

use crate::entry::Geometry;
use crate::flush::ImageFlush;
use crate::header::MAX_L1_BYTES;
use crate::header_update;
use crate::image::{Image, Inner, Writer};
use crate::work::Work;
use crate::zero::{Clear, Why};

/// Clusters that are hidden with one flush, when a disk becomes larger: bounds memory and journal, however much is beneath.
const HIDDEN: u64 = 4096;

impl Image {
    /// Makes the disk `capacity` bytes large, durably, while guests read and write it. What is new reads as zeroes,
    /// whatever is beneath. After a loss of power meanwhile the disk has its old size or its new one.
    ///
    /// It waits for flushes under way and syncs: for a control thread.
    ///
    /// Errors: [`ErrorKind::InvalidInput`] if the disk is larger already, or can not be so large.
    pub fn grow(&self, capacity: u64) -> Result<()> {
        let writer = self.0.writer()?;
        let _one_at_a_time = writer.growing.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.grow(writer, capacity).context(|| format!("grow the disk to {capacity} bytes"))
    }

    /// As [`set_backing`](crate::set_backing), for this image, which is open for writing. What it reads from stays what
    /// it was opened with.
    pub fn set_backing(&self, backing: Option<(&str, &str)>) -> Result<()> {
        let writer = self.0.writer()?;
        writer.with_work(|_| header_update::write_backing(&*self.0.storage, backing, || self.0.sync(writer)))
    }
}

impl Writer {
    /// Does something while no flush is under way: waits for it. No other sync is, then: of two at once either might be told
    /// of a failure.
    pub(crate) fn with_work<R>(&self, run: impl FnOnce(&mut Work) -> R) -> R {
        let mut work = blocking(|waker| self.flushes().borrow(waker));
        let result = run(&mut work);
        let waiting = self.flushes().give_back(work);
        waiting.into_iter().for_each(std::task::Waker::wake);
        result
    }

    /// A sync may have failed: it is final.
    pub(crate) fn latch_if(&self, failed: bool) {
        if failed {
            self.failed.store(true, Ordering::Release);
        }
    }
}

impl Inner {
    fn grow(self: &Arc<Self>, writer: &Writer, capacity: u64) -> Result<()> {
        let invalid = |what: &str| Err(Error::new(ErrorKind::InvalidInput, what));
        let old = self.capacity();
        let new = Geometry { capacity, ..self.geometry };
        if capacity < old {
            return invalid("a disk is not made smaller");
        }
        if i64::try_from(capacity).is_err() || new.tables() * 8 > MAX_L1_BYTES {
            return invalid("too large for this cluster size");
        }
        if self.geometry.external {
            self.data.set_len(capacity)?;
        }
        writer.with_work(|work| self.make_room(writer, work, new))?;
        if let Some(bitmaps) = &writer.bitmaps {
            writer.with_work(|_| match bitmaps.grow(&*self.storage, capacity)? {
                true => self.sync(writer),
                false => Ok(()),
            })?;
        }
        self.hide_below(writer, old, capacity)?;
        writer.with_work(|work| {
            header_update::write_mapping(&*self.storage, capacity, work.l1, work.l1_entries)?;
            self.sync(writer)
        })?;
        self.capacity.store(capacity, Ordering::Release);
        Ok(())
    }

    /// Makes the L1 table long enough for a larger disk, in another place.
    fn make_room(&self, writer: &Writer, work: &mut Work, new: Geometry) -> Result<()> {
        let entries = new.tables();
        if entries > u64::from(work.l1_entries) {
            let size = new.cluster_size();
            let clusters = (entries * 8).div_ceil(size);
            let at = self.take_table(clusters)?;
            let mut bytes = vec![0; (clusters * size) as usize];
            for (place, entry) in bytes.chunks_exact_mut(8).zip(self.mapping.l1().iter()) {
                place.copy_from_slice(&entry.0.to_be_bytes());
            }
            self.storage.write_at(&bytes, at.0).context(|| "write a longer L1 table")?;
            work.refcounts.raise(at, clusters);
            self.settle_counts(writer, work)?;
            if let Err(error) =
                header_update::write_mapping(&*self.storage, self.capacity(), at, entries as u32)
            {
                // It may name the new table all the same, which nobody keeps up.
                let back =
                    header_update::write_mapping(&*self.storage, self.capacity(), work.l1, work.l1_entries);
                writer.latch_if(back.is_err());
                return Err(error);
            }
            self.sync(writer)?;
            let old = (work.l1, (u64::from(work.l1_entries) * 8).div_ceil(size));
            (work.l1, work.l1_entries) = (at, entries as u32);
            work.free_table(old);
        }
        self.mapping.extend_l1(entries as usize);
        work.reserve(self, writer, new);
        Ok(())
    }

    /// Brings what was written, and the refcounts of what was taken, onto stable storage.
    pub(crate) fn settle_counts(&self, writer: &Writer, work: &mut Work) -> Result<()> {
        work.refcounts.write_raised(self)?;
        self.sync(writer)?;
        while work.refcounts.link(&*self.storage)? {
            self.sync(writer)?;
            work.linked();
        }
        work.refcounts.settle();
        Ok(())
    }

    /// Makes the room between the old end of the disk and the new one read as zeroes, durably: the rest of the last
    /// cluster, and what is beneath and was past the end.
    fn hide_below(self: &Arc<Self>, writer: &Writer, old: u64, capacity: u64) -> Result<()> {
        let beneath = self.backing.as_ref().map_or(0, |backing| backing.capacity());
        let end = beneath.max(old.next_multiple_of(self.geometry.cluster_size())).min(capacity);
        let mut from = old;
        loop {
            let to = ((from >> self.geometry.cluster_bits) + HIDDEN) << self.geometry.cluster_bits;
            let range = ByteRange { offset: from, len: end.min(to).saturating_sub(from) };
            let why = Why::Zero { unmap: true };
            blocking(|waker| match (Clear { image: self, writer, why, waker }).range(range) {
                Ok(true) => std::task::Poll::Ready(Ok(())),
                Ok(false) => std::task::Poll::Pending,
                Err(error) => std::task::Poll::Ready(Err(error)),
            })?;
            let mut flush: Box<dyn Flush> = Box::new(ImageFlush::new(Arc::clone(self)));
            flush.run()?;
            from = range.end();
            if from >= end {
                return Ok(());
            }
        }
    }

    /// Syncs all files of the image. A failure is final.
    pub(crate) fn sync(&self, writer: &Writer) -> Result<()> {
        let synced = self.files().iter().try_for_each(|file| file.sync());
        synced.inspect_err(|_| writer.latch_if(true)).context(|| "a sync of the image failed, for good")
    }
}
