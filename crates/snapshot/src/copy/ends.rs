//! Moving the bytes of one piece.

use std::sync::Arc;

use block::{ByteRange, Disk, Result, blocking, read_disk, write_disk};
use qcow2::Image;

use super::{CopyFailure, Piece};

/// Where a copy reads and writes.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) source: Arc<dyn Disk>,
    pub(super) target: Arc<dyn Disk>,
    /// The target, if what is written is to be compressed.
    pub(super) compressing: Option<Arc<Image>>,
    /// All that is written begins and ends at a multiple of so many bytes, a power of two: a cluster of the target, which so
    /// needs to know nothing of what is beneath it. No two threads write to the same one.
    pub(super) unit: u64,
    /// What is not written reads as zeroes.
    pub(super) on_zeroes: bool,
}

impl Ends {
    pub(super) fn copy(&self, piece: Piece, buffer: &mut Vec<u8>) -> std::result::Result<(), CopyFailure> {
        if piece.is_zero {
            return self.zero(piece.range).map_err(CopyFailure::Write);
        }
        // At most a window.
        buffer.resize(piece.range.len as usize, 0);
        read_disk(&*self.source, piece.range.offset, buffer).map_err(CopyFailure::Read)?;
        self.put(piece.range.offset, buffer).map_err(CopyFailure::Write)
    }

    /// Writes what was read, runs of zeroes as such: the target stays as sparse as what is in the disk.
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let is_zero = |unit: &&[u8]| unit.iter().all(|&byte| byte == 0);
        let mut units = bytes.chunks(self.unit as usize).peekable();
        let mut start = 0;
        while let Some(first) = units.next() {
            let zero = is_zero(&first);
            let mut end = start + first.len();
            while let Some(unit) = units.next_if(|unit| is_zero(unit) == zero) {
                end += unit.len();
            }
            let (to, len) = (at + start as u64, (end - start) as u64);
            match zero {
                true => self.zero(ByteRange { offset: to, len })?,
                false => self.write(to, bytes.get(start..end).unwrap_or_default())?,
            }
            start = end;
        }
        Ok(())
    }

    /// Writes whole units.
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let Some(image) = &self.compressing else { return write_disk(&*self.target, at, bytes) };
        let size = image.cluster_size();
        let mut clusters = (at..).step_by(size as usize).zip(bytes.chunks(size as usize));
        clusters.try_for_each(|(at, cluster)| image.write_compressed(at, cluster))
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        if self.on_zeroes {
            return Ok(());
        }
        blocking(|waker| self.target.write_zeroes(range, true, waker))
    }
}
