//! The probe's only way to the disk: small reads within one partition, and fields in what they gave.

use block::{Disk, Result, read_disk};

/// The longest single read, in bytes.
pub(super) const LONGEST_READ: usize = 64 * 1024;

/// A partition, or the disk as a whole.
#[derive(Clone, Copy, Debug)]
pub(super) struct Volume<'a> {
    disk: &'a dyn Disk,
    offset: u64,
    size: u64,
}

impl<'a> Volume<'a> {
    pub(super) fn whole(disk: &'a dyn Disk) -> Self {
        Self { disk, offset: 0, size: disk.capacity() }
    }

    /// The part of this volume that starts at `offset`, `None` if it does not lie within.
    pub(super) fn part(&self, offset: u64, size: u64) -> Option<Self> {
        let end = offset.checked_add(size)?;
        (end <= self.size).then(|| Self { disk: self.disk, offset: self.offset + offset, size })
    }

    /// Bytes it holds.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// `len` bytes from `at` on, both in bytes; `None` if they do not lie within, or are more than [`LONGEST_READ`].
    /// An error is the disk's, never the content's.
    pub(super) fn read(&self, at: u64, len: usize) -> Result<Option<Block>> {
        let Some(end) = at.checked_add(len as u64) else { return Ok(None) };
        if end > self.size || len > LONGEST_READ {
            return Ok(None);
        }
        let mut bytes = vec![0; len];
        read_disk(self.disk, self.offset + at, &mut bytes)?;
        Ok(Some(Block(bytes)))
    }
}

/// Bytes of the disk, and the fields in them.
///
/// A field that does not lie within reads as zero, so an offset out of hostile content is harmless; no rule of the
/// probe takes zero for a signature.
#[derive(Clone, Debug)]
pub(super) struct Block(pub(super) Vec<u8>);

impl Block {
    /// The `len` bytes at `at`, fewer where the block ends.
    pub(super) fn bytes(&self, at: usize, len: usize) -> &[u8] {
        let at = at.min(self.0.len());
        let end = at.saturating_add(len).min(self.0.len());
        self.0.get(at..end).unwrap_or_default()
    }

    /// The same as a block of its own.
    pub(super) fn part(&self, at: usize, len: usize) -> Self {
        Self(self.bytes(at, len).to_vec())
    }

    /// Whether `expected` stands at `at`.
    pub(super) fn has(&self, at: usize, expected: &[u8]) -> bool {
        self.bytes(at, expected.len()) == expected
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.bytes(at, N).try_into().unwrap_or([0; N])
    }

    pub(super) fn u8(&self, at: usize) -> u8 {
        u8::from_le_bytes(self.array(at))
    }

    pub(super) fn le16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub(super) fn le32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    pub(super) fn le64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    pub(super) fn be16(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.array(at))
    }

    pub(super) fn be32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    pub(super) fn be64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }

    /// The label of `len` bytes at `at`, without its padding; `None` if it is empty. What is not text shows as `�`.
    pub(super) fn label(&self, at: usize, len: usize) -> Option<String> {
        let padded = self.bytes(at, len);
        let end = padded.iter().position(|byte| *byte == 0).unwrap_or(padded.len());
        printable(&String::from_utf8_lossy(padded.get(..end).unwrap_or_default()))
    }

    /// The same of UTF-16LE.
    pub(super) fn label_utf16(&self, at: usize, len: usize) -> Option<String> {
        let units = self.bytes(at, len).chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
        let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        printable(&String::from_utf16_lossy(&units))
    }
}

/// A label goes to terminals and logs: nothing in it may steer them.
fn printable(text: &str) -> Option<String> {
    let shown: String = text.trim().chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    (!shown.is_empty()).then_some(shown)
}
