//! The layers of the disks of one cut: the chain's side of the cut's ports.

use std::path::PathBuf;
use std::sync::Arc;

use block::Result;
use hostio::Cache;
use tracing::warn;

use crate::chain::Chain;
use crate::cut::{Layers, PivotedLayers, PreparedLayers};
use crate::layer::Layer;
use crate::model::{SnapshotDisk, SnapshotRecord};
use crate::store::Store;

/// A disk that is served, and how its images are opened.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) chain: Arc<Chain>,
    pub(crate) cache: Cache,
}

/// The disks of a cut, before it.
pub(crate) struct Group {
    pub(crate) store: Arc<Store>,
    pub(crate) name: String,
    pub(crate) disks: Vec<Served>,
}

/// One disk with its overlay: not in use yet.
struct Prepared {
    chain: Arc<Chain>,
    overlay: Arc<Layer>,
}

struct PreparedGroup {
    store: Arc<Store>,
    disks: Vec<Prepared>,
}

struct PivotedGroup {
    store: Arc<Store>,
    /// Each disk with the layer that holds its frozen state.
    disks: Vec<(Arc<Chain>, Arc<Layer>)>,
}

impl Layers for Group {
    fn prepare(self: Box<Self>) -> Result<Box<dyn PreparedLayers>> {
        let mut prepared = PreparedGroup { store: Arc::clone(&self.store), disks: Vec::new() };
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
    fn create(&self, prepared: &mut Vec<Prepared>) -> Result<()> {
        for Served { chain, cache } in &self.disks {
            let (base, top) = {
                let layers = chain.layers();
                let Some((base, top)) = layers.first().zip(layers.last()) else { continue };
                (Arc::clone(base), Arc::clone(top))
            };
            let overlay = self.store.create_overlay(chain.id(), &base, &top, *cache)?;
            prepared.push(Prepared { chain: Arc::clone(chain), overlay });
        }
        self.store.update(|manifest| {
            for disk in &*prepared {
                manifest.push_layer(disk.chain.id(), &disk.overlay.entry);
            }
            manifest.pending = Some(self.name.clone());
            Ok(())
        })
    }
}

impl PreparedGroup {
    fn remove_overlays(&self) {
        for disk in &self.disks {
            if let Err(error) = self.store.remove_layer(disk.chain.id(), &disk.overlay.entry) {
                warn!(%error, "an unused overlay is left behind");
            }
        }
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
        let Self { store, disks } = *self;
        let disks = disks
            .into_iter()
            .filter_map(|disk| {
                let frozen = disk.chain.pivot(disk.overlay)?;
                Some((disk.chain, frozen))
            })
            .collect();
        Box::new(PivotedGroup { store, disks })
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
        self.store.update(|manifest| {
            manifest.pending = None;
            match manifest.snapshots.iter_mut().find(|snapshot| snapshot.name == record.name) {
                Some(known) => known.clone_from(record),
                None => manifest.snapshots.push(record.clone()),
            }
            Ok(())
        })
    }

    fn seal(&mut self) -> Result<()> {
        for (chain, layer) in &self.disks {
            layer.flush()?;
            chain.sealed();
            self.store.layer_sealed(chain.id(), layer)?;
        }
        Ok(())
    }
}
