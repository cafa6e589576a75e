//! The end of a job: from the chain as it was to the one that reads the same without the layers that were merged.
//!
//! 1. The target is on stable storage: [`Work`] has synced it.
//! 2. The header that named what goes names what stays. Frazil does not go by headers, and QEMU's tools read the same
//!    either way.
//! 3. The manifest, in one change: the layers leave the chain, snapshots move to the image that holds them now, a deleted
//!    one is forgotten, and so is the job. This is the instant; a crash before it leaves the old chain and the job, one
//!    after it the new chain.
//! 4. The chain in memory; then the images that nobody names are removed. The manifest remembers them until they are.

use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use block::{ByteRange, Disk, ErrorKind, Layer as _, Place, Result};
use tracing::{info, warn};

use super::model::JobStatus;
use super::plan::doomed;
use super::record::Direction;
use super::work::{Done, Part, Work};
use super::world::Reading;
use crate::cut::{Layers as _, Limits};
use crate::group::{Group, Served};
use crate::layer::{Access, Layer};
use crate::manifest::Manifest;
use crate::naming::Naming;
use crate::store::backing_name;

/// How often it is tried to write to a header that another program reads.
const RETRY: Duration = Duration::from_millis(500);

/// A header that is to name another backing file.
struct Rename {
    naming: Naming,
    /// The layer that it will lie on; `None` for nothing.
    beneath: Option<Arc<Layer>>,
}

impl Rename {
    fn carry_out(&self) -> Result<()> {
        let names = self.beneath.as_ref().map(|beneath| backing_name(self.naming.path(), &beneath.entry));
        self.naming.write(names.as_ref().map(|(name, format)| (name.as_str(), format.as_str())))
    }
}

/// The right to switch.
struct Turn<'a> {
    exclusive: MutexGuard<'a, ()>,
    /// The snapshots that go: nobody reads them, nor begins to.
    closed: Vec<Reading>,
    renames: Vec<Rename>,
}

impl Work<'_> {
    /// Puts a new overlay on the active layer, as a cut does, without a snapshot. The caller has the right to change
    /// chains.
    pub(super) fn pivot(&self, served: &Served) -> Result<()> {
        let chain = &served.chain;
        crate::group::seal(&self.world.store, chain)?;
        let group = Group { store: Arc::clone(&self.world.store), name: None, disks: vec![served.clone()] };
        let prepared = Box::new(group).prepare()?;
        let closed = chain.gate().close();
        if let Err(error) = closed.drain(Instant::now() + Limits::default().drain) {
            drop(closed);
            prepared.undo()?;
            return Err(error.context(format!("put a new layer on disk {}", chain.id())));
        }
        drop(prepared.pivot());
        drop(closed);
        Ok(())
    }

    /// Switches all parts at once.
    pub(super) fn switch(&self, parts: &[Part]) -> Done<()> {
        let by_itself = self.job.identity.auto_finalize;
        match by_itself {
            true => self.job.go(JobStatus::Waiting)?,
            // Whoever is to say so may take long: nobody is held up meanwhile.
            false => self.job.finalize_point()?,
        }
        let Turn { exclusive, closed, renames } = self.wait_for_turn(parts)?;
        if by_itself {
            self.job.go(JobStatus::Pending)?;
        }
        renames.iter().try_for_each(Rename::carry_out)?;
        drop(renames);
        self.commit_manifest(parts)?;
        drop(closed);
        for part in parts {
            self.relayer(part);
        }
        // From here on nothing can fail: what is left to do is to put away.
        for part in parts {
            if let Err(error) = part.target().and_then(|target| self.finish(part.disk(), target)) {
                warn!(%error, "a layer that was merged into is not open to other readers");
            }
        }
        self.world.store.remove_unused();
        for part in parts {
            if let Err(error) = self.settle_down(&part.served) {
                warn!(disk = part.disk(), %error, "an empty layer stays on top");
            }
        }
        drop(exclusive);
        Ok(())
    }

    /// Waits until no cut is under way, nobody else has an image open whose header is to change, and nobody reads a snapshot
    /// that goes: what is beneath its layer may be written to once it is not known any more.
    fn wait_for_turn(&self, parts: &[Part]) -> Done<Turn<'_>> {
        let mut is_told = false;
        loop {
            let exclusive = self.world.exclusive(self.job)?;
            match self.close_readers().and_then(|closed| Ok((closed, self.renames(parts)?))) {
                Ok((closed, renames)) => return Ok(Turn { exclusive, closed, renames }),
                Err(error) if error.kind() == ErrorKind::Busy => {
                    drop(exclusive);
                    if !std::mem::replace(&mut is_told, true) {
                        info!(job = self.job.identity.id, %error, "the job waits for who reads");
                    }
                    self.job.wait(RETRY)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn close_readers(&self) -> Result<Vec<Reading>> {
        doomed(self.task).iter().map(|name| self.world.readers.close(name)).collect()
    }

    fn renames(&self, parts: &[Part]) -> Result<Vec<Rename>> {
        parts.iter().filter_map(|part| self.renaming(part).transpose()).collect()
    }

    /// The header that a part changes, and the right to write to it.
    fn renaming(&self, part: &Part) -> Result<Option<Rename>> {
        let chain = part.served.chain.layers();
        let place = |layer: Option<&Arc<Layer>>| {
            let number = layer.map(|layer| layer.entry.number);
            chain.iter().position(|layer| Some(layer.entry.number) == number)
        };
        match part.direction {
            Some(Direction::Up) => {
                let (layer, lowest) = (Arc::clone(part.target()?), place(part.layers.first()));
                let beneath =
                    lowest.and_then(|lowest| lowest.checked_sub(1)).and_then(|index| chain.get(index));
                // It is the job's own, and still open for writing.
                Ok(Some(Rename { naming: Naming::of_own(layer), beneath: beneath.cloned() }))
            }
            _ => {
                let above = place(part.layers.last()).and_then(|highest| chain.get(highest + 1));
                let Some(above) = above else { return Ok(None) };
                let beneath = Some(Arc::clone(part.target()?));
                Ok(Some(Rename { naming: Naming::begin(Arc::clone(above))?, beneath }))
            }
        }
    }

    /// The change of the manifest that is the instant of the switch.
    fn commit_manifest(&self, parts: &[Part]) -> Result<()> {
        self.world.store.update(|manifest| {
            for part in parts {
                drop_layers(manifest, part)?;
            }
            doomed(self.task).iter().for_each(|name| manifest.forget(name));
            manifest.jobs.retain(|record| record.id != self.job.identity.id);
            Ok(())
        })
    }

    /// Shows the chain without the layers that went.
    fn relayer(&self, part: &Part) {
        let is_dropped = |layer: &Arc<Layer>| {
            part.dropped().iter().any(|dropped| dropped.entry.number == layer.entry.number)
        };
        let chain = &part.served.chain;
        let layers: Vec<_> = chain.layers().iter().filter(|layer| !is_dropped(layer)).cloned().collect();
        chain.relayer(layers, part.served.how);
    }

    /// Takes an empty layer off the top again where no guest writes to it, if no snapshot is beneath: so a disk whose last
    /// snapshot is deleted while its guest is off is in one image as before.
    fn settle_down(&self, served: &Served) -> Result<()> {
        let chain = &served.chain;
        if chain.read_only() || chain.is_connected() {
            return Ok(());
        }
        let layers = chain.layers().clone();
        let [rest @ .., beneath, top] = &layers[..] else { return Ok(()) };
        if self.world.store.manifest().must_not_go_on(chain.id(), &beneath.entry) {
            return Ok(());
        }
        // A front-end that connects from here on waits at the gate.
        let closed = chain.gate().close();
        closed.drain(Instant::now() + Limits::default().drain)?;
        if chain.is_connected() || !is_empty(top)? || beneath.disk().capacity() != top.disk().capacity() {
            return Ok(());
        }
        let access = Access::Write { journals: self.world.store.journals() };
        beneath.begin_writing(chain.id(), served.how.table_bytes(), access)?;
        let changed = self.world.store.update(|manifest| {
            manifest.remove_layer(chain.id(), &top.entry);
            manifest.set_sealed(chain.id(), beneath.entry.number, false);
            Ok(())
        });
        if let Err(error) = changed {
            self.finish(chain.id(), beneath)?;
            return Err(error);
        }
        let left: Vec<_> = rest.iter().chain([beneath]).cloned().collect();
        chain.relayer(left.clone(), served.how);
        chain.attach(left)?;
        drop(closed);
        self.world.store.remove_unused();
        Ok(())
    }
}

/// Whether an overlay holds nothing at all.
fn is_empty(layer: &Layer) -> Result<bool> {
    let all = ByteRange { offset: 0, len: layer.disk().capacity() };
    let run = layer.run_at(all)?;
    Ok(run.range == all && run.place == Place::Absent)
}

/// Takes the layers of a part that go out of the manifest.
fn drop_layers(manifest: &mut Manifest, part: &Part) -> Result<()> {
    let target = &part.target()?.entry;
    let (disk, dropped) = (part.disk().to_owned(), part.dropped());
    if part.direction == Some(Direction::Down)
        && let Some(highest) = part.layers.last()
    {
        manifest.merge_down(&disk, &highest.entry, target);
    }
    for layer in dropped {
        manifest.remove_layer(&disk, &layer.entry);
    }
    manifest.set_sealed(&disk, target.number, true);
    Ok(())
}
