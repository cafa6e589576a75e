//! Layers: what one image of a chain knows of a disk's bytes, apart from what is beneath it.

use std::sync::Arc;

use crate::{ByteRange, Disk, Result, Storage};

/// A run of bytes of the disk that a layer treats alike.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Run {
    /// The bytes.
    pub range: ByteRange,
    /// What the layer knows of them.
    pub place: Place,
}

/// What a layer knows of a run of bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// Nothing: they are in the backing file, or zero without one.
    Absent,
    /// That they are zero, whatever is beneath.
    Zero,
    /// They are in the layer's data file from this offset on, all of them: what the file lacks at its end is
    /// [`Zero`](Self::Zero).
    Data(u64),
    /// They are in this layer, but not as they are (compressed): only [`Disk::resolve_read`] gets at them.
    Packed,
}

impl Place {
    /// Whether `next` goes on where this ends, `len` bytes on.
    pub fn goes_on(self, len: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Data(here), Self::Data(there)) => here + len == there,
            _ => self == next,
        }
    }
}

/// An image of a chain. As a [`Disk`] it shows itself with what is beneath it; its runs are what it holds itself.
pub trait Layer: Disk {
    /// The longest run that begins where `range` does and lies within it. Asked again and again it walks a whole
    /// layer, for maps, exports and merges. `range` is not empty and lies within the capacity; else an error.
    ///
    /// A run of a layer that is being written may be out of date as soon as it is returned.
    fn run_at(&self, range: ByteRange) -> Result<Run>;

    /// Where the bytes of [`Place::Data`] are: one file, as long as the layer is open. Whoever has it may keep it.
    fn data(&self) -> Arc<dyn Storage>;

    /// Lets go of what it keeps in memory to answer [`run_at`](Self::run_at) at once. Called by who has walked a part of it and
    /// keeps the runs: with hundreds of layers, what each of them keeps adds up.
    fn forget(&self) {}
}
