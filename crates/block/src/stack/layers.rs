//! A list of layers that shares its beginning with others.
//!
//! Each layer of a chain has the list of those beneath it. As copies, these lists would take memory that grows with the
//! square of the chain's length.

use std::sync::Arc;

use crate::{Layer, Storage};

/// Layers that are shared at once. A list has one block of its own, half full on average.
const BLOCK: usize = 32;

/// Layers, the base first.
#[derive(Clone, Default)]
pub(super) struct Layers(Box<[Arc<Block>]>);

/// All but the last one of a list are full.
#[derive(Clone, Default)]
struct Block {
    layers: Vec<Arc<dyn Layer>>,
    /// Where the data of each is: with it at hand, a hit touches nothing of the layer itself, which in a long chain would
    /// be cold memory.
    data: Vec<Arc<dyn Storage>>,
}

impl Layers {
    /// The same with one more on top.
    pub(super) fn with(&self, top: Arc<dyn Layer>) -> Self {
        let (mut last, full) = match self.0.split_last() {
            Some((last, full)) if last.layers.len() < BLOCK => (Block::clone(last), full),
            _ => (Block::default(), &*self.0),
        };
        last.data.push(top.data());
        last.layers.push(top);
        Self(full.iter().cloned().chain([Arc::new(last)]).collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.split_last().map_or(0, |(last, full)| full.len() * BLOCK + last.layers.len())
    }

    pub(super) fn get(&self, index: usize) -> Option<&Arc<dyn Layer>> {
        self.0.get(index / BLOCK)?.layers.get(index % BLOCK)
    }

    /// Where the data of a layer is.
    pub(super) fn data(&self, index: usize) -> Option<&Arc<dyn Storage>> {
        self.0.get(index / BLOCK)?.data.get(index % BLOCK)
    }

    pub(super) fn top(&self) -> Option<&Arc<dyn Layer>> {
        self.0.last()?.layers.last()
    }

    /// Those from this index on, and their indices.
    pub(super) fn from(&self, first: usize) -> impl DoubleEndedIterator<Item = (usize, &Arc<dyn Layer>)> {
        (first..self.len()).filter_map(|index| self.get(index).map(|layer| (index, layer)))
    }
}

impl FromIterator<Arc<dyn Layer>> for Layers {
    fn from_iter<I: IntoIterator<Item = Arc<dyn Layer>>>(layers: I) -> Self {
        let mut blocks: Vec<Block> = Vec::new();
        for layer in layers {
            if blocks.last().is_none_or(|last| last.layers.len() == BLOCK) {
                blocks.push(Block::default());
            }
            if let Some(last) = blocks.last_mut() {
                last.data.push(layer.data());
                last.layers.push(layer);
            }
        }
        Self(blocks.into_iter().map(Arc::new).collect())
    }
}

impl Drop for Layers {
    /// From the top down: a layer may hold a stack of those beneath it, and so on. Dropped after the layer above it and
    /// before those beneath, it is never the last to hold them, so the drops do not nest.
    fn drop(&mut self) {
        let mut blocks = std::mem::take(&mut self.0).into_vec();
        while blocks.pop().is_some() {}
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        while self.layers.pop().is_some() {}
    }
}
