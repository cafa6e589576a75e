//! Changes of a disk that are not cuts: revert, another size, and another name for an image.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use block::{Context, Disk, Error, ErrorKind, Result};

use super::change::Change;
use super::{Manager, open_layers};
use crate::edit;
use crate::group::Served;
use crate::jobs::named;
use crate::naming::{self, Naming};
use crate::store::{Store, format_name};

/// How long maintenance waits for jobs that it has called off: they have a flush to do.
const JOB_PATIENCE: Duration = Duration::from_secs(10);

/// How often it looks whether they have ended.
const LOOK: Duration = Duration::from_millis(10);

/// How long maintenance waits for requests in flight; no front-end is connected then, so there are hardly any.
const MAINTENANCE_DRAIN: Duration = Duration::from_secs(5);

impl Manager {
    /// Makes a disk larger, by zeroes, while it is served; durable when it returns. `size` is in bytes, made of whole
    /// sectors, and not less than it is. A disk on a block device can be as large as that is now.
    pub fn resize(&self, id: &str, size: u64) -> Result<()> {
        let chain = self.chain(id)?;
        let refuse = |kind, story: &str| Err(Error::new(kind, format!("disk {id} {story}")));
        let _change = self.begin()?;
        if chain.read_only() {
            return refuse(ErrorKind::ReadOnly, "is read-only");
        }
        if !size.is_multiple_of(block::SECTOR) || size > i64::MAX as u64 {
            return refuse(ErrorKind::InvalidInput, "has a size that is a multiple of 512 bytes");
        }
        match size.cmp(&chain.capacity()) {
            Ordering::Less => {
                refuse(ErrorKind::InvalidInput, "can not shrink: what is cut off would be lost")
            }
            Ordering::Equal => Ok(()),
            Ordering::Greater => chain.grow(size).context(|| format!("resize disk {id}")),
        }
    }

    /// Has the image of a layer name the one beneath it as `name` says, which must mean the same file: in the other image's
    /// folder, or absolute. `node` is the layer's node, of the disk that `device` or its nodes name. A job that changes
    /// what is beneath writes a name of its own again.
    pub fn rename_backing(&self, device: &str, node: &str, name: &str) -> Result<()> {
        let invalid = |story: String| Error::new(ErrorKind::InvalidInput, story);
        let (id, number) = {
            let manifest = self.store.manifest();
            // QEMU's words.
            let missing = || format!("Cannot find device='{device}' nor node-name='{device}'");
            let (id, _) =
                named(&manifest, device).ok_or_else(|| Error::new(ErrorKind::NotFound, missing()))?;
            let owner = named(&manifest, node).filter(|(owner, _)| *owner == id);
            let number = owner.and_then(|(_, number)| number);
            (id.clone(), number.ok_or_else(|| invalid(format!("disk {id} has no layer '{node}'")))?)
        };
        let _change = self.begin_alone(&BTreeSet::from([id.clone()]))?;
        let layers = self.chain(&id)?.layers();
        let at = layers.iter().position(|layer| layer.entry.number == number);
        let Some([beneath, layer]) = at.and_then(|at| layers.get(at.checked_sub(1)?..=at)) else {
            let story = format!("'{node}' lies on nothing that Frazil put it on: use `qemu-img rebase -u`");
            return Err(invalid(story));
        };
        naming::check(&layer.entry.path, name, &beneath.entry.path)?;
        Naming::begin(Arc::clone(layer))?.write(Some((name, format_name(beneath.entry.format))))
    }

    /// Brings the disks of a snapshot back to it. Refused while a front-end is connected, and if newer snapshots would
    /// be lost, unless `discard_newer` is set.
    pub fn revert(&self, name: &str, discard_newer: bool) -> Result<()> {
        self.maintain(name, |store| edit::revert(store, name, discard_newer))
    }

    /// The right to change chains, with no job at work on these disks. What nobody asked for is called off, and can not put
    /// away what it began while a snapshot is prepared: then this is refused, as any change is.
    fn begin_alone(&self, ids: &BTreeSet<String>) -> Result<Change<'_>> {
        let deadline = Instant::now() + JOB_PATIENCE;
        loop {
            let change = self.begin()?;
            if self.jobs.make_way(ids)? {
                return Ok(change);
            }
            drop(change);
            if Instant::now() >= deadline {
                let story = "a job that was called off has not ended yet: try again later";
                return Err(Error::new(ErrorKind::Busy, story));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Runs `work` on the state directory with the images of a snapshot's disks closed.
    fn maintain(&self, name: &str, work: impl FnOnce(&Store) -> Result<()>) -> Result<()> {
        let ids = self.show(name)?.disks.into_iter().map(|disk| disk.id).collect();
        let _change = self.begin_alone(&ids)?;
        if let Some(pin) = self.store.manifest().pins.iter().find(|pin| ids.contains(&pin.disk)) {
            let story = format!("disk {} is being read by a backup: wait for it, or cancel it", pin.disk);
            return Err(Error::new(ErrorKind::Busy, story));
        }
        let _images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let disks: Vec<_> = ids.iter().filter_map(|id| self.disks.get(id)).collect();
        // A front-end that connects from here on waits at the gates.
        let closed: Vec<_> = disks.iter().map(|disk| disk.chain.gate().close()).collect();
        if let Some(disk) = disks.iter().find(|disk| disk.chain.is_connected()) {
            let story = format!("a guest is connected to disk {}: shut it down first", disk.chain.id());
            return Err(Error::new(ErrorKind::Busy, story));
        }
        closed.iter().try_for_each(|closed| closed.drain(Instant::now() + MAINTENANCE_DRAIN))?;
        disks.iter().try_for_each(|disk| disk.chain.flush().run())?;
        // From here on they have to be opened again, whatever happens.
        let closed = disks.iter().try_for_each(|disk| disk.chain.close());
        disks.iter().for_each(|disk| disk.chain.detach());
        let worked = closed.and_then(|()| work(&self.store));
        let attach = |disk: &&Served| {
            let story = || format!("disk {} stays closed: restart the daemon", disk.chain.id());
            let layers = open_layers(&self.store, disk.chain.id(), disk.how, disk.chain.read_only());
            layers.and_then(|layers| disk.chain.attach(layers)).context(story)
        };
        disks.iter().map(attach).fold(Ok(()), Result::and).and(worked)
    }
}
