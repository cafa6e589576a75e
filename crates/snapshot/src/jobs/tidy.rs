//! What is done without anybody asking.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::plan;
use super::record::Task;
use super::world::World;
use crate::manifest::Manifest;
use crate::model::{Event, SnapshotDisk, SnapshotRecord};

/// After a failure a disk is left alone so long.
const GRUDGE: Duration = Duration::from_secs(60);

/// Which disks have lately refused to be tidied.
#[derive(Debug, Default)]
pub(crate) struct Tidiness(BTreeMap<String, Instant>);

/// A job to begin.
#[derive(Debug)]
pub(crate) struct Chore {
    pub(crate) disk: String,
    pub(crate) task: Task,
    /// What is told once it has begun.
    pub(crate) event: Option<Event>,
}

impl Chore {
    pub(crate) fn usual_id(&self) -> String {
        match &self.task {
            Task::Delete { snapshot } => format!("expire-{snapshot}"),
            _ => format!("merge-{}", self.disk),
        }
    }
}

impl Tidiness {
    pub(crate) fn failed(&mut self, disk: &str, now: Instant) {
        self.0.insert(disk.to_owned(), now + GRUDGE);
    }

    /// What is to be done now of the disks that are not busy.
    pub(crate) fn chores(&mut self, world: &World, busy: &BTreeSet<String>, now: Instant) -> Vec<Chore> {
        self.0.retain(|_, until| *until > now);
        let manifest = world.store.manifest().clone();
        if manifest.pending.is_some() {
            // Its overlays may be taken off again.
            return Vec::new();
        }
        let idle = |id: &&String| !busy.contains(*id) && !self.0.contains_key(*id);
        let writable = world.disks.iter().filter(|(_, disk)| !block::Disk::read_only(&*disk.chain));
        let (mut chores, mut expiring) = (Vec::new(), BTreeSet::new());
        for (id, disk) in writable.filter(|(id, _)| idle(id)) {
            let chore = match plan::tidy(&manifest, id) {
                Some(task) => Some(Chore { disk: id.clone(), task, event: None }),
                None => disk.max_overlays.and_then(|most| expiry(world, &manifest, id, most)),
            };
            // A snapshot of several disks expires once.
            let is_new = |chore: &Chore| match &chore.task {
                Task::Delete { snapshot } => expiring.insert(snapshot.clone()),
                _ => true,
            };
            chores.extend(chore.filter(is_new));
        }
        chores
    }
}

/// The oldest snapshot of a disk that has more overlays than it may. Not one that is being read: its layer would stay, and the
/// job wait for the reader, with the disk's other jobs behind it.
fn expiry(world: &World, manifest: &Manifest, id: &str, most: u32) -> Option<Chore> {
    let disk = manifest.disk(id).ok()?;
    let overlays = disk.layers.len() as u64 - 1;
    if overlays <= u64::from(most) {
        return None;
    }
    let is_free = |part: &SnapshotDisk| {
        let holder = disk.layers.iter().find(|layer| layer.path == part.path);
        part.id == id && holder.is_none_or(|layer| !manifest.is_pinned(id, layer.number))
    };
    let may_go = |snapshot: &&SnapshotRecord| {
        snapshot.disks.iter().any(is_free) && !world.readers.is_read(&snapshot.name)
    };
    let name = &manifest.snapshots.iter().find(may_go)?.name;
    let reason = format!("disk {id} has {overlays} overlays, and max-overlays is {most}");
    let event = Event::Expired { name: name.clone(), disk: id.to_owned(), reason };
    Some(Chore { disk: id.to_owned(), task: Task::Delete { snapshot: name.clone() }, event: Some(event) })
}
