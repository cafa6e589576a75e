//! Publishing: entries change, for all to see, and sure to survive the death of the process.

use block::{Error, ErrorKind, Result};

use crate::entry::{Entry, GuestCluster, Home, HostOffset};
use crate::image::{Core, Inner};
use crate::journal::Record;

/// An entry as it was and as it will be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) cluster: GuestCluster,
    pub(crate) old: Entry,
    pub(crate) new: Entry,
}

/// An entry that no flush has taken yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) entry: Entry,
    /// Whether its host cluster was taken for it, and no flush has counted it. Never of a compressed cluster, each of which
    /// is counted by itself ([`Packing::named`](crate::pack::Packing)).
    pub(crate) fresh: bool,
}

/// What an entry named before, and does not any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Freed {
    pub(crate) home: Home,
    /// Whether a flush has counted it, so that it is to be counted less.
    pub(crate) counted: bool,
}

impl Inner {
    /// Makes new entries visible, all or none. Those that stay as they are cost nothing.
    pub(crate) fn publish(&self, core: &mut Core, steps: &[Step]) -> Result<()> {
        let record = |step: &Step| Record { cluster: step.cluster, entry: step.new };
        core.journal.append(steps.iter().map(record))?;
        for step in steps {
            self.set_entry(step.cluster, step.new);
            core.note(step, self.geometry.external);
        }
        Ok(())
    }
}

impl Core {
    /// Remembers what a flush has to do for this change. `external` clusters are nobody's to count.
    pub(crate) fn note(&mut self, step: &Step, external: bool) {
        let Step { cluster, old, new } = *step;
        let change = self.dirty.entry(cluster).or_insert(Change { entry: new, fresh: false });
        change.entry = new;
        if external || old.home.0 == new.home.0 {
            return;
        }
        if !old.home.is_none() {
            self.freed.push(Freed { home: old.home, counted: !change.fresh });
        }
        change.fresh = !new.home.is_none() && !new.home.is_compressed();
        self.packing.named.extend(Some(new.home).filter(|home| home.is_compressed()));
    }

    /// Whether no write is under way, and a flush has taken all that was published.
    pub(crate) fn is_idle(&self) -> bool {
        self.claims.is_empty() && self.dirty.is_empty() && self.freed.is_empty()
    }

    /// A cluster for a guest's data.
    pub(crate) fn take(&mut self) -> Result<HostOffset> {
        let at = self.allocator.take()?;
        match self.metadata.contains(at) {
            // Its refcount was zero, though it is in use.
            true => Err(Error::new(ErrorKind::Corrupt, "a free cluster is one of the image's own tables")),
            false => Ok(at),
        }
    }
}
