//! Closing: what is saved only once, when nothing is written any more.

use block::{Error, ErrorKind, Result};

use crate::bitmaps::Room;
use crate::entry::HostOffset;
use crate::image::{Image, Inner, Writer};
use crate::work::Work;

impl Image {
    /// Saves what the image carries for others: its dirty bitmaps. It is sealed, and was flushed since. An image that is
    /// not closed has bitmaps that nobody trusts any more. To be tried again if it fails.
    ///
    /// Errors: [`ErrorKind::Busy`] if it may still be written.
    pub fn close(&self) -> Result<()> {
        let Some(writer) = &self.0.writer else { return Ok(()) };
        let Some(bitmaps) = &writer.bitmaps else { return Ok(()) };
        if !block::Disk::read_only(self) || !self.is_clean() {
            return Err(Error::new(ErrorKind::Busy, "the image is still being written"));
        }
        writer.check_latch()?;
        writer.with_work(|work| {
            bitmaps.store(
                &*self.0.storage,
                self.0.capacity(),
                &mut Clusters { image: &self.0, writer, work },
            )?;
            work.release(&self.0, writer)
        })
    }
}

/// Room for bitmaps, from the image's own allocation.
struct Clusters<'a> {
    image: &'a Inner,
    writer: &'a Writer,
    work: &'a mut Work,
}

impl Room for Clusters<'_> {
    fn take(&mut self, count: u64) -> Result<HostOffset> {
        let at = self.image.take_table(count)?;
        self.work.refcounts.raise(at, count);
        Ok(at)
    }

    fn settle(&mut self) -> Result<()> {
        self.image.settle_counts(self.writer, self.work)
    }

    fn give_back(&mut self, at: HostOffset, count: u64) -> Result<()> {
        self.work.free_table((at, count));
        Ok(())
    }
}
