//! What is done without anybody asking.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::plan;
use super::record::Task;
use super::world::World;
use crate::manifest::Manifest;
use crate::model::Event;

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
                None => disk.max_overlays.and_then(|most| expiry(&manifest, id, most)),
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

/// The oldest snapshot of a disk that has more overlays than it may.
fn expiry(manifest: &Manifest, disk: &str, most: u32) -> Option<Chore> {
    let overlays = manifest.disk(disk).ok()?.layers.len() as u64 - 1;
    if overlays <= u64::from(most) {
        return None;
    }
    let held =
        manifest.snapshots.iter().find(|snapshot| snapshot.disks.iter().any(|part| part.id == disk))?;
    let reason = format!("disk {disk} has {overlays} overlays, and max-overlays is {most}");
    let event = Event::Expired { name: held.name.clone(), disk: disk.to_owned(), reason };
    let task = Task::Delete { snapshot: held.name.clone() };
    Some(Chore { disk: disk.to_owned(), task, event: Some(event) })
}
