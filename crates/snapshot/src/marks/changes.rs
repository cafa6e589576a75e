//! What changed between two instants of a disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use block::{ByteRange, DirtyBitmap, Disk as _, Error, ErrorKind, Result};

use super::bits;
use super::draft::numbers;
use super::entry::Instant;
use super::history::{Boundary, NOW};
use crate::group::Served;
use crate::layer::{Layer, Opening};
use crate::manifest::Manifest;
use crate::store::Store;

/// An instant of a disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Point {
    /// A checkpoint, by its name.
    Checkpoint(String),
    /// A snapshot, by its name.
    Snapshot(String),
    /// The boundary that a [`Pin`](crate::Pin) reads at.
    Boundary(u32),
    /// The disk as it is. While the guest writes that moves on: what is written while changes are collected may be among
    /// them or not.
    Now,
}

/// Where a disk differs between two instants, or may: what was written between them, rounded outward.
#[derive(Debug)]
pub struct Changes(DirtyBitmap);

impl Changes {
    /// Bytes that the disk has at the later instant.
    pub fn capacity(&self) -> u64 {
        self.0.capacity()
    }

    /// Bytes to which all is rounded.
    pub fn granularity(&self) -> u64 {
        1 << self.0.granularity_bits()
    }

    /// The ranges, in order. None touches the next.
    pub fn ranges(&self) -> impl Iterator<Item = ByteRange> {
        bits::ranges(&self.0)
    }

    /// The ranges that begin in `range`, cut to it.
    pub fn within(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> {
        let mut at = range.offset;
        std::iter::from_fn(move || {
            let found = self.0.next_dirty(ByteRange { offset: at, len: range.end().saturating_sub(at) })?;
            at = found.end();
            Some(found)
        })
    }

    /// The same as a bitmap.
    pub fn into_bitmap(self) -> DirtyBitmap {
        self.0
    }
}

impl From<DirtyBitmap> for Changes {
    fn from(bits: DirtyBitmap) -> Self {
        Self(bits)
    }
}

/// Bits files, of which a `None` is lost, and layers, the lowest first.
pub(super) type Telling = (Vec<Option<u64>>, Vec<Arc<Layer>>);

/// One disk's layers and marks, at one time.
pub(super) struct Look<'a> {
    pub(super) store: &'a Store,
    pub(super) manifest: &'a Manifest,
    pub(super) id: &'a str,
    /// The base first, the active layer last; one at least.
    layers: Vec<Arc<Layer>>,
    capacity: u64,
}

impl<'a> Look<'a> {
    /// The caller has a draft, so that no job begins to move what is looked at.
    pub(super) fn new(
        store: &'a Store,
        manifest: &'a Manifest,
        served: &BTreeMap<String, Served>,
        id: &'a str,
    ) -> Result<Self> {
        let entries = &manifest.disk(id)?.layers;
        let (layers, capacity) = match served.get(id) {
            Some(disk) => (disk.chain.layers().clone(), disk.chain.capacity()),
            None => {
                let layers = store.open_layers(id, entries.len(), Opening::OFFLINE, None)?;
                let capacity = layers.last().map_or(0, |top| top.disk().capacity());
                (layers, capacity)
            }
        };
        match layers.is_empty() {
            true => Err(Error::new(ErrorKind::Busy, format!("disk {id} is being maintained"))),
            false => Ok(Self { store, manifest, id, layers, capacity }),
        }
    }

    /// Where a point is, and how large the disk was.
    pub(super) fn instant(&self, point: &Point) -> Result<Instant> {
        let not_part = |what: String| {
            Error::new(ErrorKind::NotFound, format!("disk '{}' is not part of {what}", self.id))
        };
        match point {
            Point::Now => Ok(self.now()),
            Point::Boundary(boundary) => Ok(self.at(*boundary)),
            Point::Checkpoint(name) => {
                let parts = &self.manifest.checkpoint(name)?.disks;
                let part = parts.iter().find(|part| part.id == self.id);
                let part = part.ok_or_else(|| not_part(format!("checkpoint '{name}'")))?;
                Ok(Instant { boundary: part.boundary, capacity: part.capacity })
            }
            Point::Snapshot(name) => {
                self.manifest.asked(name)?;
                let index = self.manifest.layer_of(name, self.id)?;
                let held = self.manifest.disk(self.id)?.layers.get(index);
                let held = held.ok_or_else(|| not_part(format!("snapshot '{name}'")))?;
                Ok(self.at(held.boundary()))
            }
        }
    }

    fn at(&self, boundary: Boundary) -> Instant {
        let held = self.layers.iter().rfind(|layer| layer.entry.number < boundary);
        let capacity = held.map_or(self.capacity, |layer| layer.disk().capacity());
        Instant { boundary, capacity }
    }

    /// Marks what changed between two instants. What is past the end of the disk at the earlier one counts as changed.
    ///
    /// Errors: [`ErrorKind::Corrupt`] if that is not known any more.
    pub(super) fn add_changes(&self, into: &DirtyBitmap, from: Instant, to: Boundary) -> Result<()> {
        let (files, layers) = self.cover(from, to)?;
        for file in files {
            bits::add(into, &self.store.bits().load(file.ok_or_else(lost)?)?);
        }
        for layer in layers {
            bits::add_layer::<Error>(into, &*layer as &dyn block::Layer, &mut || Ok(()))?;
        }
        into.mark(ByteRange { offset: from.capacity, len: into.capacity().saturating_sub(from.capacity) });
        Ok(())
    }

    /// What tells what changed between two instants.
    pub(super) fn cover(&self, from: Instant, to: Boundary) -> Result<Telling> {
        let history = &self.manifest.disk(self.id)?.marks.history;
        let cover = history.between(&numbers(&self.layers), from.boundary, to);
        let is_part = |layer: &&Arc<Layer>| cover.layers.contains(&layer.entry.number);
        Ok((cover.bits, self.layers.iter().filter(is_part).cloned().collect()))
    }

    /// All of that as an answer. `granularity` is in bytes; the finest there is if `None`.
    pub(super) fn changes(&self, from: &Point, to: &Point, granularity: Option<u64>) -> Result<Changes> {
        let (from, to) = (self.instant(from)?, self.instant(to)?);
        let finest = bits::granularity_of(to.capacity);
        let granularity = granularity.map(granularity_bits).transpose()?.unwrap_or(finest);
        let found = DirtyBitmap::new(to.capacity, granularity)?;
        self.add_changes(&found, from, to.boundary).map_err(|error| match error.kind() {
            ErrorKind::Corrupt => {
                let story =
                    format!("what changed on disk {} since then is not known: take a full backup", self.id);
                error.context(story)
            }
            _ => error,
        })?;
        Ok(Changes(found))
    }

    pub(super) fn now(&self) -> Instant {
        Instant { boundary: NOW, capacity: self.capacity }
    }

    /// The number of the active layer.
    pub(super) fn active(&self) -> Option<u32> {
        self.layers.last().map(|layer| layer.entry.number)
    }

    /// The newest layer, with all that is beneath it.
    pub(super) fn top(&self) -> Option<&Arc<Layer>> {
        self.layers.last()
    }

    /// The layer beneath the active one, and the boundary above it: the instant of the last cut.
    pub(super) fn last_cut(&self) -> Result<(&Arc<Layer>, Instant)> {
        let missing = || Error::new(ErrorKind::Busy, format!("disk {} has no layer beneath", self.id));
        let held = self.layers.iter().rev().nth(1).ok_or_else(missing)?;
        let entries = &self.manifest.disk(self.id)?.layers;
        let entry = entries.iter().find(|entry| entry.number == held.entry.number).ok_or_else(missing)?;
        Ok((held, Instant { boundary: entry.boundary(), capacity: self.capacity }))
    }
}

pub(super) fn lost() -> Error {
    Error::new(ErrorKind::Corrupt, "a part of the changes is lost")
}

/// Log2 of a granularity that a client gave.
pub(super) fn granularity_bits(granularity: u64) -> Result<u32> {
    match granularity.is_power_of_two() && granularity >= 512 {
        true => Ok(granularity.trailing_zeros()),
        // In QEMU's words (`block/monitor/bitmap-qmp-cmds.c`).
        false => Err(Error::new(ErrorKind::InvalidInput, "Granularity must be power of 2 and at least 512")),
    }
}
