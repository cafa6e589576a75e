//! Copying between layers: what is copied, and what is not.
//!
//! **Down**, into the lowest: what the layers above it hold themselves, and nothing else. Who reads the chain from the
//! highest of them on finds all of that in them, so it never sees the target change. **Up**, into the highest: what it
//! lacks and the layers beneath it hold. That shows through it already.
//!
//! Either way a target with larger clusters also takes in the rest of a cluster, from beneath itself: the same bytes.

use std::sync::Arc;

use block::{ByteRange, Disk, Error, ErrorKind, Layer, Place, Result, blocking, read_disk, write_disk};

use super::record::Direction;

/// How much is copied at once.
const CHUNK: u64 = 1 << 20;

/// What is to be done with a piece of the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Action {
    Nothing,
    Zero,
    /// From the source with this index.
    Copy(usize),
}

/// Layers that are to become one, and which way.
#[derive(Debug)]
pub(crate) struct Merge {
    /// Newest first.
    sources: Vec<Arc<dyn Layer>>,
    target: Arc<dyn Layer>,
    direction: Direction,
    /// Nothing is beneath what is merged: what no layer knows reads as zeroes anyway.
    on_nothing: bool,
    capacity: u64,
}

impl Merge {
    /// Of `layers`, the lowest first, at least two. `on_nothing` if nothing will be beneath the one that stays.
    ///
    /// Errors: [`ErrorKind::Unsupported`] if the lowest is larger than the highest and is to stay: in time it would show
    /// what was out of sight.
    pub(crate) fn new(layers: &[Arc<dyn Layer>], direction: Direction, on_nothing: bool) -> Result<Self> {
        let (Some((lowest, above)), Some((highest, beneath))) = (layers.split_first(), layers.split_last())
        else {
            return Err(Error::new(ErrorKind::InvalidInput, "no layers to merge"));
        };
        if direction == Direction::Down && lowest.capacity() > highest.capacity() {
            let story = "a layer is smaller than the one that it is to be merged into: somebody has resized one of them";
            return Err(Error::new(ErrorKind::Unsupported, story));
        }
        let (target, sources) = match direction {
            Direction::Down => (lowest, above),
            Direction::Up => (highest, beneath),
        };
        Ok(Self {
            sources: sources.iter().rev().cloned().collect(),
            target: Arc::clone(target),
            direction,
            on_nothing,
            capacity: highest.capacity(),
        })
    }

    /// Bytes that will be copied. `pause` is called now and then, and its error ends it.
    pub(crate) fn measure<E: From<Error>>(
        &self,
        mut pause: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<u64, E> {
        let (mut offset, mut bytes) = (0, 0);
        let mut pieces = 0_u32;
        while offset < self.capacity {
            let (piece, action) = self.piece_at(offset, u64::MAX)?;
            if matches!(action, Action::Copy(_)) {
                bytes += piece.len;
            }
            offset = piece.end();
            pieces += 1;
            if pieces.is_multiple_of(1024) {
                pause()?;
            }
        }
        Ok(bytes)
    }

    /// Does the next piece from `offset` on, and says where it ended and how many bytes were copied. `None` at the end.
    pub(crate) fn step(&self, offset: u64, buffer: &mut Vec<u8>) -> Result<Option<(u64, u64)>> {
        if offset >= self.capacity {
            return Ok(None);
        }
        let (piece, action) = self.piece_at(offset, CHUNK)?;
        let copied = match action {
            Action::Nothing => 0,
            Action::Zero => {
                blocking(|waker| self.target.write_zeroes(piece, true, waker))?;
                0
            }
            Action::Copy(source) => {
                let source = self.sources.get(source).ok_or_else(|| {
                    Error::new(ErrorKind::InvalidInput, "a piece of a source that is not there")
                })?;
                buffer.resize(piece.len as usize, 0);
                read_disk(&**source as &dyn Disk, piece.offset, buffer)?;
                write_disk(&*self.target as &dyn Disk, piece.offset, buffer)?;
                piece.len
            }
        };
        Ok(Some((piece.end(), copied)))
    }

    /// The longest piece from `offset` on that is treated alike; one that is copied is at most `longest`.
    fn piece_at(&self, offset: u64, longest: u64) -> Result<(ByteRange, Action)> {
        let mut rest = ByteRange { offset, len: self.capacity - offset };
        if self.direction == Direction::Up {
            let run = self.target.run_at(rest)?;
            if run.place != Place::Absent {
                return Ok((run.range, Action::Nothing));
            }
            rest = run.range;
        }
        for (index, source) in self.sources.iter().enumerate() {
            let Some(known) = rest.intersect(ByteRange { offset: 0, len: source.capacity() }) else {
                return self.past_end(rest, index);
            };
            let run = source.run_at(known)?;
            rest = run.range;
            match run.place {
                Place::Absent => {}
                Place::Zero => return Ok((rest, self.zero())),
                Place::Data(at) => return self.data(index, rest, at, longest),
                Place::Packed => return Ok((shorter(rest, longest), Action::Copy(index))),
            }
        }
        Ok((rest, Action::Nothing))
    }

    /// A piece that is in a source's file, which may have holes there.
    fn data(&self, index: usize, piece: ByteRange, at: u64, longest: u64) -> Result<(ByteRange, Action)> {
        let storage = self.sources.get(index).map(|source| source.data());
        let data = match storage {
            Some(storage) => storage.next_data(at)?,
            None => None,
        };
        let hole = data.map_or(u64::MAX, |data| data.offset.saturating_sub(at));
        if hole > 0 {
            return Ok((shorter(piece, hole), self.zero()));
        }
        let solid = data.map_or(u64::MAX, |data| data.end() - at);
        Ok((shorter(piece, longest.min(solid)), Action::Copy(index)))
    }

    /// A piece past the end of a source: zeroes, whatever is beneath.
    fn past_end(&self, piece: ByteRange, index: usize) -> Result<(ByteRange, Action)> {
        let beneath = self.sources.get(index + 1..).unwrap_or_default();
        match self.direction {
            // One beneath is longer: a job that was called off had it grow.
            Direction::Up if beneath.iter().any(|layer| layer.capacity() > piece.offset) => {
                Ok((piece, self.zero()))
            }
            Direction::Up => Ok((piece, Action::Nothing)),
            // The target as well, unless it is about to grow.
            Direction::Down => {
                let Some(known) = piece.intersect(ByteRange { offset: 0, len: self.target.capacity() })
                else {
                    return Ok((piece, Action::Nothing));
                };
                let run = self.target.run_at(known)?;
                let shows = matches!(run.place, Place::Data(_) | Place::Packed);
                Ok((run.range, if shows { Action::Zero } else { Action::Nothing }))
            }
        }
    }

    fn zero(&self) -> Action {
        match (self.direction, self.on_nothing) {
            (Direction::Up, true) => Action::Nothing,
            _ => Action::Zero,
        }
    }
}

fn shorter(range: ByteRange, longest: u64) -> ByteRange {
    ByteRange { len: range.len.min(longest), ..range }
}
