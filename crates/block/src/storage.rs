//! Storage: the bytes of one host file or block device.

use std::fmt::Debug;
use std::num::NonZeroU32;
use std::os::fd::BorrowedFd;

use crate::Result;

/// A range of bytes of a disk or of a storage; `offset + len` never overflows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ByteRange {
    /// The first byte.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

impl ByteRange {
    /// The range, or `None` if its end is not a number.
    pub fn new(offset: u64, len: u64) -> Option<Self> {
        offset.checked_add(len).map(|_| Self { offset, len })
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Whether it ends at or before `size`.
    pub fn is_within(&self, size: u64) -> bool {
        self.end() <= size
    }

    /// The part of it that is also in `other`, if any.
    pub fn intersect(&self, other: Self) -> Option<Self> {
        let offset = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (offset < end).then(|| Self { offset, len: end - offset })
    }
}

/// A host file: bytes at positions, made durable by [`sync`](Storage::sync).
///
/// All methods may be called from several threads at once. Two writes that overlap in time and place leave either's
/// bytes; the caller prevents that where it matters.
pub trait Storage: Send + Sync + Debug {
    /// Fills `buf` from `offset`. Bytes past the end of the file are an error.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`, growing the file if need be.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Returns once all that was written before the call is on stable storage, the file's size included.
    ///
    /// The caller latches a failure: the kernel forgets which pages it could not write, so a second, successful call
    /// would prove nothing.
    fn sync(&self) -> Result<()>;

    /// The file's length in bytes.
    fn len(&self) -> Result<u64>;

    /// Whether the file has no bytes.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts or grows the file; what grows reads as zeroes.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Gives `range` back to the host; it reads as zeroes afterwards. [`Unsupported`](crate::ErrorKind) where the
    /// host can not, and then nothing has changed.
    fn punch_hole(&self, range: ByteRange) -> Result<()>;

    /// The first range at or after `offset` that may hold data, for skipping holes; `None` if all that follows is a
    /// hole. The default knows of no holes.
    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        let len = self.len()?;
        Ok((offset < len).then(|| ByteRange { offset, len: len - offset }))
    }

    /// The descriptor for data I/O, for those who bring their own means (io_uring). `None` where there is no kernel
    /// file, and then data goes through [`read_at`](Self::read_at) and [`write_at`](Self::write_at).
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The alignment in bytes that data I/O through [`fd`](Self::fd) must keep in memory address, offset and
    /// length, because it bypasses the page cache (`O_DIRECT`); `None` where it goes through the page cache.
    /// `read_at` and `write_at` never need any alignment.
    fn direct_alignment(&self) -> Option<NonZeroU32> {
        None
    }

    /// Whether the bytes are in the host's memory alone (tmpfs), so that I/O through [`fd`](Self::fd) is a copy and
    /// waits for no device.
    fn in_memory(&self) -> bool {
        false
    }
}

/// Writes zeroes over `range`, a bounded buffer at a time.
pub fn write_zeroes(storage: &dyn Storage, range: ByteRange) -> Result<()> {
    const CHUNK: u64 = 64 * 1024;
    let zeroes = [0; CHUNK as usize];
    let mut offset = range.offset;
    while offset < range.end() {
        let len = CHUNK.min(range.end() - offset);
        storage.write_at(&zeroes[..len as usize], offset)?;
        offset += len;
    }
    Ok(())
}
