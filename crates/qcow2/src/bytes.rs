//! Big-endian numbers, as qcow2 stores all of its own.

/// The number at `at`; zero past the end, so that a caller's arithmetic slip can not panic on an image's bytes.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |found| u64::from_be_bytes(*found))
}

/// As [`be64`], of 32 bits.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |found| u32::from_be_bytes(*found))
}

/// As [`be64`], of 16 bits.
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |found| u16::from_be_bytes(*found))
}
