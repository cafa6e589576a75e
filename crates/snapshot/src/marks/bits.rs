//! Bits files: which parts of a disk have changed, written once and never again.
//!
//! All numbers are big-endian.
//!
//! ```text
//!   0  "FRAZILM1"
//!   8  bytes of the disk, u64
//!  16  log2 of the bytes that one bit speaks for, u32
//!  20  zero, u32
//!  24  the bits, as QEMU's bitmaps have them: bit n is bit n % 8 of byte n / 8
//!   …  CRC-32 (IEEE) of all before
//! ```

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use block::{ByteRange, Context, DirtyBitmap, Error, ErrorKind, Layer, Place, Result};

const MAGIC: &[u8; 8] = b"FRAZILM1";
const HEADER: usize = 24;
const TRAILER: u64 = 4;

/// Bytes that are written or read at once.
const CHUNK: usize = 1 << 20;

/// The finest that folded changes are kept, log2: an overlay's subcluster.
const FINEST: u32 = 12;

/// Bytes that folded changes take at most, as long as the granularity allows.
const FOLDED_BYTES: u64 = 16 << 20;

/// The granularity in which changes of a disk of this size are folded, log2 of bytes: 4 KiB for disks up to 512 GiB.
pub(super) fn granularity_of(capacity: u64) -> u32 {
    let fits = |bits: &u32| capacity >> bits <= FOLDED_BYTES * 8;
    (FINEST..31).find(fits).unwrap_or(31)
}

/// Writes a new file, synced; the caller syncs its folder.
pub(super) fn write(path: &Path, bits: &DirtyBitmap) -> Result<()> {
    let what = || format!("write {}", path.display());
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).context(what)?;
    let mut crc = crc32fast::Hasher::new();
    let mut put = |bytes: &[u8]| {
        crc.update(bytes);
        file.write_all(bytes).context(what)
    };
    put(&header(bits))?;
    let (mut at, len) = (0, bits.byte_len());
    let mut buffer = vec![0; CHUNK.min(len as usize)];
    while at < len {
        let part = (len - at).min(CHUNK as u64);
        buffer.truncate(part as usize);
        bits.read_bytes(at, &mut buffer);
        put(&buffer)?;
        at += part;
    }
    let crc = crc.finalize().to_be_bytes();
    file.write_all(&crc).and_then(|()| file.sync_all()).context(what)
}

fn header(bits: &DirtyBitmap) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&bits.capacity().to_be_bytes());
    header[16..20].copy_from_slice(&bits.granularity_bits().to_be_bytes());
    header
}

/// Reads a file; takes no more memory than its header allows and its length proves.
///
/// Errors: [`ErrorKind::Corrupt`] if it is not what was written, or not there any more.
pub(crate) fn read(path: &Path) -> Result<DirtyBitmap> {
    let what = || format!("read {}", path.display());
    let mut file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::new(ErrorKind::Corrupt, format!("{} is gone", path.display())));
        }
        opened => opened.context(what)?,
    };
    let len = file.metadata().context(what)?.len();
    let damaged = |story: &str| Error::new(ErrorKind::Corrupt, story).context(what());
    let mut header = [0; HEADER];
    if len < HEADER as u64 + TRAILER {
        return Err(damaged("it is cut off"));
    }
    file.read_exact(&mut header).context(what)?;
    let (magic, rest) = header.split_at(8);
    let (capacity, rest) = rest.split_at(8);
    if magic != MAGIC {
        return Err(damaged("it is not a bits file of this version"));
    }
    let capacity = u64::from_be_bytes(capacity.try_into().unwrap_or_default());
    let granularity = rest.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
    let granules = capacity.checked_shr(granularity).unwrap_or(0);
    // Before room is made for as many.
    if granules / 8 > len {
        return Err(damaged("it is cut off"));
    }
    let bits = DirtyBitmap::new(capacity, granularity).map_err(|error| damaged(&error.to_string()))?;
    if len != HEADER as u64 + bits.byte_len() + TRAILER {
        return Err(damaged("its length is wrong"));
    }
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header);
    let mut at = 0;
    let mut buffer = vec![0; CHUNK.min(bits.byte_len() as usize)];
    while at < bits.byte_len() {
        let part = (bits.byte_len() - at).min(CHUNK as u64);
        buffer.truncate(part as usize);
        file.read_exact(&mut buffer).context(what)?;
        crc.update(&buffer);
        bits.merge_bytes(at, &buffer);
        at += part;
    }
    let mut stored = [0; TRAILER as usize];
    file.read_exact(&mut stored).context(what)?;
    match u32::from_be_bytes(stored) == crc.finalize() {
        true => Ok(bits),
        false => Err(damaged("its checksum is wrong")),
    }
}

/// The runs of what is marked.
pub(super) fn ranges(bits: &DirtyBitmap) -> impl Iterator<Item = ByteRange> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let found = bits.next_dirty(ByteRange { offset: at, len: bits.capacity().saturating_sub(at) })?;
        at = found.end();
        Some(found)
    })
}

/// Marks in `into` what is marked in `from`, as far as it is long.
pub(super) fn add(into: &DirtyBitmap, from: &DirtyBitmap) {
    ranges(from).for_each(|range| into.mark(range));
}

/// Marks what a layer holds itself, as far as the bitmap is long. `pause` is called now and then, and its error ends it.
pub(super) fn add_layer<E: From<Error>>(
    into: &DirtyBitmap,
    layer: &dyn Layer,
    pause: &mut dyn FnMut() -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let end = layer.capacity().min(into.capacity());
    let (mut offset, mut runs) = (0, 0_u32);
    while offset < end {
        let run = layer.run_at(ByteRange { offset, len: end - offset })?;
        if run.place != Place::Absent {
            into.mark(run.range);
        }
        offset = run.range.end();
        runs += 1;
        if runs.is_multiple_of(1024) {
            pause()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(capacity: u64, granularity: u32, ranges: &[(u64, u64)]) -> DirtyBitmap {
        let bits = DirtyBitmap::new(capacity, granularity).unwrap();
        ranges.iter().for_each(|(offset, len)| bits.mark(ByteRange { offset: *offset, len: *len }));
        bits
    }

    #[test]
    fn bits_come_back_as_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        for (index, (capacity, granularity)) in
            [(0, 12), (1, 12), (4096 * 8, 12), ((40 << 30) + 512, 12), (1 << 40, 31)].into_iter().enumerate()
        {
            let bits = marked(
                capacity,
                granularity,
                &[(0, 1), (capacity / 2, 70_000), (capacity.saturating_sub(1), 9)],
            );
            let path = folder.path().join(index.to_string());
            write(&path, &bits).unwrap();
            let found = read(&path).unwrap();
            assert_eq!((found.capacity(), found.granularity_bits()), (capacity, granularity));
            assert!(ranges(&found).eq(ranges(&bits)), "{capacity}");
            assert!(write(&path, &bits).is_err(), "files are written once");
        }
    }

    #[test]
    fn every_damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bits");
        write(&path, &marked(1 << 20, 12, &[(5 << 12, 1 << 14)])).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let is_refused = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::Corrupt);
        };
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            is_refused(&bytes);
        }
        (0..whole.len()).for_each(|len| is_refused(&whole[..len]));
        is_refused(&[&whole[..], &[0]].concat());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn coarser_bits_round_outward_and_shorter_ones_leave_out_what_is_past_them() {
        let fine = marked(1 << 20, 12, &[(65_536, 4096), (300_000, 1), ((1 << 20) - 1, 1)]);
        let coarse = DirtyBitmap::new(400_000, 16).unwrap();
        add(&coarse, &fine);
        let found: Vec<_> = ranges(&coarse).map(|range| (range.offset, range.len)).collect();
        assert_eq!(found, [(65_536, 65_536), (262_144, 65_536)]);
    }

    #[test]
    fn folded_changes_are_as_fine_as_fits() {
        assert_eq!(granularity_of(0), 12);
        assert_eq!(granularity_of(512 << 30), 12);
        assert_eq!(granularity_of(8 << 40), 16);
        assert_eq!(granularity_of(u64::MAX), 31);
    }
}
