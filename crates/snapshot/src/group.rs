//! The layers of the disks of one cut: the chain's side of the cut's ports.
//!
//! What waits for storage, making overlays and sealing layers, is done for several disks at once: who froze the guest by other means
//! waits for the first, and a slow disk is then waited for once.

use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use block::Result;

use crate::chain::Chain;
use crate::cut::{Layers, PivotedLayers, PreparedLayers};
use crate::layer::{Layer, Opening};
use crate::model::{SnapshotDisk, SnapshotRecord};
use crate::store::Store;

/// Disks whose storage is waited for at once. More would take the processors from the guests.
const AT_ONCE: usize = 8;

/// A disk that is served, and how its images are opened.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) chain: Arc<Chain>,
    pub(crate) how: Opening,
    /// With more overlays than this, the oldest snapshots go.
    pub(crate) max_overlays: Option<u32>,
}

/// The disks of a cut, before it.
pub(crate) struct Group {
    pub(crate) store: Arc<Store>,
    /// The snapshot's; a job's pivot and a cut for marks take none.
    pub(crate) name: Option<String>,
    pub(crate) disks: Vec<Served>,
}

/// One disk with its overlay: not in use yet.
struct Prepared {
    chain: Arc<Chain>,
    /// The layer that is active.
    top: Arc<Layer>,
    overlay: Arc<Layer>,
}

struct PreparedGroup {
    store: Arc<Store>,
    /// Whether the cut makes a snapshot.
    is_named: bool,
    disks: Vec<Prepared>,
}

struct PivotedGroup {
    store: Arc<Store>,
    is_named: bool,
    /// Each disk with the layer that holds its frozen state.
    disks: Vec<(Arc<Chain>, Arc<Layer>)>,
}

impl Layers for Group {
    fn prepare(self: Box<Self>) -> Result<Box<dyn PreparedLayers>> {
        let (store, is_named) = (Arc::clone(&self.store), self.name.is_some());
        let mut prepared = PreparedGroup { store, is_named, disks: Vec::new() };
        match self.create(&mut prepared.disks) {
            Ok(()) => Ok(Box::new(prepared)),
            Err(error) => {
                prepared.remove_overlays();
                Err(error)
            }
        }
    }
}

impl Group {
    /// Makes an overlay for each disk, and puts them into the manifest. On an error some may have been made.
    fn create(&self, prepared: &mut Vec<Prepared>) -> Result<()> {
        let mut all = Ok(());
        for made in at_once(&self.disks, |disk| self.overlay(disk)) {
            match made {
                Ok(disk) => prepared.push(disk),
                Err(error) => all = all.and(Err(error)),
            }
        }
        all?;
        self.store.update(|manifest| {
            for disk in &*prepared {
                manifest.push_layer(disk.chain.id(), &disk.top.entry, &disk.overlay.entry);
            }
            manifest.pending.clone_from(&self.name);
            Ok(())
        })
    }

    fn overlay(&self, Served { chain, how, .. }: &Served) -> Result<Prepared> {
        let (base, top) = {
            let layers = chain.layers();
            let ends = layers.first().zip(layers.last());
            let (base, top) = ends.ok_or_else(|| chain.closed())?;
            (Arc::clone(base), Arc::clone(top))
        };
        let overlay = self.store.create_overlay(chain.id(), &base, &top, *how)?;
        Ok(Prepared { chain: Arc::clone(chain), top, overlay })
    }
}

impl PreparedGroup {
    fn remove_overlays(&self) {
        self.disks.iter().for_each(|disk| self.store.discard(disk.chain.id(), &disk.overlay.entry));
    }
}

impl PreparedLayers for PreparedGroup {
    fn undo(self: Box<Self>) -> Result<()> {
        self.store.update(|manifest| {
            for disk in &self.disks {
                manifest.pop_layer(disk.chain.id(), &disk.overlay.entry);
            }
            manifest.pending = None;
            Ok(())
        })?;
        self.remove_overlays();
        Ok(())
    }

    fn pivot(self: Box<Self>) -> Box<dyn PivotedLayers> {
        let Self { store, is_named, disks } = *self;
        let disks = disks
            .into_iter()
            .filter_map(|disk| {
                let frozen = disk.chain.pivot(disk.overlay)?;
                Some((disk.chain, frozen))
            })
            .collect();
        Box::new(PivotedGroup { store, is_named, disks })
    }
}

impl PivotedLayers for PivotedGroup {
    fn disks(&self) -> Vec<SnapshotDisk> {
        let held = |(chain, layer): &(Arc<Chain>, Arc<Layer>)| {
            let path: PathBuf = layer.entry.path.clone();
            SnapshotDisk { id: chain.id().to_owned(), path, format: layer.entry.format }
        };
        self.disks.iter().map(held).collect()
    }

    fn record(&mut self, record: &SnapshotRecord) -> Result<()> {
        if self.is_named { self.store.enter(record) } else { Ok(()) }
    }

    fn seal(&mut self) -> Result<()> {
        // One that fails is no reason to leave the others unsynced.
        at_once(&self.disks, |(chain, _)| seal(&self.store, chain)).into_iter().fold(Ok(()), Result::and)
    }
}

/// What `work` makes of each disk, in their order: of some at once, each in a thread of its own, as far as there may be threads.
fn at_once<T: Sync, R: Send>(disks: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let work = &work;
    let some = |disks: &[T]| -> Vec<R> {
        thread::scope(|scope| {
            let begin = |disk| {
                let own = thread::Builder::new().name("layers".to_owned());
                own.spawn_scoped(scope, move || work(disk)).map_err(|_| disk)
            };
            let begun: Vec<_> = disks.iter().map(begin).collect();
            let end = |begun: std::result::Result<thread::ScopedJoinHandle<'_, R>, _>| match begun {
                Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
                Err(disk) => work(disk),
            };
            begun.into_iter().map(end).collect()
        })
    };
    disks.chunks(AT_ONCE).flat_map(some).collect()
}

/// Syncs the layer of the last snapshot, if that is still to be done.
pub(crate) fn seal(store: &Store, chain: &Chain) -> Result<()> {
    let _turn = chain.turn_to_seal();
    let Some(layer) = chain.sealing() else { return Ok(()) };
    layer.flush()?;
    store.layer_sealed(chain.id(), &layer)?;
    layer.settle(chain.id());
    chain.sealed(&layer);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn eight_are_waited_for_at_once_and_no_more() {
        let (here, most, barrier) = (AtomicUsize::new(0), AtomicUsize::new(0), Barrier::new(AT_ONCE));
        let disks: Vec<usize> = (0..3 * AT_ONCE).collect();
        let done = at_once(&disks, |disk| {
            most.fetch_max(here.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            barrier.wait();
            // One too many would come meanwhile.
            thread::sleep(Duration::from_millis(20));
            here.fetch_sub(1, Ordering::SeqCst);
            *disk
        });
        assert_eq!((done, most.into_inner()), (disks, AT_ONCE));
    }
}
