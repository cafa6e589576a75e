//! Compressed clusters: where one's bytes are, what they say, and how they are made. Pure, nothing here does I/O.

use block::{Error, ErrorKind, Result};
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use crate::entry::{COMPRESSED, Geometry};

/// How an image's compressed clusters are compressed: all of them alike.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Compression {
    /// Raw deflate without a header (QEMU calls it `zlib`, and writes it with a window of 4 KiB).
    #[default]
    Deflate,
    /// One zstd frame.
    Zstd,
}

/// The unit in which a descriptor gives the length, in bytes.
const SECTOR: u64 = 512;

/// Log2 of deflate's window in bytes: QEMU decompresses with no larger one.
const WINDOW_BITS: u8 = 12;

/// Where a compressed cluster's bytes are in the image file: aligned to nothing at its start, and up to the end of a
/// sector. What follows the compressed data in its last sector may belong to another cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Packed {
    /// The first byte's offset in the file.
    pub(crate) offset: u64,
    /// How many bytes, at most twice a cluster. The file may end before them, within the last sector.
    pub(crate) len: u64,
}

impl Packed {
    /// Decodes the descriptor of an L2 entry's word whose bit 62 is set ("Compressed Clusters Descriptor"). That it
    /// lies inside the file is the caller's to check.
    pub(crate) fn decode(geometry: Geometry, word: u64) -> Result<Self> {
        // "x = 62 - (cluster_bits - 8)": the offset is below bit x, the number of additional sectors from it on.
        let split = 62 - (geometry.cluster_bits - 8);
        let offset = word & ((1 << split) - 1);
        let more_sectors = (word & !(3 << 62)) >> split;
        if word >> 63 != 0 {
            return Err(corrupt("a compressed cluster is marked as one that may be written in place"));
        }
        if offset >> 56 != 0 {
            return Err(corrupt("a compressed cluster's offset has reserved bits set"));
        }
        Ok(Self { offset, len: (more_sectors + 1) * SECTOR - offset % SECTOR })
    }

    /// The descriptor of `len` bytes at `offset`, fewer than a cluster has, as an L2 entry's word. `None` if no word can say
    /// where they are.
    pub(crate) fn encode(geometry: Geometry, offset: u64, len: u64) -> Option<u64> {
        let split = 62 - (geometry.cluster_bits - 8);
        let more_sectors = (offset + len - 1) / SECTOR - offset / SECTOR;
        (offset >> split.min(56) == 0).then_some(COMPRESSED | more_sectors << split | offset)
    }

    /// The first host cluster that holds some of its bytes, and how many do: each counts one reference.
    pub(crate) fn clusters(self, geometry: Geometry) -> (u64, u64) {
        let first = self.offset >> geometry.cluster_bits;
        let last = (self.offset + self.len - 1) >> geometry.cluster_bits;
        (first, last - first + 1)
    }
}

/// Decompresses `packed` into `out`, which is one cluster. It must fill it exactly: what yields less, what would yield
/// more, and what is no compressed data at all is [`ErrorKind::Corrupt`]. Bytes behind the end of the data are ignored.
///
/// Bounded: no more than `out` is ever produced, and a fixed amount of memory is taken beside it.
pub(crate) fn decompress(compression: Compression, packed: &[u8], out: &mut [u8]) -> Result<()> {
    match compression {
        Compression::Deflate => inflate(packed, out),
        Compression::Zstd => unzstd(packed, out),
    }
}

fn inflate(packed: &[u8], out: &mut [u8]) -> Result<()> {
    let mut stream = Decompress::new(false);
    // One byte more than a cluster shows whether there would be more.
    let mut spare = [0];
    loop {
        let (read, written) = (stream.total_in() as usize, stream.total_out() as usize);
        let input = packed.get(read..).unwrap_or(&[]);
        let target = out.get_mut(written..).filter(|rest| !rest.is_empty()).unwrap_or(&mut spare);
        let status = stream.decompress(input, target, FlushDecompress::None);
        let status = status.map_err(|_| corrupt("a compressed cluster is not deflate data"))?;
        let done = stream.total_out() as usize;
        if done > out.len() {
            return Err(grows());
        }
        let stuck = stream.total_in() as usize == read && done == written;
        if status == Status::StreamEnd || stuck {
            return if done == out.len() { Ok(()) } else { Err(short()) };
        }
    }
}

fn unzstd(packed: &[u8], out: &mut [u8]) -> Result<()> {
    let frame = zstd_safe::find_frame_compressed_size(packed).ok().and_then(|len| packed.get(..len));
    let frame = frame.ok_or_else(|| corrupt("a compressed cluster is not zstd data"))?;
    match zstd_safe::decompress(out, frame) {
        Ok(done) if done == out.len() => Ok(()),
        Ok(_) => Err(short()),
        Err(code) => Err(corrupt(format!("a compressed cluster: {}", zstd_safe::get_error_name(code)))),
    }
}

/// Compresses a whole cluster. `None` if that makes it no smaller.
pub(crate) fn compress(compression: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    // Room for one byte less: what does not fit is not smaller.
    let mut out = vec![0; cluster.len().checked_sub(1)?];
    let len = match compression {
        Compression::Deflate => {
            let mut stream =
                Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            let status = stream.compress(cluster, &mut out, FlushCompress::Finish).ok()?;
            (status == Status::StreamEnd).then_some(stream.total_out() as usize)?
        }
        Compression::Zstd => zstd_safe::compress(&mut out[..], cluster, zstd_safe::CLEVEL_DEFAULT).ok()?,
    };
    out.truncate(len);
    Some(out)
}

fn grows() -> Error {
    corrupt("a compressed cluster decompresses to more than a cluster")
}

fn short() -> Error {
    corrupt("a compressed cluster decompresses to less than a cluster")
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, FlushCompress};

    use super::*;

    const CLUSTER: usize = 65536;

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(2 * bytes.len() + 100);
        let mut stream = Compress::new(flate2::Compression::default(), false);
        stream.compress_vec(bytes, &mut out, FlushCompress::Finish).unwrap();
        out
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![0; zstd_safe::compress_bound(bytes.len())];
        let len = zstd_safe::compress(&mut out[..], bytes, 3).unwrap();
        out.truncate(len);
        out
    }

    fn kind(compression: Compression, packed: &[u8]) -> ErrorKind {
        decompress(compression, packed, &mut vec![0; CLUSTER]).unwrap_err().kind()
    }

    #[test]
    fn a_cluster_comes_back_whatever_follows_it_in_its_last_sector() {
        let bytes: Vec<u8> = (0..CLUSTER).map(|at| (at * at / 977) as u8).collect();
        for (compression, mut packed) in
            [(Compression::Deflate, deflate(&bytes)), (Compression::Zstd, zstd(&bytes))]
        {
            for tail in [0, 1, 511] {
                packed.extend(vec![0xa5; tail]);
                let mut out = vec![0; CLUSTER];
                decompress(compression, &packed, &mut out).unwrap();
                assert!(out == bytes, "{compression:?} {tail}");
            }
        }
    }

    #[test]
    fn what_does_not_fill_a_cluster_exactly_is_refused() {
        for (compression, pack) in
            [(Compression::Deflate, deflate as fn(&[u8]) -> Vec<u8>), (Compression::Zstd, zstd)]
        {
            for len in [0, 1, CLUSTER - 1, CLUSTER + 1, 100 * CLUSTER] {
                assert_eq!(
                    kind(compression, &pack(&vec![7; len])),
                    ErrorKind::Corrupt,
                    "{compression:?} {len}"
                );
            }
            let whole = pack(&(0..CLUSTER).map(|at| (at * at / 977) as u8).collect::<Vec<u8>>());
            for len in [0, 1, 4, whole.len() / 2] {
                assert_eq!(
                    kind(compression, &whole[..len]),
                    ErrorKind::Corrupt,
                    "{compression:?} cut to {len}"
                );
            }
            for fill in [0, 0x55, 0xff] {
                assert_eq!(kind(compression, &[fill; 4096]), ErrorKind::Corrupt);
            }
        }
    }

    #[test]
    fn descriptors_are_split_where_the_cluster_size_says() {
        for bits in 9..=21 {
            let geometry = Geometry::new(1 << 30, bits, false);
            let split = 62 - (bits - 8);
            let word = |offset: u64, more: u64| 1 << 62 | more << split | offset;
            let at = |offset, more| Packed::decode(geometry, word(offset, more)).unwrap();
            assert_eq!(at(0x1234, 0), Packed { offset: 0x1234, len: 512 - 0x34 });
            let most = (1 << (bits - 8)) - 1;
            assert_eq!(at(512, most), Packed { offset: 512, len: 2 << bits });
            assert_eq!(at((1 << bits) - 1, 1).clusters(geometry), (0, 2));
            assert_eq!(at(0, 0).clusters(geometry), (0, 1));
            let copied = Packed::decode(geometry, 1 << 63 | word(512, 0));
            assert_eq!(copied.unwrap_err().kind(), ErrorKind::Corrupt);
            if split > 56 {
                let reserved = Packed::decode(geometry, word(1 << 56, 0));
                assert_eq!(reserved.unwrap_err().kind(), ErrorKind::Corrupt);
            }
        }
    }
}
