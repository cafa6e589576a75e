//! Refcounts in a refcount block's bytes, of any width: pure, nothing here does I/O.

use std::ops::Range;

use block::{Error, ErrorKind, Result};

/// How wide refcounts are: the header's `refcount_order`, 0 to 6, for 1 to 64 bits.
///
/// Widths of whole bytes are big-endian; narrower ones are packed from a byte's least significant bit on, as QEMU has
/// them ("bit 0 means the least significant bit in this context").
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct RefcountWidth(u32);

impl RefcountWidth {
    /// `order` is at most 6: the header was checked.
    pub(crate) fn new(order: u32) -> Self {
        Self(order.min(6))
    }

    pub(crate) fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest refcount.
    pub(crate) fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Refcounts in a block of `cluster_size` bytes.
    pub(crate) fn per_block(self, cluster_size: u64) -> u64 {
        (cluster_size * 8) >> self.0
    }

    /// The bytes that hold the refcounts `entries` of a block. Of narrow ones the first and last byte may hold others too.
    pub(crate) fn bytes(self, entries: Range<u64>) -> Range<u64> {
        let bits = u64::from(self.bits());
        entries.start * bits / 8..(entries.end * bits).div_ceil(8)
    }

    /// Refcount `index` of `block`, which begins at a whole byte; zero past its end.
    pub(crate) fn get(self, block: &[u8], index: usize) -> u64 {
        let bits = self.bits() as usize;
        let at = index * bits / 8;
        match bits {
            1 | 2 | 4 => {
                let byte = block.get(at).copied().unwrap_or(0);
                u64::from(byte >> (index * bits % 8)) & self.max()
            }
            _ => {
                let bytes = block.get(at..at + bits / 8).unwrap_or(&[]);
                bytes.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte))
            }
        }
    }

    /// Makes refcount `index` of `block` be `value`. Errors, having changed nothing: [`ErrorKind::NoSpace`] if it does
    /// not fit the width, as QEMU's `EINVAL`; [`ErrorKind::OutOfRange`] past the block's end.
    pub(crate) fn set(self, block: &mut [u8], index: usize, value: u64) -> Result<()> {
        if value > self.max() {
            let story = format!("a refcount of {value} does not fit {} bits", self.bits());
            return Err(Error::new(ErrorKind::NoSpace, story));
        }
        let bits = self.bits() as usize;
        let at = index * bits / 8;
        let len = bits.div_ceil(8);
        let bytes = block.get_mut(at..at + len);
        let bytes =
            bytes.ok_or_else(|| Error::new(ErrorKind::OutOfRange, "past the end of the refcount block"))?;
        match (bits, &mut *bytes) {
            (1 | 2 | 4, [byte]) => {
                let shift = index * bits % 8;
                *byte = *byte & !((self.max() as u8) << shift) | (value as u8) << shift;
            }
            _ => bytes.copy_from_slice(&value.to_be_bytes()[8 - len..]),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_what_it_is_given_and_its_neighbours() {
        for order in 0..=6 {
            let width = RefcountWidth::new(order);
            let entries = width.per_block(512) as usize;
            assert_eq!(entries, 4096 >> order);
            let mut block = vec![0; 512];
            let value = |index: usize| (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & width.max();
            for index in (0..entries).rev() {
                width.set(&mut block, index, value(index)).unwrap();
            }
            assert!((0..entries).all(|index| width.get(&block, index) == value(index)), "{order}");
            let before = block.clone();
            if order < 6 {
                let error = width.set(&mut block, 3, width.max() + 1).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace);
            }
            assert_eq!(width.set(&mut block, entries, 1).unwrap_err().kind(), ErrorKind::OutOfRange);
            assert_eq!(block, before);
            assert_eq!(width.get(&block, entries), 0);
        }
    }

    #[test]
    fn bytes_are_laid_out_as_the_format_says() {
        let mut block = [0; 8];
        RefcountWidth::new(0).set(&mut block, 9, 1).unwrap();
        assert_eq!(block, [0, 2, 0, 0, 0, 0, 0, 0]);
        RefcountWidth::new(2).set(&mut block, 1, 0xa).unwrap();
        assert_eq!(block, [0xa0, 2, 0, 0, 0, 0, 0, 0]);
        RefcountWidth::new(4).set(&mut block, 3, 0x102).unwrap();
        assert_eq!(block, [0xa0, 2, 0, 0, 0, 0, 1, 2]);
        assert_eq!(RefcountWidth::new(1).bytes(3..9), 0..3);
        assert_eq!(RefcountWidth::new(4).bytes(3..9), 6..18);
    }
}
