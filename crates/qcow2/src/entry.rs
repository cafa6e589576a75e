//! L2 entries and the arithmetic around them: pure, nothing here does I/O.

use std::ops::Range;

use block::{ByteRange, Error, ErrorKind, Result};

use crate::bytes::be64;

/// A cluster's index in the guest's disk.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct GuestCluster(pub(crate) u64);

/// A position in the image file, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct HostOffset(pub(crate) u64);

/// "Bit 9 - 55: Bits 9-55 of host cluster offset."
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// "Bit 63: set if the refcount of this cluster is exactly one": it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// "Bit 62: set for compressed clusters."
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// In standard entries, "bit 0: if set, the cluster reads as all zeroes".
const ALL_ZEROES: u64 = 1;

/// Entries of a table that are read and kept together take at most so many bytes of it.
const SLICE_BYTES: u64 = 4096;

/// The sizes of an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) capacity: u64,
    pub(crate) cluster_bits: u32,
    pub(crate) extended: bool,
    /// Whether an entry can say "reads as zeroes": not in version 2.
    pub(crate) zero_flag: bool,
    /// Whether the guest's clusters are in a file of their own, each where the guest has it.
    pub(crate) external: bool,
}

impl Geometry {
    /// An image of version 3 that holds its data itself.
    pub(crate) fn new(capacity: u64, cluster_bits: u32, extended: bool) -> Self {
        Self { capacity, cluster_bits, extended, zero_flag: true, external: false }
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

    /// Entries of one slice: a power of two, and as many make up a table.
    pub(crate) fn entries_per_slice(self) -> u64 {
        self.cluster_size().min(SLICE_BYTES) / self.entry_size()
    }

    /// All subclusters of a cluster.
    pub(crate) fn all(self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
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

    /// The first byte of `cluster` in the disk.
    pub(crate) fn start_of(self, cluster: GuestCluster) -> u64 {
        cluster.0 << self.cluster_bits
    }

    /// Which slice of all tables has the entry of `cluster`, and where in it.
    pub(crate) fn slice_of(self, cluster: GuestCluster) -> (u64, usize) {
        let entries = self.entries_per_slice();
        (cluster.0 / entries, (cluster.0 % entries) as usize)
    }

    /// The clusters that `slice` maps.
    pub(crate) fn slice_clusters(self, slice: u64) -> Range<GuestCluster> {
        let entries = self.entries_per_slice();
        GuestCluster(slice * entries)..GuestCluster((slice + 1) * entries)
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

    /// The state once `subclusters` read as zeroes.
    pub(crate) fn with_zeroed(self, subclusters: u32) -> Self {
        Self::new(self.allocated() & !subclusters, self.zero() | subclusters)
    }
}

/// Where a guest cluster is: the first word of an L2 entry, but for the zero flag of standard entries.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Home(pub(crate) u64);

impl Home {
    /// The host cluster at `offset`, which nothing else names.
    pub(crate) fn own(offset: HostOffset) -> Self {
        Self(offset.0 | COPIED)
    }

    pub(crate) fn is_none(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }

    /// Whether it is a host cluster that nothing else names, so that it may be written where it is.
    pub(crate) fn is_own(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Where the host cluster begins; `None` if there is none, or the guest's cluster is compressed.
    pub(crate) fn offset(self) -> Option<HostOffset> {
        (!self.is_none() && !self.is_compressed()).then_some(HostOffset(self.0 & OFFSET))
    }
}

/// An L2 entry: what an image knows of one guest cluster.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Entry {
    pub(crate) home: Home,
    pub(crate) state: State,
}

impl Entry {
    /// Decodes the L2 entry at the start of `bytes` and checks it against the format. That it lies inside the file is
    /// the caller's to check.
    pub(crate) fn decode(geometry: Geometry, bytes: &[u8]) -> Result<Self> {
        let corrupt = |what: &str| Err(Error::new(ErrorKind::Corrupt, what));
        let word = be64(bytes, 0);
        if word & COMPRESSED != 0 {
            if geometry.external {
                return corrupt("a compressed cluster in an image whose data is in another file");
            }
            // Its descriptor has another form, checked by who reads it. Its bitmap is not used.
            return Ok(Self { home: Home(word), state: State::new(geometry.all(), 0) });
        }
        let standard_zero = !geometry.extended && word & ALL_ZEROES != 0;
        // "An offset of 0 is the first guest cluster's in an external data file, if bit 63 is set."
        let placed = word & OFFSET != 0 || (geometry.external && word & COPIED != 0);
        let state = match geometry.extended {
            true => State(be64(bytes, 8)),
            false if standard_zero => State::new(0, 1),
            false => State::new(u32::from(placed), 0),
        };
        let known = OFFSET | COPIED | if geometry.extended { 0 } else { ALL_ZEROES };
        if word & !known != 0 || (standard_zero && !geometry.zero_flag) {
            return corrupt("an L2 entry has reserved bits set");
        }
        if !geometry.is_aligned(word & OFFSET) {
            return corrupt("an L2 entry points into the middle of a cluster");
        }
        if !state.is_valid() || (state.allocated() != 0 && !placed) {
            return corrupt("an L2 entry contradicts itself");
        }
        Ok(Self { home: if placed { Home(word & (OFFSET | COPIED)) } else { Home::default() }, state })
    }

    /// Appends the L2 entry to `out` as it is on disk.
    pub(crate) fn encode(self, geometry: Geometry, out: &mut Vec<u8>) {
        let Self { home: Home(word), state } = self;
        if geometry.extended {
            out.extend(word.to_be_bytes());
            let bitmap = if self.home.is_compressed() { 0 } else { state.0 };
            out.extend(bitmap.to_be_bytes());
        } else {
            out.extend((word | if state.zero() != 0 { ALL_ZEROES } else { 0 }).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENDED: Geometry =
        Geometry { capacity: 1 << 30, cluster_bits: 17, extended: true, zero_flag: true, external: false };
    const STANDARD: Geometry = Geometry { cluster_bits: 16, extended: false, ..EXTENDED };

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
            let all = geometry.all();
            let (own, shared) = (Home::own(HostOffset(9 << 17)), Home(9 << 17));
            for (home, state) in [
                (Home::default(), State::default()),
                (Home::default(), State::new(0, 1)),
                (own, State::new(0, 1)),
                (own, State::new(1, 0)),
                (shared, State::new(1, 0)),
                (Home(COMPRESSED | 77), State::new(all, 0)),
            ] {
                let (entry, mut bytes) = (Entry { home, state }, Vec::new());
                entry.encode(geometry, &mut bytes);
                assert_eq!(bytes.len() as u64, geometry.entry_size());
                assert_eq!(Entry::decode(geometry, &bytes).unwrap(), entry);
            }
        }
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
            let error = Entry::decode(EXTENDED, &bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{word:#x} {bitmap:#x}");
        }
        let version_2 = Geometry { zero_flag: false, ..STANDARD };
        assert!(Entry::decode(version_2, &1_u64.to_be_bytes()).is_err());
    }

    #[test]
    fn the_first_cluster_of_an_external_file_is_at_zero() {
        let external = Geometry { external: true, ..STANDARD };
        let entry = Entry::decode(external, &COPIED.to_be_bytes()).unwrap();
        assert_eq!((entry.home.offset(), entry.state), (Some(HostOffset(0)), State::new(1, 0)));
        assert_eq!(Entry::decode(external, &[0; 8]).unwrap(), Entry::default());
        assert_eq!(Entry::decode(STANDARD, &COPIED.to_be_bytes()).unwrap(), Entry::default());
        assert!(Entry::decode(external, &COMPRESSED.to_be_bytes()).is_err());
    }
}
