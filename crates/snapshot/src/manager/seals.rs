//! What must be on stable storage before something else may go on, and the daemon's end.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use block::{Context, Disk, Result};
use tracing::warn;

use super::Manager;
use crate::chain::Chain;
use crate::cut::Events as _;
use crate::group::{Served, seal};
use crate::manifest::Unsealed;
use crate::model::Event;

/// How long the daemon's end waits for exports that it has called off: each has at most a piece to read and to write.
const READER_PATIENCE: Duration = Duration::from_secs(5);

impl Manager {
    /// The first half of the daemon's end: takes no more changes, waits for the one under way, undoes what is prepared, and
    /// calls off exports. The disks are still being served, for a guest can hardly thaw without them. An error says what could
    /// not be undone.
    pub fn end_changes(&self) -> Result<()> {
        let mut change = self.lock_change();
        *change = true;
        let chains = self.lock_chains();
        let ended = match self.held().take() {
            Some(prepared) => prepared.held.abort("the daemon ends"),
            None => Ok(()),
        };
        drop(chains);
        self.jobs.stop();
        self.ending.store(true, Ordering::Release);
        if !self.readers.wait_for_none(Instant::now() + READER_PATIENCE) {
            warn!("an export or a probe does not end, and may leave a part of its file");
        }
        ended
    }

    /// The second half: brings all that was acknowledged onto stable storage. No front-end is served any more. A disk
    /// that fails does not keep the others from it; the first failure is told.
    pub fn shut_down(&self) -> Result<()> {
        let ended = self.end_changes();
        let writable = self.disks.values().filter(|disk| !disk.chain.read_only());
        let flushed = writable.map(|disk| disk.chain.close()).fold(Ok(()), Result::and);
        flushed.and(self.finish_seals(self.disks.values())).and(ended)
    }

    /// Does the seals that failed: no cut, and no end, may go on as if those layers were on stable storage.
    pub(crate) fn finish_seals<'a>(&self, disks: impl Iterator<Item = &'a Served>) -> Result<()> {
        let finish = |disk: &Served| {
            let story = || format!("the last snapshot of disk {} is not on stable storage", disk.chain.id());
            seal(&self.store, &disk.chain).context(story)
        };
        disks.map(finish).fold(Ok(()), Result::and).and(self.mark_sealed())
    }

    /// Remembers that all layers beneath the active ones, or beneath those being sealed, are on stable storage.
    pub(super) fn mark_sealed(&self) -> Result<()> {
        let open = self.disks.values().filter(|disk| !disk.chain.layers().is_empty());
        let unsealed: Vec<_> = open.map(|disk| unsealed(&disk.chain)).collect();
        for name in self.store.mark_sealed(&unsealed)? {
            self.bus.emit(Event::Sealed { name });
        }
        Ok(())
    }
}

fn unsealed(chain: &Chain) -> Unsealed<'_> {
    let from = chain.sealing().or_else(|| chain.top().filter(|_| !chain.read_only()));
    let failed =
        chain.layers().iter().filter(|layer| layer.has_failed()).map(|layer| layer.entry.number).collect();
    Unsealed { disk: chain.id(), from: from.map(|layer| layer.entry.number), failed }
}
