//! Finishing what a killed process left in its journal.

use std::collections::BTreeMap;
use std::sync::Arc;

use block::{Error, ErrorKind, Flush, Result};

use crate::compressed::Packed;
use crate::entry::{Entry, GuestCluster, Home, HostOffset};
use crate::flush::ImageFlush;
use crate::image::{Core, Inner};
use crate::journal::Record;
use crate::publish::Step;

impl Inner {
    /// Applies the journal to the entries in RAM. Whether there was anything in it that has to go into the file.
    pub(crate) fn replay_journal(&self) -> Result<bool> {
        let Some(writer) = &self.writer else { return Ok(false) };
        let mut core = writer.core();
        // Only the last one of a cluster counts. A flush that was cut short may have written any of them into the
        // tables, so those before it say nothing of what is to be counted less.
        let mut last = BTreeMap::new();
        core.journal.replay(|Record { cluster, entry }| {
            last.insert(cluster, entry);
            Ok(())
        })?;
        last.into_iter().try_for_each(|(cluster, new)| self.replay(&mut core, cluster, new))?;
        Ok(!core.dirty.is_empty())
    }

    /// Flushes what was replayed, if anything is `left`, and empties the journal.
    pub(crate) fn finish_journal(self: &Arc<Self>, left: bool) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        if left {
            let flush = || {
                let mut flush: Box<dyn Flush> = Box::new(ImageFlush::new(Arc::clone(self)));
                flush.run()
            };
            flush()?;
            writer.core().journal.clear()?;
            // Now nothing names what was freed, so it can be counted less.
            flush()?;
        }
        writer.core().journal.clear()?;
        // What others left free is used before the file grows.
        writer.with_work(|work| work.scan(self, writer))
    }

    fn replay(&self, core: &mut Core, cluster: GuestCluster, new: Entry) -> Result<()> {
        let wrong =
            |why: &str| Error::new(ErrorKind::Corrupt, format!("the journal is not this image's: {why}"));
        if cluster.0 >= self.capacity().div_ceil(self.geometry.cluster_size()) {
            return Err(wrong("a cluster past the end"));
        }
        let mut bytes = Vec::new();
        new.encode(self.geometry, &mut bytes);
        if Entry::decode(self.geometry, &bytes).ok() != Some(new) {
            return Err(wrong("an impossible entry"));
        }
        let old = self.entry(core, cluster)?;
        if new.home.is_compressed() && !self.has_packed(core, new.home)? {
            return Err(wrong("compressed data where it can have none"));
        }
        if let (Some(at), true) = (new.home.offset(), old.home.0 != new.home.0) {
            let here = match self.geometry.external {
                true => at.0 == self.geometry.start_of(cluster),
                // Data that was published was in the file.
                false => {
                    let inside = at.0 < self.limit || new.state.allocated() == 0;
                    inside && new.home.is_own() && !core.metadata.contains(at) && core.allocator.skip(at)
                }
            };
            if !here {
                return Err(wrong("data where it can have none"));
            }
        }
        let step = Step { cluster, old, new };
        self.set_entry(cluster, new);
        core.note(&step, self.geometry.external);
        Ok(())
    }

    /// Whether a compressed cluster can be there: inside the file, and in none of the image's tables.
    fn has_packed(&self, core: &mut Core, home: Home) -> Result<bool> {
        let packed = Packed::decode(self.geometry, home.0)?;
        let (first, count) = packed.clusters(self.geometry);
        let at = |cluster: u64| HostOffset(cluster << self.geometry.cluster_bits);
        let is_free = |cluster: u64| !core.metadata.contains(at(cluster)) && core.allocator.skip(at(cluster));
        Ok(packed.offset < self.limit && (first..first + count).all(is_free))
    }
}
