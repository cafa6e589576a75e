//! A change of marks: made on a copy of the manifest, with the bits files that it needs, and then committed in one piece.

use std::cell::Cell;
use std::sync::{Arc, MutexGuard};

use block::{DirtyBitmap, Error, ErrorKind, Result};
use tracing::warn;

use super::bits;
use super::history::Piece;
use crate::layer::Layer;
use crate::manifest::Manifest;
use crate::store::Store;

/// Marks that are about to change. Dropped without a commit, nothing has.
///
/// Nobody else changes marks meanwhile, but everything else in the manifest may change: only marks are taken over. Who holds
/// this must not wait for the right to change chains; one who has that right may make a draft.
pub(crate) struct Draft<'a> {
    store: &'a Store,
    /// The manifest as it will be.
    pub(crate) manifest: Manifest,
    /// Files may have to be removed.
    is_touched: Cell<bool>,
    _turn: MutexGuard<'a, ()>,
}

impl<'a> Draft<'a> {
    pub(crate) fn new(store: &'a Store) -> Self {
        let turn = store.bits().turn();
        Self { store, manifest: store.manifest().clone(), is_touched: Cell::new(false), _turn: turn }
    }

    /// Where the files are.
    pub(crate) fn store(&self) -> &'a Store {
        self.store
    }

    /// Writes a bits file for an entry of the draft.
    pub(super) fn create(&self, bits: &DirtyBitmap) -> Result<u64> {
        self.is_touched.set(true);
        self.store.bits().create(bits)
    }

    /// Folds what `layers`, neighbours in a disk's chain that are written no more, hold, as far as that is needed before a
    /// job makes them one. Takes as long as to read their tables; `pause` is called now and then, and its error ends it.
    pub(crate) fn fold_merge<E: From<Error>>(
        &mut self,
        id: &str,
        layers: &[Arc<Layer>],
        pause: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let (numbers, points) = (numbers(layers), self.manifest.points(id));
        let disk = self.manifest.disk(id)?;
        let pieces = disk.marks.history.pieces_of_merge(&numbers, &disk.numbers(), &points);
        self.fold(id, &pieces, layers, pause)
    }

    /// The same before they leave the chain, for the disk goes back to what it was at the boundary `to`; `at` is the number
    /// of the layer that is put there instead of them.
    pub(crate) fn fold_revert(
        &mut self,
        id: &str,
        layers: impl FnOnce() -> Result<Vec<Arc<Layer>>>,
        gone: &[u32],
        (to, at): (u32, u32),
    ) -> Result<()> {
        let points = self.manifest.points(id);
        let Some(disk) = self.manifest.disks.get_mut(id) else { return Ok(()) };
        disk.marks.history.revert(to, at);
        let pieces = disk.marks.history.pieces(gone, &disk.numbers(), &points);
        match pieces.is_empty() {
            true => Ok(()),
            false => self.fold(id, &pieces, &layers()?, &mut || Ok(())),
        }
    }

    fn fold<E: From<Error>>(
        &mut self,
        id: &str,
        pieces: &[Piece],
        layers: &[Arc<Layer>],
        pause: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        for piece in pieces {
            let bits = match self.gather(piece, layers, pause)? {
                Some(bits) => Some(self.create(&bits)?),
                None => None,
            };
            if let Some(disk) = self.manifest.disks.get_mut(id) {
                disk.marks.history.fold(piece, bits);
            }
        }
        Ok(())
    }

    /// What has changed in a piece; `None` if a part of that is lost.
    fn gather<E: From<Error>>(
        &self,
        piece: &Piece,
        layers: &[Arc<Layer>],
        pause: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<DirtyBitmap>, E> {
        let joins = piece.joins.iter().map(|folded| self.load(folded.bits));
        let Some(joins) = joins.collect::<Result<Option<Vec<_>>>>()? else { return Ok(None) };
        let held = piece.layers.iter().map(|number| {
            let found = layers.iter().find(|layer| layer.entry.number == *number);
            found.ok_or_else(|| Error::new(ErrorKind::NotFound, "a layer to be merged is not there"))
        });
        let held = held.collect::<Result<Vec<_>>>()?;
        let sizes = joins.iter().map(DirtyBitmap::capacity);
        let capacity = sizes.chain(held.iter().map(|layer| layer.disk().capacity())).max().unwrap_or(0);
        let bits = DirtyBitmap::new(capacity, bits::granularity_of(capacity))?;
        joins.iter().for_each(|join| bits::add(&bits, join));
        for layer in held {
            bits::add_layer(&bits, &**layer as &dyn block::Layer, pause)?;
        }
        Ok(Some(bits))
    }

    /// The bits of a file; `None` if they are lost.
    fn load(&self, file: Option<u64>) -> Result<Option<DirtyBitmap>> {
        let Some(file) = file else { return Ok(None) };
        match self.store.bits().load(file) {
            Ok(bits) => Ok(Some(bits)),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                warn!(%error, "changes since a checkpoint or of a bitmap are lost: it needs a full backup");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes it so, together with what `besides` changes in the manifest: in one piece, on stable storage when this
    /// returns. On an error nothing has changed.
    pub(crate) fn commit(self, besides: impl FnOnce(&mut Manifest) -> Result<()>) -> Result<()> {
        self.is_touched.set(true);
        self.store.update(|manifest| {
            manifest.adopt_marks(&self.manifest);
            besides(manifest)?;
            manifest.prune_marks();
            Ok(())
        })
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if self.is_touched.get() {
            self.store.bits().keep(&self.store.manifest().bits_files());
        }
    }
}

pub(super) fn numbers(layers: &[Arc<Layer>]) -> Vec<u32> {
    layers.iter().map(|layer| layer.entry.number).collect()
}
