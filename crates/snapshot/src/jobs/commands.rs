//! What clients ask of jobs.

use std::path::Path;

use block::{Error, ErrorKind, Result};

use super::machine::Verb;
use super::model::{BlockJobInfo, CommitRequest, DeleteRequest, JobInfo, StreamRequest};
use super::record::Task;
use crate::manager::Manager;
use crate::manifest::{LayerEntry, Manifest};

impl Manager {
    /// Begins to delete a snapshot, while the guest runs; the job's id. What the disks and other snapshots show does not
    /// change.
    ///
    /// Errors: [`ErrorKind::Busy`] while somebody reads it. Who begins to later makes the job wait at its end.
    pub fn delete(&self, request: DeleteRequest) -> Result<String> {
        self.show(&request.name)?;
        // Not begun, to wait for somebody who may read as long as he likes.
        self.readers.check_unread(&request.name)?;
        let usual = format!("delete-{}", request.name);
        self.jobs.begin(Task::Delete { snapshot: request.name }, request.options, &usual, false)
    }

    /// Begins to merge layers of a disk down into the one beneath them; the job's id.
    pub fn commit(&self, request: CommitRequest) -> Result<String> {
        let usual = request.device.clone();
        let task = {
            let manifest = self.store.manifest();
            let missing =
                || Error::new(ErrorKind::NotFound, format!("Device '{}' not found", request.device));
            let (disk, _) = named(&manifest, &request.device).ok_or_else(missing)?;
            let layers = self.layers_of(&manifest, &disk)?;
            let top = layer(&disk, layers, request.top.as_deref(), request.top_node.as_deref())?;
            let base = layer(&disk, layers, request.base.as_deref(), request.base_node.as_deref())?;
            let active = layers.last();
            let by_hand = !request.auto_complete && (top.is_none() || top == active);
            let top = top.or(active).map(|top| top.number);
            let base = base.or(layers.first()).map(|base| base.number);
            let (base, top) = base.zip(top).ok_or_else(|| no_layer(&disk, ""))?;
            Task::Commit { disk, base, top, by_hand }
        };
        self.jobs.begin(task, request.options, &usual, false)
    }

    /// Begins to pull layers of a disk up into the one above them; the job's id.
    pub fn stream(&self, request: StreamRequest) -> Result<String> {
        let usual = request.device.clone();
        let task = {
            let manifest = self.store.manifest();
            let name = &request.device;
            let missing = || format!("Cannot find device='{name}' nor node-name='{name}'");
            let (disk, top) =
                named(&manifest, name).ok_or_else(|| Error::new(ErrorKind::NotFound, missing()))?;
            let layers = self.layers_of(&manifest, &disk)?;
            let base = layer(&disk, layers, request.base.as_deref(), request.base_node.as_deref())?;
            let top =
                top.or_else(|| layers.last().map(|top| top.number)).ok_or_else(|| no_layer(&disk, ""))?;
            Task::Stream { base: base.map(|base| base.number), disk, top }
        };
        self.jobs.begin(task, request.options, &usual, false)
    }

    /// The layers of a disk up to the active one: not the overlay of a cut that is held, for that may be taken off again.
    fn layers_of<'a>(&self, manifest: &'a Manifest, disk: &str) -> Result<&'a [LayerEntry]> {
        let layers = &manifest.disk(disk)?.layers[..];
        let active = self.disks.get(disk).and_then(|served| served.chain.top()).map(|top| top.entry.number);
        let end = layers.iter().position(|layer| Some(layer.number) == active);
        Ok(end.and_then(|end| layers.get(..=end)).unwrap_or(layers))
    }

    /// The jobs, the oldest first.
    pub fn jobs(&self) -> Vec<JobInfo> {
        self.jobs.list()
    }

    /// Those that clients began.
    pub fn block_jobs(&self) -> Vec<BlockJobInfo> {
        self.jobs.block_jobs()
    }

    /// Asks something of a job. What may be asked depends on its status.
    pub fn ask_job(&self, id: &str, verb: Verb) -> Result<()> {
        self.jobs.ask(id, verb)
    }

    /// Limits how many bytes a second a job copies; 0 for no limit.
    pub fn set_job_speed(&self, id: &str, speed: u64) -> Result<()> {
        self.jobs.set_speed(id, speed)
    }
}

/// The disk that a device's name means, and the layer, if it is a node's.
pub(crate) fn named(manifest: &Manifest, name: &str) -> Option<(String, Option<u32>)> {
    if manifest.disks.contains_key(name) {
        return Some((name.to_owned(), None));
    }
    let (disk, _) = name.rsplit_once('.')?;
    let number = node(disk, &manifest.disk(disk).ok()?.layers, name)?.number;
    Some((disk.to_owned(), Some(number)))
}

/// The layer of that node name.
fn node<'a>(disk: &str, layers: &'a [LayerEntry], name: &str) -> Option<&'a LayerEntry> {
    let number: u32 = name.strip_prefix(disk)?.strip_prefix('.')?.parse().ok()?;
    layers.iter().find(|layer| layer.number == number)
}

/// A layer by its file or its node, if either is given.
fn layer<'a>(
    disk: &str,
    layers: &'a [LayerEntry],
    file: Option<&str>,
    name: Option<&str>,
) -> Result<Option<&'a LayerEntry>> {
    match (file, name) {
        (Some(_), Some(_)) => Err(Error::new(
            ErrorKind::InvalidInput,
            "a layer is named by its file or by its node, not by both",
        )),
        (Some(file), None) => {
            let found = layers.iter().find(|layer| layer.path == Path::new(file));
            found.map(Some).ok_or_else(|| no_layer(disk, file))
        }
        (None, Some(name)) => node(disk, layers, name).map(Some).ok_or_else(|| no_layer(disk, name)),
        (None, None) => Ok(None),
    }
}

fn no_layer(disk: &str, name: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("disk {disk} has no layer '{name}'"))
}
