//! How much is dirty in bitmaps, for those who list them often.
//!
//! What a frozen layer holds does not change. So of each bitmap the union of all but the active layer is kept, and to count
//! again takes a walk over the active layer's tables only. Layers are walked while marks may be changed by others; what is
//! counted is dirty at some instant of the question.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{ByteRange, DirtyBitmap, Error, Layer as _, Result};

use super::bitmap::BitmapName;
use super::bits;
use super::changes::{Look, granularity_bits, lost};
use super::entry::BitmapEntry;
use crate::layer::Layer;

/// Bytes that all unions may take together; what does not fit is made anew each time.
const MAX_BYTES: u64 = 32 << 20;

/// The unions that are kept.
#[derive(Debug, Default)]
pub(crate) struct Tallies(Mutex<BTreeMap<BitmapName, Union>>);

/// What all but the active layer tell of a bitmap.
#[derive(Clone, Debug)]
struct Union {
    of: Parts,
    dirty: Arc<DirtyBitmap>,
}

/// What a bitmap is told from. Bits files are written once, and numbers of layers are never used again.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Parts {
    capacity: u64,
    granularity_bits: u32,
    /// The disk's size at the bitmap's instant: what is past it is dirty.
    capacity_before: u64,
    files: Vec<u64>,
    /// The lowest first.
    frozen: Vec<u32>,
    active: Option<u32>,
}

/// A bitmap that is about to be counted.
pub(super) struct Tally {
    name: BitmapName,
    of: Parts,
    union: Arc<DirtyBitmap>,
    /// Layers that are to be in the union and are not yet.
    missing: Vec<Arc<Layer>>,
    active: Option<Arc<Layer>>,
}

impl Parts {
    /// Whether a union of `older` is a part of this one's. A frozen layer can become active again, once those above it are
    /// gone: so that which was active then must be there still.
    fn go_on_from(&self, older: &Self) -> bool {
        let was_active =
            self.active == older.active || older.active.is_some_and(|active| self.frozen.contains(&active));
        let same = Self { frozen: older.frozen.clone(), active: older.active, ..self.clone() } == *older;
        same && was_active && self.frozen.starts_with(&older.frozen)
    }
}

impl Tallies {
    fn unions(&self) -> MutexGuard<'_, BTreeMap<BitmapName, Union>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets bitmaps of a disk that are not among these.
    pub(super) fn keep(&self, disk: &str, entries: &[BitmapEntry]) {
        let is_there = |name: &BitmapName| entries.iter().any(|entry| entry.name == name.name);
        self.unions().retain(|name, _| name.disk != disk || is_there(name));
    }

    /// Finds out what is to be counted. The caller has a draft, and need not have it any more for [`Tally::count`].
    ///
    /// Errors: [`Corrupt`](block::ErrorKind::Corrupt) if what it told is lost.
    pub(super) fn begin(&self, look: &Look<'_>, entry: &BitmapEntry) -> Result<Tally> {
        let now = look.now();
        let (folded, mut layers) = match entry.since {
            Some(since) => look.cover(since, now.boundary)?,
            None => (Vec::new(), Vec::new()),
        };
        let files = folded.into_iter().map(|file| file.ok_or_else(lost)).collect::<Result<Vec<_>>>()?;
        let active = look.active();
        let top = layers.pop_if(|layer| Some(layer.entry.number) == active);
        let of = Parts {
            capacity: now.capacity,
            granularity_bits: granularity_bits(entry.granularity.into())?,
            capacity_before: entry.since.map_or(now.capacity, |since| since.capacity),
            files: files.into_iter().chain(entry.bits).collect(),
            frozen: layers.iter().map(|layer| layer.entry.number).collect(),
            active,
        };
        let name = BitmapName { disk: look.id.to_owned(), name: entry.name.clone() };
        let known = self.unions().get(&name).filter(|union| of.go_on_from(&union.of)).cloned();
        let union = match known {
            Some(Union { of: older, dirty }) => {
                layers.drain(..older.frozen.len());
                if layers.is_empty() { dirty } else { Arc::new(copy(&dirty)?) }
            }
            None => Arc::new(of.told_by_files(look)?),
        };
        Ok(Tally { name, of, union, missing: layers, active: top })
    }
}

impl Parts {
    fn told_by_files(&self, look: &Look<'_>) -> Result<DirtyBitmap> {
        let dirty = DirtyBitmap::new(self.capacity, self.granularity_bits)?;
        for file in &self.files {
            bits::add(&dirty, &look.store.bits().load(*file)?);
        }
        let more = self.capacity.saturating_sub(self.capacity_before);
        dirty.mark(ByteRange { offset: self.capacity_before, len: more });
        Ok(dirty)
    }
}

impl Tally {
    /// Bytes that are dirty.
    pub(super) fn count(self, tallies: &Tallies) -> Result<u64> {
        let Self { name, of, union, missing, active } = self;
        for layer in &missing {
            add(&union, layer)?;
            // Its tables are in memory no longer than needed.
            layer.forget();
        }
        let kept: u64 = {
            let unions = tallies.unions();
            unions.iter().filter(|(known, _)| **known != name).map(|(_, union)| union.dirty.byte_len()).sum()
        };
        if kept + union.byte_len() <= MAX_BYTES {
            tallies.unions().insert(name, Union { of, dirty: Arc::clone(&union) });
        }
        let Some(active) = active else { return Ok(union.dirty_bytes()) };
        let all = copy(&union)?;
        add(&all, &active)?;
        Ok(all.dirty_bytes())
    }
}

fn add(into: &DirtyBitmap, layer: &Layer) -> Result<()> {
    bits::add_layer::<Error>(into, layer, &mut || Ok(()))
}

fn copy(bits: &DirtyBitmap) -> Result<DirtyBitmap> {
    const CHUNK: u64 = 1 << 20;
    let copied = DirtyBitmap::new(bits.capacity(), bits.granularity_bits())?;
    let mut buffer = vec![0; CHUNK.min(bits.byte_len()) as usize];
    for at in (0..bits.byte_len()).step_by(CHUNK as usize) {
        buffer.truncate(CHUNK.min(bits.byte_len() - at) as usize);
        bits.read_bytes(at, &mut buffer);
        copied.merge_bytes(at, &buffer);
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(frozen: &[u32], active: u32) -> Parts {
        let (frozen, active) = (frozen.to_vec(), Some(active));
        Parts { capacity: 1, granularity_bits: 16, capacity_before: 1, files: Vec::new(), frozen, active }
    }

    #[test]
    fn a_union_counts_as_long_as_its_layers_stayed_frozen() {
        let older = parts(&[1, 2], 3);
        assert!(older.go_on_from(&older));
        assert!(parts(&[1, 2, 3], 4).go_on_from(&older), "a cut");
        assert!(parts(&[1, 2, 3, 4], 5).go_on_from(&older), "two cuts");
        assert!(!parts(&[1, 3], 4).go_on_from(&older), "a merge");
        assert!(!parts(&[1], 2).go_on_from(&older), "the active one was taken off");
        assert!(!parts(&[1, 2], 4).go_on_from(&older), "and was put on again: 2 was written in between");
        assert!(!Parts { files: vec![7], ..older.clone() }.go_on_from(&older));
        assert!(!Parts { capacity: 2, ..older.clone() }.go_on_from(&older));
    }
}
