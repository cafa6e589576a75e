//! The stack: all the layers beneath the active one, as one disk.
//!
//! ```text
//!  resolve_read ─▶ view ─▶ map: segment ─▶ runs ─▶ extents          a hit: one shard's read lock, one search
//!                   │        │
//!                   │        └── not there ─▶ ask the layers, the newest first, each for what newer ones lack
//!                   └── the layers, the base first
//! ```
//!
//! A chain that is read image by image costs more with every snapshot. Here each [`SEGMENT`] of the disk is looked up
//! once in all layers; what was found is kept, packed, and from then on a read costs the same however long the chain
//! is.
//!
//! # Lifecycle
//! A stack is made of open layers ([`Stack::new`]) and is the backing of the active image. For a cut,
//! [`Stack::with_layer`] makes the next one, with the layer that is about to be frozen on top, and the overlay opens
//! over it. Both share the map, so a cut throws nothing away. When a job has moved data between layers,
//! [`Stack::replace`] switches to a list that reads the same.
//!
//! # Invariants
//! - The layers do not change in what can be seen through them. The top one may, until something is first read
//!   through the stack.
//! - A segment in the map is tagged with how many layers it was resolved from. Tagged with fewer than the view has,
//!   only the newer ones are asked and merged in. Tagged with more, for the view is older than the map, it is of no
//!   use, and the layers are asked.
//! - No lock is held while a layer is asked, so none during I/O. Errors of layers are returned, if they concern what is
//!   read, and not kept.
//! - Nothing here recurs from layer to layer, neither reading nor dropping.
//! - The map takes at most the bytes that were given for it. What was not used for longest goes first, nearly (the
//!   clock algorithm).

mod layers;
mod map;
mod resolve;
mod runs;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;
use std::task::{Poll, Waker};

use arc_swap::ArcSwap;

use crate::{ByteRange, Disk, Error, ErrorKind, Extent, Flush, FlushStep, Layer, Result, Source, WriteGuard};
use layers::Layers;
use map::{Map, Segment};
use runs::{Found, Runs};

/// Bytes of the disk that are looked up at once. With the overlays' clusters of 128 KiB, sixteen of their entries.
pub(crate) const SEGMENT: u64 = 2 << 20;

/// So many segments are looked up together, if nothing is known of them.
const AROUND: u64 = 8;

/// The immutable layers beneath an active one as one read-only disk, whose reads cost the same however many they are.
///
/// Where the bytes are is looked up in the layers once and kept, within a bound of memory. So nothing that can be seen
/// through the layers may change; they may be written where a layer above hides it, or with the same bytes.
pub struct Stack(ArcSwap<View>);

/// A list of layers, and the map that belongs to it.
struct View {
    layers: Layers,
    map: Arc<Map>,
}

impl Stack {
    /// A stack of `layers`, the base first, whose map takes at most `cache_bytes` of memory. With 0 it keeps nothing
    /// and asks the layers at each read; that is also right while a layer is being written.
    ///
    /// Its capacity is that of the last layer; without layers it is empty. Layers may differ in size: zeroes follow
    /// the end of a shorter one, and what a longer one has past that end is not seen.
    pub fn new(layers: Vec<Arc<dyn Layer>>, cache_bytes: u64) -> Self {
        let map = Arc::new(Map::new(cache_bytes));
        Self(ArcSwap::from_pointee(View { layers: layers.into_iter().collect(), map }))
    }

    /// The same with one more layer on top. The map is shared: what either finds out serves both.
    ///
    /// `top` may still be written until something is first read through the new stack, and no longer. If that does
    /// not come to pass, the new stack is dropped, unread.
    #[must_use]
    pub fn with_layer(&self, top: Arc<dyn Layer>) -> Self {
        let view = self.0.load();
        Self(ArcSwap::from_pointee(View { layers: view.layers.with(top), map: Arc::clone(&view.map) }))
    }

    /// Shows from now on what `other` shows, which reads the same, and shares its map. Reads under way go on with the
    /// layers they began with.
    pub fn replace(&self, other: &Self) {
        self.0.store(other.0.load_full());
    }

    /// The layers, the base first.
    pub fn layers(&self) -> Vec<Arc<dyn Layer>> {
        self.0.load().layers.from(0).map(|(_, layer)| Arc::clone(layer)).collect()
    }
}

impl View {
    fn capacity(&self) -> u64 {
        self.layers.top().map_or(0, |top| top.capacity())
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        match range.is_within(self.capacity()) {
            true => Ok(()),
            false => {
                let story = format!("bytes {}..{} are past the end of the disk", range.offset, range.end());
                Err(Error::new(ErrorKind::OutOfRange, story))
            }
        }
    }

    /// Resolves the part of a segment.
    fn resolve(&self, segment: Segment, part: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        let known = self.map.with(segment, |resolved, runs| match resolved.cmp(&self.layers.len()) {
            Ordering::Equal if self.push_stored(runs, part, out) => Known::Done,
            Ordering::Equal => Known::Packed(runs.within(part)),
            Ordering::Less => Known::Older(resolved, runs.clone()),
            Ordering::Greater => Known::Newer,
        });
        let runs = match known {
            Some(Known::Done) => return Ok(()),
            Some(Known::Packed(runs)) => Ok(runs),
            Some(Known::Older(resolved, runs)) => self.look_up(resolved, segment.range(), &runs),
            None if self.map.budget() > 0 => {
                let around = self.unknown_around(segment);
                self.look_up(0, around, &Runs::zeroes(around))
            }
            None | Some(Known::Newer) => self.ask(part),
        };
        // What can not be looked up may be beside what is asked for.
        let runs = runs.or_else(|_| self.ask(part))?;
        self.push(&runs, part, out)
    }

    /// Asks the layers for whole segments, of which `beneath` is what the first `first` of them have, and keeps what they
    /// say.
    fn look_up(&self, first: usize, range: ByteRange, beneath: &Runs) -> Result<Runs> {
        let runs = resolve::resolve(&self.layers, first, range, beneath, |layer| layer.forget())?;
        let mut offset = range.offset;
        while offset < range.end() {
            let segment = Segment::at(offset);
            self.map.insert(segment, self.layers.len(), runs.within(segment.range()));
            offset = segment.range().end();
        }
        Ok(runs)
    }

    /// Asks the layers for no more than this, and keeps nothing.
    fn ask(&self, part: ByteRange) -> Result<Runs> {
        resolve::resolve(&self.layers, 0, part, &Runs::zeroes(part), |_| ())
    }

    /// The segments about this one of which nothing is known: it costs a layer hardly more to be asked for some than for
    /// one, for it has to load its table.
    fn unknown_around(&self, segment: Segment) -> ByteRange {
        let group = segment.group(AROUND);
        let end = self.capacity().min(group.end());
        let mut range = segment.range();
        while range.offset > group.offset && !self.map.knows(Segment::at(range.offset - 1)) {
            range = ByteRange { offset: range.offset - SEGMENT, len: range.len + SEGMENT };
        }
        while range.end() < end && !self.map.knows(Segment::at(range.end())) {
            range.len += Segment::at(range.end()).range().len;
        }
        range
    }

    /// Appends the extents of `part`, all or, if some of its bytes can only be had by I/O, none.
    fn push_stored(&self, runs: &Runs, part: ByteRange, out: &mut Vec<Extent>) -> bool {
        let before = out.len();
        for (range, found) in runs.pieces(part) {
            match self.stored(range.len, found) {
                Some(extent) => out.push(extent),
                None => {
                    out.truncate(before);
                    return false;
                }
            }
        }
        true
    }

    fn push(&self, runs: &Runs, part: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        for (range, found) in runs.pieces(part) {
            match (self.stored(range.len, found), found) {
                (Some(extent), _) => out.push(extent),
                (None, Found::Packed { layer }) => {
                    self.layers.get(layer).ok_or_else(unknown)?.resolve_read(range, out)?;
                }
                (None, _) => return Err(unknown()),
            }
        }
        Ok(())
    }

    /// The extent of a run that can be had without I/O.
    fn stored(&self, len: u64, found: Found) -> Option<Extent> {
        match found {
            Found::Zero => Some(Extent { len, source: Source::Zero }),
            Found::Data { layer, offset } => {
                let storage = Arc::clone(self.layers.data(layer)?);
                Some(Extent { len, source: Source::File { storage, offset } })
            }
            Found::Packed { .. } => None,
        }
    }
}

/// What the map has of a segment.
enum Known {
    /// All that was asked for.
    Done,
    /// Runs some of which need I/O.
    Packed(Runs),
    /// What so many layers have.
    Older(usize, Runs),
    /// What more layers have than there are here.
    Newer,
}

impl Disk for Stack {
    fn capacity(&self) -> u64 {
        self.0.load().capacity()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn discard_granularity(&self) -> u32 {
        self.0.load().layers.top().map_or(1, |top| top.discard_granularity())
    }

    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        let view = self.0.load();
        view.check(range)?;
        let mut rest = range;
        while rest.len > 0 {
            let segment = Segment::at(rest.offset);
            let len = rest.len.min(segment.range().end() - rest.offset);
            view.resolve(segment, ByteRange { len, ..rest }, out)?;
            rest = ByteRange { offset: rest.offset + len, len: rest.len - len };
        }
        Ok(())
    }

    fn resolve_write(
        &self,
        _range: ByteRange,
        _waker: &Waker,
        _out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>> {
        Poll::Ready(Err(read_only()))
    }

    fn discard(&self, _range: ByteRange, _waker: &Waker) -> Poll<Result<()>> {
        Poll::Ready(Err(read_only()))
    }

    fn write_zeroes(&self, _range: ByteRange, _unmap: bool, _waker: &Waker) -> Poll<Result<()>> {
        Poll::Ready(Err(read_only()))
    }

    fn flush(&self) -> Box<dyn Flush> {
        Box::new(Nothing)
    }
}

fn unknown() -> Error {
    Error::new(ErrorKind::Corrupt, "a layer that is not in the stack")
}

fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "the layers beneath the active one are not written")
}

/// The flush of a disk that is never written.
struct Nothing;

impl Flush for Nothing {
    fn step(&mut self, _last: Result<()>, _waker: &Waker) -> Poll<Result<FlushStep>> {
        Poll::Ready(Ok(FlushStep::Done))
    }
}

impl fmt::Debug for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stack").field("layers", &self.0.load().layers.len()).finish_non_exhaustive()
    }
}
