//! The two CRCs that super-blocks and partition tables carry, bit by bit: a probe sums a few kilobytes.

/// CRC-32C (Castagnoli), reversed: btrfs, xfs, ext4.
const CRC32C: u32 = 0x82f6_3b78;
/// CRC-32 (IEEE 802.3), reversed: GPT.
const CRC32: u32 = 0xedb8_8320;

/// The CRC-32C of `parts` one after the other, with the usual inversion at both ends.
pub(super) fn crc32c(parts: &[&[u8]]) -> u32 {
    crc(CRC32C, parts)
}

/// The CRC-32 of `parts` one after the other (UEFI 2.10, section 5.3.2).
pub(super) fn crc32(parts: &[&[u8]]) -> u32 {
    crc(CRC32, parts)
}

fn crc(polynomial: u32, parts: &[&[u8]]) -> u32 {
    let bytes = parts.iter().flat_map(|part| part.iter());
    !bytes.fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (polynomial * (sum & 1)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_values_of_the_catalogue_come_out() {
        assert_eq!(crc32c(&[b"12345", b"6789"]), 0xe306_9283);
        assert_eq!(crc32(&[b"123456789"]), 0xcbf4_3926);
    }
}
