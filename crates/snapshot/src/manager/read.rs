//! Reading snapshots: what there are, probes and exports.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Disk, Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use super::Manager;
use crate::export::{self, Progress};
use crate::layer::Opening;
use crate::model::{ImageFormat, SnapshotDisk, SnapshotRecord};
use crate::probe::{self, FsVerdict};

/// What the probe finds on one disk of a snapshot.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskProbe {
    /// The disk's id.
    pub id: String,
    /// One entry for each partition, or one for the bare disk.
    pub volumes: Vec<FsVerdict>,
}

impl Manager {
    /// All snapshots, the oldest first.
    pub fn list(&self) -> Vec<SnapshotRecord> {
        self.store.manifest().snapshots.clone()
    }

    /// One snapshot.
    pub fn show(&self, name: &str) -> Result<SnapshotRecord> {
        self.store.manifest().snapshot(name).cloned()
    }

    /// Reads the file systems' super-blocks in a snapshot.
    pub fn probe(&self, name: &str) -> Result<Vec<DiskProbe>> {
        let _reading = self.readers.enter(name)?;
        let disks = self.show(name)?.disks;
        let probe = |disk: SnapshotDisk| {
            let volumes = probe::probe(&*self.snapshot_disk(name, &disk.id)?)?;
            Ok(DiskProbe { id: disk.id, volumes })
        };
        disks.into_iter().map(probe).collect()
    }

    /// Writes one disk of a snapshot to the new file `out`. Called off, and nothing is left, when `progress` says so and
    /// when the daemon ends.
    pub fn export(
        &self,
        name: &str,
        disk: &str,
        out: &Path,
        format: ImageFormat,
        progress: Progress<'_>,
    ) -> Result<()> {
        let _reading = self.readers.enter(name)?;
        let mut go_on = |done, total| match self.ending.load(Ordering::Acquire) {
            true => ControlFlow::Break(()),
            false => progress(done, total),
        };
        export::export(&*self.snapshot_disk(name, disk)?, out, format, &mut go_on)
    }

    fn snapshot_disk(&self, name: &str, id: &str) -> Result<Arc<dyn Disk>> {
        // By its path: a job may be about to take layers out of the chain, and then this one's content is in another one.
        let held = {
            let manifest = self.store.manifest();
            let index = manifest.intact(name).and_then(|_| manifest.layer_of(name, id))?;
            let layers = &manifest.disk(id)?.layers;
            layers.get(index).map(|layer| (index, layer.number))
        };
        let maintained = || Error::new(ErrorKind::Busy, format!("disk {id} is being maintained"));
        let (index, number) = held.ok_or_else(maintained)?;
        let layer = match self.disks.get(id) {
            Some(disk) => disk.chain.layers().iter().find(|layer| layer.entry.number == number).cloned(),
            None => self.store.open_layers(id, index + 1, Opening::OFFLINE, None)?.pop(),
        };
        Ok(Arc::new(layer.ok_or_else(maintained)?.view()))
    }
}
