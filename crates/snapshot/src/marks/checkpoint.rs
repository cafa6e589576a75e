//! Checkpoints: made, listed, deleted; and what changed since.

use block::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use super::changes::{Changes, Look, Point};
use super::draft::Draft;
use super::entry::{CheckpointDisk, CheckpointRecord};
use super::{CutRequest, MarkChange};
use crate::manager::Manager;
use crate::manifest::Manifest;
use crate::model::FreezePolicy;
use crate::request;

/// Checkpoints that a state directory may have: the manifest, which has them, is rewritten with each change.
const MAX_CHECKPOINTS: usize = 1024;

/// What to make a checkpoint of.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CheckpointRequest {
    /// The checkpoint's name: as a snapshot's.
    pub name: String,
    /// The disks, all at one instant; all of the daemon's disks, or of the snapshot, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
    /// What to do about the guest agent; it is not asked if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FreezePolicy>,
    /// The instant of this snapshot, instead of now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
}

impl Manager {
    /// Makes a checkpoint, of now or of a snapshot's instant. It is on stable storage when this returns.
    pub fn checkpoint_create(&self, request: CheckpointRequest) -> Result<CheckpointRecord> {
        let name = request.name.clone();
        match request.snapshot {
            Some(snapshot) => self.adopt(&name, request.disks.as_deref(), &snapshot)?,
            None => {
                let freeze = Some(request.freeze.unwrap_or(FreezePolicy::Never));
                let cut = CutRequest { snapshot: None, disks: request.disks, freeze };
                self.cut_with(cut, &[MarkChange::Checkpoint { name: name.clone() }])?;
            }
        }
        self.store.manifest().checkpoint(&name).cloned()
    }

    /// Makes a checkpoint of a snapshot's instant.
    fn adopt(&self, name: &str, disks: Option<&[String]>, snapshot: &str) -> Result<()> {
        let mut draft = Draft::new(&self.store);
        check_new(&draft.manifest, name)?;
        let held = draft.manifest.asked(snapshot)?.clone();
        if !held.sealed {
            let story = format!("snapshot '{snapshot}' is not on stable storage yet: try again");
            return Err(Error::new(ErrorKind::Busy, story));
        }
        let all: Vec<_> = held.disks.iter().map(|disk| disk.id.clone()).collect();
        let part = |id: &String| {
            let look = Look::new(&self.store, &draft.manifest, &self.disks, id)?;
            let instant = look.instant(&Point::Snapshot(snapshot.to_owned()))?;
            Ok(CheckpointDisk { id: id.clone(), boundary: instant.boundary, capacity: instant.capacity })
        };
        let disks = disks.unwrap_or(&all).iter().map(part).collect::<Result<Vec<_>>>()?;
        let record = CheckpointRecord {
            name: name.to_owned(),
            time: held.time,
            grade: held.grade,
            reason: held.reason,
            disks,
        };
        draft.manifest.checkpoints.push(record);
        draft.commit(|_| Ok(()))
    }

    /// Deletes a checkpoint. What changed between others stays known.
    pub fn checkpoint_delete(&self, name: &str) -> Result<()> {
        let mut draft = Draft::new(&self.store);
        draft.manifest.checkpoint(name)?;
        draft.manifest.checkpoints.retain(|checkpoint| checkpoint.name != name);
        draft.commit(|_| Ok(()))
    }

    /// The instant of that name: a checkpoint's or, if there is none, a snapshot's.
    pub fn point(&self, name: &str) -> Result<Point> {
        let manifest = self.store.manifest();
        if manifest.checkpoint(name).is_ok() {
            return Ok(Point::Checkpoint(name.to_owned()));
        }
        match manifest.snapshot(name) {
            Ok(_) => Ok(Point::Snapshot(name.to_owned())),
            Err(_) => {
                let story = format!("there is neither a checkpoint nor a snapshot '{name}'");
                Err(Error::new(ErrorKind::NotFound, story))
            }
        }
    }

    /// All checkpoints, in the order in which they were made.
    pub fn checkpoints(&self) -> Vec<CheckpointRecord> {
        self.store.manifest().checkpoints.clone()
    }

    /// Where a disk differs between two instants, or may. Never too little: whatever is not among the changes is the same.
    /// Which of the two is the earlier does not matter, but the answer is as long as the disk is at `to`, and what it had
    /// grown by since `from` is among it.
    ///
    /// `granularity` is in bytes, a power of two, 512 at least; all is rounded outward to it, and to what is kept: 4 KiB for
    /// disks up to 512 GiB.
    ///
    /// Errors: [`ErrorKind::Corrupt`] if that is lost, and a full backup is needed.
    pub fn changes(&self, disk: &str, from: &Point, to: &Point, granularity: Option<u64>) -> Result<Changes> {
        let draft = Draft::new(&self.store);
        Look::new(&self.store, &draft.manifest, &self.disks, disk)?.changes(from, to, granularity)
    }
}

pub(super) fn check_new(manifest: &Manifest, name: &str) -> Result<()> {
    request::check_name(name)?;
    let refuse = |story: String| Err(Error::new(ErrorKind::Busy, story));
    if manifest.checkpoint(name).is_ok() {
        return refuse(format!("there is a checkpoint '{name}' already: choose another name"));
    }
    if manifest.checkpoints.len() >= MAX_CHECKPOINTS {
        return refuse(format!("there are {MAX_CHECKPOINTS} checkpoints: delete some"));
    }
    Ok(())
}
