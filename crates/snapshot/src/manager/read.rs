//! Reading snapshots: what there are, probes and exports.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Disk, Error, ErrorKind, Layer, Result, Stack};
use serde::{Deserialize, Serialize};

use super::Manager;
use crate::export::{self, Progress};
use crate::group::Served;
use crate::jobs::Reading;
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

/// One disk of a snapshot, to read. As long as this lives the snapshot is not deleted.
#[derive(Debug)]
pub struct SnapshotReader {
    disk: Arc<Stack>,
    _reading: Reading,
}

impl SnapshotReader {
    /// Its content.
    pub fn disk(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.disk) as _
    }

    /// The layers that it is made of, the base first.
    pub fn layers(&self) -> Vec<Arc<dyn Layer>> {
        self.disk.layers()
    }
}

impl Manager {
    /// Opens one disk of a snapshot to read. Who would delete it is told that it is being read by `who`.
    pub fn reader(&self, name: &str, disk: &str, who: &str) -> Result<SnapshotReader> {
        let reading = self.readers.enter(name, who)?;
        Ok(SnapshotReader { disk: self.snapshot_disk(name, disk)?, _reading: reading })
    }

    /// Whether the daemon ends: what serves clients shall let go.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// The state directory.
    pub fn folder(&self) -> &Path {
        self.store.folder()
    }

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
        let _reading = self.readers.enter(name, "a probe")?;
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
        let _reading = self.readers.enter(name, &format!("an export to {}", out.display()))?;
        let mut go_on = |done, total| match self.is_ending() {
            true => ControlFlow::Break(()),
            false => progress(done, total),
        };
        export::export(self.snapshot_disk(name, disk)?, out, format, &mut go_on)
    }

    fn snapshot_disk(&self, name: &str, id: &str) -> Result<Arc<Stack>> {
        // By its path: a job may be about to take layers out of the chain, and then this one's content is in another one.
        let held = {
            let manifest = self.store.manifest();
            let index = manifest.intact(name).and_then(|_| manifest.layer_of(name, id))?;
            let layers = &manifest.disk(id)?.layers;
            layers.get(index).map(|layer| (index, layer.number))
        };
        let maintained = || Error::new(ErrorKind::Busy, format!("disk {id} is being maintained"));
        let (index, number) = held.ok_or_else(maintained)?;
        match self.disks.get(id) {
            Some(Served { chain, how, .. }) => {
                let layer = chain.layers().iter().find(|layer| layer.entry.number == number).cloned();
                Ok(chain.view(&layer.ok_or_else(maintained)?, *how))
            }
            None => {
                let how = Opening::OFFLINE;
                let layer = self.store.open_layers(id, index + 1, how, None)?.pop();
                Ok(Arc::new(layer.ok_or_else(maintained)?.view(how.view_bytes())))
            }
        }
    }
}
