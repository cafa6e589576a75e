use crate::ByteRange;

/// A small generator (splitmix64): the same numbers for the same seed. Anybody may look into it: the seed is all its state.
#[derive(Clone, Copy, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 if that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound.max(1)
    }

    /// True one time in `count`.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Bytes of a disk of `capacity`, which is not zero: mostly few, half of the time whole sectors.
    pub fn range(&mut self, capacity: u64) -> ByteRange {
        let longest = self.pick(&[512, 4096, 20_000, 300_000]);
        let mut offset = self.below(capacity);
        let mut len = 1 + self.below(longest);
        if self.one_in(2) {
            (offset, len) = (offset / 512 * 512, len.next_multiple_of(512));
        }
        ByteRange { offset, len: len.min(capacity - offset) }
    }
}
