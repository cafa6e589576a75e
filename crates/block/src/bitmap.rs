//! Dirty bitmaps: which parts of a disk were written since some point in time.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{ByteRange, Error, ErrorKind, Result};

/// Bits in a word.
const WORD_BITS: u64 = 64;
/// How much memory one bitmap may take, in bytes: QEMU's own bound (`BME_MAX_PHYS_SIZE`).
const MAX_BYTES: u64 = 512 << 20;
/// How often a bitmap can grow: each time it at least doubles its room, so that many suffice for all of [`MAX_BYTES`].
const MAX_PARTS: usize = 32;

/// One bit for each granule of a disk: *written to since*.
///
/// Marking takes no lock and may be done by all threads at once, while others read the bitmap or it grows. A mark is sure
/// to be seen by who knows, by other means, that it was made. Bits are never taken away: to begin anew is to take
/// another bitmap.
///
/// As bytes a bitmap is what QEMU's images have: bit `n` is bit `n % 8` of byte `n / 8`.
#[derive(Debug)]
pub struct DirtyBitmap {
    granularity_bits: u32,
    capacity: AtomicU64,
    /// The words of the disk it was made for, then those of each growth.
    parts: [OnceLock<Box<[AtomicU64]>>; MAX_PARTS],
}

impl DirtyBitmap {
    /// A clean bitmap of a disk of `capacity` bytes, a bit for each `1 << granularity_bits` of them (9 to 31, as in
    /// QEMU). Errors: [`ErrorKind::InvalidInput`] for other granularities, or if it took more than 512 MiB.
    pub fn new(capacity: u64, granularity_bits: u32) -> Result<Self> {
        Self::check(capacity, granularity_bits)?;
        let none = std::array::from_fn(|_| OnceLock::new());
        let bitmap = Self { granularity_bits, capacity: AtomicU64::new(0), parts: none };
        bitmap.grow(capacity)?;
        Ok(bitmap)
    }

    /// Whether there can be such a bitmap; errors as [`new`](Self::new).
    pub fn check(capacity: u64, granularity_bits: u32) -> Result<()> {
        if !(9..=31).contains(&granularity_bits) {
            let story =
                format!("a dirty bitmap's granularity is 2^9 to 2^31 bytes, not 2^{granularity_bits}");
            return Err(Error::new(ErrorKind::InvalidInput, story));
        }
        match capacity.div_ceil(1 << granularity_bits).div_ceil(WORD_BITS) * 8 > MAX_BYTES {
            false => Ok(()),
            true => {
                let story =
                    "a dirty bitmap of this disk needs a larger granularity: it would take more than 512 MiB";
                Err(Error::new(ErrorKind::InvalidInput, story))
            }
        }
    }

    /// Log2 of the bytes that one bit speaks for.
    pub fn granularity_bits(&self) -> u32 {
        self.granularity_bits
    }

    /// The bytes of the disk.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    /// How many bytes its bits take, the last of which may have some to spare.
    pub fn byte_len(&self) -> u64 {
        self.granules(self.capacity()).div_ceil(8)
    }

    /// The disk has become larger; what is new is clean. Not for two threads at once. Errors as [`new`](Self::new), and
    /// then nothing has changed.
    pub fn grow(&self, capacity: u64) -> Result<()> {
        Self::check(capacity, self.granularity_bits)?;
        let words = self.granules(capacity).div_ceil(WORD_BITS);
        let there: u64 = self.words().map(|part| part.len() as u64).sum();
        if words > there {
            let more = (words - there).max(there.min(MAX_BYTES / 8 - there));
            let part = (0..more).map(|_| AtomicU64::new(0)).collect();
            let free = self.parts.iter().find(|part| part.get().is_none());
            free.map(|slot| slot.set(part))
                .ok_or_else(|| Error::new(ErrorKind::NoSpace, "the dirty bitmap grew too often"))?
                .map_err(|_| Error::new(ErrorKind::Busy, "the dirty bitmap is grown by another"))?;
        }
        self.capacity.fetch_max(capacity, Ordering::Release);
        Ok(())
    }

    /// `range` was, or is about to be, written. What of it is past the end of the disk is left out.
    pub fn mark(&self, range: ByteRange) {
        let end = range.end().min(self.capacity());
        if range.offset >= end {
            return;
        }
        let (first, last) = (range.offset >> self.granularity_bits, (end - 1) >> self.granularity_bits);
        for word in first / WORD_BITS..=last / WORD_BITS {
            let (from, to) = (word * WORD_BITS, word * WORD_BITS + WORD_BITS - 1);
            let mask = u64::MAX << (first.max(from) - from) & u64::MAX >> (to - last.min(to));
            if let Some(bits) = self.word(word) {
                // Most granules that are written are so again and again: looking first keeps the line shared.
                if bits.load(Ordering::Relaxed) & mask != mask {
                    bits.fetch_or(mask, Ordering::Relaxed);
                }
            }
        }
    }

    /// The first run of marked granules that begins in `range`, cut to it; `None` if nothing of it is marked.
    pub fn next_dirty(&self, range: ByteRange) -> Option<ByteRange> {
        let end = range.end().min(self.capacity());
        if range.offset >= end {
            return None;
        }
        let bits = self.granularity_bits;
        let last = end.div_ceil(1 << bits);
        let start = self.find(range.offset >> bits, last, true)?;
        let stop = self.find(start, last, false).unwrap_or(last);
        let offset = (start << bits).max(range.offset);
        Some(ByteRange { offset, len: (stop << bits).min(end) - offset })
    }

    /// How many bytes of the disk are marked.
    pub fn dirty_bytes(&self) -> u64 {
        let set: u64 =
            self.words().flatten().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum();
        (set << self.granularity_bits).min(self.capacity())
    }

    /// Fills `out` with the bitmap's bytes from byte `at` on; zeroes past its end.
    pub fn read_bytes(&self, at: u64, out: &mut [u8]) {
        for (index, byte) in out.iter_mut().enumerate() {
            let at = at + index as u64;
            let word = self.word(at / 8).map_or(0, |word| word.load(Ordering::Relaxed));
            *byte = word.to_le_bytes()[(at % 8) as usize];
        }
    }

    /// Marks what is set in `bytes`, which are a bitmap's from byte `at` on. Bits past the end of the disk are left out.
    pub fn merge_bytes(&self, at: u64, bytes: &[u8]) {
        let granules = self.granules(self.capacity());
        for (index, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            let at = at + index as u64;
            let known = granules.saturating_sub(at * 8).min(8);
            let byte = byte & (0xff_u16 >> (8 - known)) as u8;
            if let Some(word) = self.word(at / 8) {
                word.fetch_or(u64::from(byte) << (at % 8 * 8), Ordering::Relaxed);
            }
        }
    }

    fn granules(&self, capacity: u64) -> u64 {
        capacity.div_ceil(1 << self.granularity_bits)
    }

    fn words(&self) -> impl Iterator<Item = &[AtomicU64]> {
        self.parts.iter().map_while(|part| part.get().map(|words| &**words))
    }

    fn word(&self, mut index: u64) -> Option<&AtomicU64> {
        for part in self.words() {
            match part.get(index as usize) {
                Some(word) => return Some(word),
                None => index -= part.len() as u64,
            }
        }
        None
    }

    /// The first granule in `from..to` that is marked, or that is not.
    fn find(&self, from: u64, to: u64, marked: bool) -> Option<u64> {
        let mut at = from;
        while at < to {
            let word = self.word(at / WORD_BITS)?.load(Ordering::Relaxed);
            let wanted = (if marked { word } else { !word }) >> (at % WORD_BITS);
            if wanted != 0 {
                return Some(at + u64::from(wanted.trailing_zeros())).filter(|found| *found < to);
            }
            at = (at / WORD_BITS + 1) * WORD_BITS;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange { offset, len }
    }

    fn runs(bitmap: &DirtyBitmap, all: ByteRange) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        let mut offset = all.offset;
        while let Some(run) = bitmap.next_dirty(range(offset, all.end() - offset)) {
            found.push((run.offset, run.len));
            offset = run.end();
        }
        found
    }

    #[test]
    fn what_was_marked_is_found_in_whole_granules() {
        let bitmap = DirtyBitmap::new(100 * 65536 + 1, 16).unwrap();
        let all = range(0, 101 * 65536);
        assert_eq!(runs(&bitmap, all), []);
        bitmap.mark(range(65535, 2));
        bitmap.mark(range(63 * 65536, 2 * 65536));
        bitmap.mark(range(100 * 65536, 1000));
        bitmap.mark(range(200 * 65536, 1));
        bitmap.mark(range(5, 0));
        assert_eq!(runs(&bitmap, all), [(0, 131_072), (63 * 65536, 131_072), (100 * 65536, 1)]);
        assert_eq!(runs(&bitmap, range(70_000, 10)), [(70_000, 10)]);
        assert_eq!(bitmap.dirty_bytes(), 5 * 65536);
        assert_eq!(bitmap.byte_len(), 13);
    }

    #[test]
    fn bytes_are_as_qemu_has_them_and_bits_past_the_end_are_left_out() {
        let bitmap = DirtyBitmap::new(12 * 512, 9).unwrap();
        bitmap.mark(range(512, 1));
        bitmap.mark(range(9 * 512, 512));
        let mut bytes = [9; 4];
        bitmap.read_bytes(0, &mut bytes);
        assert_eq!(bytes, [2, 2, 0, 0]);
        let other = DirtyBitmap::new(12 * 512, 9).unwrap();
        other.merge_bytes(1, &[0xff, 0xff]);
        assert_eq!(runs(&other, range(0, 1 << 20)), [(8 * 512, 4 * 512)]);
    }

    #[test]
    fn it_grows_while_it_keeps_what_it_has() {
        let bitmap = DirtyBitmap::new(1000, 9).unwrap();
        bitmap.mark(range(999, 1));
        let mut expected = vec![(512, 488)];
        for step in 1..12_u64 {
            let capacity = 1000 << step;
            bitmap.grow(capacity).unwrap();
            bitmap.mark(range(capacity - 1, 1));
            let last = (capacity - 1) / 512 * 512;
            expected.push((last, capacity - last));
            if step == 1 {
                expected[0].1 = 512;
            }
            let found = runs(&bitmap, range(0, capacity));
            assert_eq!((found.len(), found.last()), (expected.len(), expected.last()), "{step}");
        }
        assert_eq!(bitmap.capacity(), 1000 << 11);
    }

    #[test]
    fn memory_is_bounded() {
        for (capacity, bits) in [(1 << 30, 8), (1 << 30, 32), (1 << 42, 9), (u64::MAX, 31)] {
            let error = DirtyBitmap::new(capacity, bits).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{capacity} {bits}");
        }
        let bitmap = DirtyBitmap::new(1 << 20, 9).unwrap();
        assert_eq!(bitmap.grow(1 << 50).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(bitmap.capacity(), 1 << 20);
    }

    #[test]
    fn marks_of_many_threads_are_all_kept() {
        let bitmap = DirtyBitmap::new(1 << 20, 9).unwrap();
        std::thread::scope(|scope| {
            for first in 0..4 {
                let bitmap = &bitmap;
                scope.spawn(move || (first..2048).step_by(4).for_each(|n| bitmap.mark(range(n * 512, 512))));
            }
        });
        assert_eq!(runs(&bitmap, range(0, 1 << 20)), [(0, 1 << 20)]);
    }
}
