//! L2 entries and the arithmetic around them: pure, nothing here does I/O.

use block::{ByteRange, Error, ErrorKind, Result};

use crate::bytes::be64;

/// A cluster's index in the guest's disk.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct GuestCluster(pub(crate) u64);

/// A position in the image file, in bytes.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct HostOffset(pub(crate) u64);

/// "Bit 9 - 55: Bits 9-55 of host cluster offset."
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// "Bit 63: set if the refcount of this cluster is exactly one": it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// "Bit 62: set for compressed clusters."
const COMPRESSED: u64 = 1 << 62;
/// In standard entries, "bit 0: if set, the cluster reads as all zeroes".
const ALL_ZEROES: u64 = 1;
/// In RAM only: the host cluster was assigned since the last flush that published it, so nothing on disk names it
/// and its refcount there is zero. The bit is free in both formats' RAM form.
const FRESH: u64 = 1;

/// The sizes of an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) capacity: u64,
    pub(crate) cluster_bits: u32,
    pub(crate) extended: bool,
}

impl Geometry {
    pub(crate) fn new(capacity: u64, cluster_bits: u32, extended: bool) -> Self {
        Self { capacity, cluster_bits, extended }
    }

    pub(crate) fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Log2 of the bytes that one pair of state bits speaks for: a subcluster, or all of a standard cluster.
    pub(crate) fn subcluster_bits(self) -> u32 {
        self.cluster_bits - if self.extended { 5 } else { 0 }
    }

    pub(crate) fn subcluster_size(self) -> u64 {
        1 << self.subcluster_bits()
    }

    pub(crate) fn entry_size(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    pub(crate) fn entries_per_table(self) -> u64 {
        self.cluster_size() / self.entry_size()
    }

    /// Refcounts of 16 bits in one refcount block.
    pub(crate) fn refcounts_per_block(self) -> u64 {
        self.cluster_size() / 2
    }

    pub(crate) fn clusters(self) -> u64 {
        self.capacity.div_ceil(self.cluster_size())
    }

    /// L2 tables needed to map the whole disk, which is the least length of the L1 table.
    pub(crate) fn tables(self) -> u64 {
        self.clusters().div_ceil(self.entries_per_table())
    }

    pub(crate) fn is_aligned(self, offset: u64) -> bool {
        offset.is_multiple_of(self.cluster_size())
    }

    pub(crate) fn cluster_at(self, offset: u64) -> GuestCluster {
        GuestCluster(offset >> self.cluster_bits)
    }

    /// Which L2 table maps `cluster`, and which of its entries.
    pub(crate) fn position(self, cluster: GuestCluster) -> (usize, usize) {
        let entries = self.entries_per_table();
        ((cluster.0 / entries) as usize, (cluster.0 % entries) as usize)
    }

    /// `range` cut at the ends of clusters, each piece with its cluster.
    pub(crate) fn pieces(self, range: ByteRange) -> impl Iterator<Item = (GuestCluster, ByteRange)> {
        let mut offset = range.offset;
        std::iter::from_fn(move || {
            if offset >= range.end() {
                return None;
            }
            let end = ((offset >> self.cluster_bits) + 1) << self.cluster_bits;
            let piece = ByteRange { offset, len: end.min(range.end()) - offset };
            offset = piece.end();
            Some((self.cluster_at(piece.offset), piece))
        })
    }

    /// Which subclusters `piece`, a range inside one cluster, touches, and which of them it covers wholly.
    pub(crate) fn masks(self, piece: ByteRange) -> Masks {
        let bits = self.subcluster_bits();
        let inside = piece.offset & (self.cluster_size() - 1);
        let end = inside + piece.len;
        let touched = mask(inside >> bits, end.div_ceil(1 << bits));
        let covered = mask(inside.div_ceil(1 << bits), end >> bits);
        Masks { touched, covered }
    }
}

/// Sets of subclusters of one cluster: bit `n` for the `n`th.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Masks {
    pub(crate) touched: u32,
    pub(crate) covered: u32,
}

/// The bits `from..to`, both at most 32; none if `from >= to`.
fn mask(from: u64, to: u64) -> u32 {
    let below = |n: u64| ((1_u64 << n) - 1) as u32;
    below(to) & !below(from)
}

/// What is known of a cluster's subclusters, as in the bitmap of an extended entry: allocated in bits 0 to 31, reads
/// as zeroes in bits 32 to 63. A standard cluster is one subcluster. Never both bits; neither is "not in this layer".
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct State(pub(crate) u64);

impl State {
    pub(crate) fn new(allocated: u32, zero: u32) -> Self {
        Self((u64::from(zero) << 32) | u64::from(allocated))
    }

    pub(crate) fn allocated(self) -> u32 {
        self.0 as u32
    }

    pub(crate) fn zero(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub(crate) fn is_valid(self) -> bool {
        self.allocated() & self.zero() == 0
    }

    /// The state once `subclusters` hold data.
    pub(crate) fn with_allocated(self, subclusters: u32) -> Self {
        Self::new(self.allocated() | subclusters, self.zero() & !subclusters)
    }

    /// The state once `subclusters` read as zeroes, but for those that hold data: they stay as they are.
    pub(crate) fn with_zero(self, subclusters: u32) -> Self {
        Self::new(self.allocated(), self.zero() | (subclusters & !self.allocated()))
    }

    /// The later of two states of one cluster. States only go forward, absent to zero to allocated, so their order
    /// need not be known.
    pub(crate) fn join(self, other: Self) -> Self {
        self.with_allocated(other.allocated()).with_zero(other.zero())
    }
}

/// Where a guest cluster is in the image file: the first word of an L2 entry, as kept in RAM.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Home(pub(crate) u64);

impl Home {
    /// A host cluster assigned now, of which nothing on disk knows.
    pub(crate) fn fresh(at: HostOffset) -> Self {
        Self(at.0 | FRESH)
    }

    pub(crate) fn is_none(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn is_fresh(self) -> bool {
        self.0 & FRESH != 0
    }

    /// The same home once tables and refcounts on disk name it.
    pub(crate) fn settled(self) -> Self {
        Self(self.offset_bits() | COPIED)
    }

    fn offset_bits(self) -> u64 {
        self.0 & OFFSET
    }

    /// Where the cluster begins in the file. Errors for compressed ones, which are not clusters of a file.
    pub(crate) fn offset(self) -> Result<HostOffset> {
        if self.0 & COMPRESSED != 0 {
            return Err(Error::new(ErrorKind::Unsupported, "compressed qcow2 clusters"));
        }
        Ok(HostOffset(self.offset_bits()))
    }

    /// As [`offset`](Self::offset), for writing in place: the cluster must not be shared.
    pub(crate) fn writable_offset(self) -> Result<HostOffset> {
        let offset = self.offset()?;
        if self.0 & (COPIED | FRESH) == 0 {
            return Err(Error::new(ErrorKind::Corrupt, "a cluster is shared though there are no snapshots"));
        }
        Ok(offset)
    }
}

/// Decodes the L2 entry at the start of `bytes` and checks it against the format. That it lies inside the file is the
/// caller's to check.
pub(crate) fn decode(geometry: Geometry, bytes: &[u8]) -> Result<(Home, State)> {
    let corrupt = |what: &str| Err(Error::new(ErrorKind::Corrupt, what));
    let word = be64(bytes, 0);
    let all = if geometry.extended { u32::MAX } else { 1 };
    if word & COMPRESSED != 0 {
        // Its descriptor has another form. Kept so that only those who meet it are refused.
        return Ok((Home(COMPRESSED), State::new(all, 0)));
    }
    let state = match geometry.extended {
        true => State(be64(bytes, 8)),
        false if word & ALL_ZEROES != 0 => State::new(0, 1),
        false => State::new(u32::from(word & OFFSET != 0), 0),
    };
    let known = OFFSET | COPIED | if geometry.extended { 0 } else { ALL_ZEROES };
    let home = Home(word & (OFFSET | COPIED));
    if word & !known != 0 {
        return corrupt("an L2 entry has reserved bits set");
    }
    if !geometry.is_aligned(word & OFFSET) {
        return corrupt("an L2 entry points into the middle of a cluster");
    }
    if !state.is_valid() || (state.allocated() != 0 && word & OFFSET == 0) {
        return corrupt("an L2 entry contradicts itself");
    }
    Ok((if home.offset_bits() == 0 { Home::default() } else { home }, state))
}

/// Appends the L2 entry to `out` as it is on disk. A fresh home is named only if data was published in it: so a write
/// that never came to its end leaves no trace, neither a mapping nor a refcount.
pub(crate) fn encode(geometry: Geometry, home: Home, state: State, out: &mut Vec<u8>) {
    let named = !home.is_none() && (state.allocated() != 0 || !home.is_fresh());
    let word = if named { home.settled().0 } else { 0 };
    if geometry.extended {
        out.extend(word.to_be_bytes());
        out.extend(state.0.to_be_bytes());
    } else {
        out.extend((word | if state.zero() != 0 { ALL_ZEROES } else { 0 }).to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENDED: Geometry = Geometry { capacity: 1 << 30, cluster_bits: 17, extended: true };
    const STANDARD: Geometry = Geometry { capacity: 1 << 30, cluster_bits: 16, extended: false };

    #[test]
    fn masks_tell_touched_from_covered() {
        let masks = |offset, len| EXTENDED.masks(ByteRange { offset, len });
        assert_eq!(masks(0, 4096), Masks { touched: 1, covered: 1 });
        assert_eq!(masks(512, 4096), Masks { touched: 3, covered: 0 });
        assert_eq!(masks((7 << 17) + 4096, 9000), Masks { touched: 0b1110, covered: 0b0110 });
        assert_eq!(masks(1 << 17, 1 << 17), Masks { touched: u32::MAX, covered: u32::MAX });
        assert_eq!(STANDARD.masks(ByteRange { offset: 0, len: 65535 }), Masks { touched: 1, covered: 0 });
    }

    #[test]
    fn entries_come_back_from_their_bytes() {
        for geometry in [EXTENDED, STANDARD] {
            let settled = Home((geometry.cluster_size() * 9) | COPIED);
            for (home, state) in [
                (Home::default(), State::default()),
                (Home::default(), State::new(0, 1)),
                (settled, State::new(0, 1)),
                (settled, State::new(1, 0)),
            ] {
                let mut bytes = Vec::new();
                encode(geometry, home, state, &mut bytes);
                assert_eq!(bytes.len() as u64, geometry.entry_size());
                assert_eq!(decode(geometry, &bytes).unwrap(), (home, state));
            }
        }
    }

    #[test]
    fn a_fresh_home_is_named_only_with_data_in_it() {
        let fresh = Home::fresh(HostOffset(5 << 17));
        let mut bytes = Vec::new();
        encode(EXTENDED, fresh, State::new(0, 1), &mut bytes);
        assert_eq!(decode(EXTENDED, &bytes).unwrap(), (Home::default(), State::new(0, 1)));
        bytes.clear();
        encode(EXTENDED, fresh, State::new(2, 1), &mut bytes);
        assert_eq!(decode(EXTENDED, &bytes).unwrap(), (fresh.settled(), State::new(2, 1)));
    }

    #[test]
    fn contradictions_are_refused() {
        for (word, bitmap) in [
            (9 << 17 | 2, 0),           // reserved bit
            (9 << 17 | 1, 0),           // the zero flag of standard entries
            ((9 << 17) + 512, 1),       // not aligned
            (0, 1),                     // data nowhere
            (9 << 17, 1 | 1 << 32_u64), // both data and zeroes
        ] {
            let bytes = [u64::to_be_bytes(word), u64::to_be_bytes(bitmap)].concat();
            assert_eq!(
                decode(EXTENDED, &bytes).unwrap_err().kind(),
                ErrorKind::Corrupt,
                "{word:#x} {bitmap:#x}"
            );
        }
        let (home, _) = decode(STANDARD, &(COMPRESSED | 77).to_be_bytes()).unwrap();
        assert_eq!(home.offset().unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn states_only_go_forward() {
        let (zero, data) = (State::new(0, 7), State::new(2, 0));
        assert_eq!(zero.join(data), State::new(2, 5));
        assert_eq!(data.join(zero), State::new(2, 5));
    }
}
