//! Plain readings of the format, with no thought of speed, and nothing of the crate's own code.

use std::io::{ErrorKind, Read, Write};

use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;

/// The number of `len` bytes at `at`.
pub(super) fn number(bytes: &[u8], at: u64, len: u64) -> Option<u64> {
    let bytes = bytes.get(at as usize..at.checked_add(len)? as usize)?;
    Some(bytes.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte)))
}

/// Kinds and contents of header extensions.
pub(super) fn extensions(area: &[u8]) -> Option<Vec<(u32, Vec<u8>)>> {
    let (mut found, mut at) = (Vec::new(), 0);
    loop {
        let Some(kind) = number(area, at, 8).map(|_| number(area, at, 4)) else { return Some(found) };
        let (kind, len) = (kind? as u32, number(area, at + 4, 4)?);
        if kind == 0 {
            return Some(found);
        }
        let body = area.get(at as usize + 8..(at + 8 + len) as usize)?;
        if found.iter().any(|(other, _)| *other == kind) {
            return None;
        }
        found.push((kind, body.to_vec()));
        at += 8 + len.div_ceil(8) * 8;
    }
}

/// Positions and names of the entries of a bitmap directory, if it has `count` of them and nothing else.
pub(super) fn directory(bytes: &[u8], count: u32) -> Option<Vec<(usize, Vec<u8>)>> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < bytes.len() as u64 {
        let (name_len, extra) = (number(bytes, at + 18, 2)?, number(bytes, at + 20, 4)?);
        let name = bytes.get((at + 24 + extra) as usize..(at + 24 + extra + name_len) as usize)?;
        found.push((at as usize, name.to_vec()));
        at += (24 + extra + name_len).div_ceil(8) * 8;
    }
    let whole = at == bytes.len() as u64 && found.len() == count as usize && count > 0;
    whole.then_some(found)
}

/// The `size` bytes that are compressed in `data`, and no more than these; its end may be missing.
pub(super) fn inflate(data: &[u8], size: usize) -> Option<Vec<u8>> {
    let (mut out, mut decoder) = (vec![0; size], DeflateDecoder::new(data));
    decoder.read_exact(&mut out).ok()?;
    match decoder.read(&mut [0]) {
        Ok(0) => Some(out),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Some(out),
        _ => None,
    }
}

pub(super) fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).unwrap_or_default()
}

/// What a guest's cluster reads in an image without a backing file, by the words of the specification. `None` if its
/// entry, or the way to it, contradicts them. The image's header is taken for good.
pub(super) fn read_cluster(image: &[u8], cluster: u64) -> Option<Vec<u8>> {
    let size = 1_u64 << number(image, 20, 4)?;
    let extended = number(image, 72, 8)? & 16 != 0;
    let entry_size = if extended { 16 } else { 8 };
    let end = (image.len() as u64).div_ceil(size) * size;
    let place = |word: u64| {
        let at = word & 0x00ff_ffff_ffff_fe00;
        (at.is_multiple_of(size) && at < end).then_some(at)
    };
    let per_table = size / entry_size;
    let l1 = number(image, number(image, 40, 8)? + cluster / per_table * 8, 8)?;
    if l1 & !(0x00ff_ffff_ffff_fe00 | 1 << 63) != 0 {
        return None;
    }
    let table = place(l1)?;
    if table == 0 {
        return Some(vec![0; size as usize]);
    }
    let at = table + cluster % per_table * entry_size;
    let word = number(image, at, 8)?;
    if word & 1 << 62 != 0 {
        let split = 62 - (size.ilog2() - 8);
        let (offset, more) = (word & ((1 << split) - 1), word >> split & ((1 << (62 - split)) - 1));
        let last = (offset / 512 + more + 1) * 512;
        let bytes = image.get(offset as usize..(last as usize).min(image.len()))?;
        return inflate(bytes, size as usize);
    }
    let flags = if extended { 0 } else { 1 };
    if word & !(0x00ff_ffff_ffff_fe00 | 1 << 63 | flags) != 0 {
        return None;
    }
    let home = place(word)?;
    let bits = if extended { number(image, at + 8, 8)? } else { u64::from(home != 0 && word & 1 == 0) };
    let (parts, allocated, zero) = (if extended { 32 } else { 1 }, bits as u32, (bits >> 32) as u32);
    if allocated & zero != 0 || (allocated != 0 && home == 0) {
        return None;
    }
    let mut out = vec![0; size as usize];
    let part = (size / parts) as usize;
    for index in (0..parts as usize).filter(|index| allocated >> index & 1 == 1) {
        // Zeroes where the file ends before.
        let there = image.get(home as usize + index * part..).unwrap_or_default();
        let len = there.len().min(part);
        out[index * part..][..len].copy_from_slice(&there[..len]);
    }
    Some(out)
}

/// How often an image names each of its clusters, and how often its refcounts say so, by the words of the specification.
/// `None` for one with snapshots, bitmaps or a data file. The image's header is taken for good.
pub(super) fn refcounts(image: &[u8]) -> Option<(Vec<u64>, Vec<u64>)> {
    let (bits, version) = (number(image, 20, 4)?, number(image, 4, 4)?);
    let (incompatible, order) = match version {
        2 => (0, 4),
        _ => (number(image, 72, 8)?, number(image, 96, 4)?),
    };
    let has_bitmaps =
        image.get(..4096)?.chunks_exact(8).any(|word| word.starts_with(&[0x23, 0x85, 0x28, 0x75]));
    if number(image, 60, 4)? != 0 || has_bitmaps || incompatible & 4 != 0 {
        return None;
    }
    let extended = incompatible & 16 != 0;
    let size = 1 << bits;
    let mut named = vec![0; image.len().div_ceil(size as usize)];
    let mut name = |at: u64, len: u64| {
        let clusters = at >> bits..(at + len).div_ceil(size);
        clusters
            .for_each(|cluster| named.get_mut(cluster as usize).into_iter().for_each(|times| *times += 1));
    };
    name(0, 1);
    let (table, table_len) = (number(image, 48, 8)?, number(image, 56, 4)? << bits);
    name(table, table_len);
    let blocks: Vec<u64> =
        (0..table_len / 8).map_while(|index| number(image, table + index * 8, 8)).collect();
    blocks.iter().filter(|at| **at != 0).for_each(|at| name(*at, size));
    let (l1, entries) = (number(image, 40, 8)?, number(image, 36, 4)?);
    name(l1, entries * 8);
    for index in 0..entries {
        let table = number(image, l1 + index * 8, 8)? & 0x00ff_ffff_ffff_fe00;
        if table == 0 {
            continue;
        }
        name(table, size);
        let step = if extended { 16 } else { 8 };
        for word in (0..size / step).map_while(|index| number(image, table + index * step, 8)) {
            let home = word & 0x00ff_ffff_ffff_fe00;
            if word & 1 << 62 != 0 {
                let split = 62 - (bits - 8);
                let (at, more) = (word & ((1 << split) - 1), word >> split & ((1 << (62 - split)) - 1));
                let sectors = at / 512 * 512;
                name(sectors, (more + 1) * 512);
            } else if home != 0 {
                name(home, size);
            }
        }
    }
    let per_block = (size * 8) >> order;
    let count = |cluster: u64| {
        let Some(block) = blocks.get((cluster / per_block) as usize).filter(|at| **at != 0) else {
            return Some(0);
        };
        let bit = (cluster % per_block) << order;
        match order {
            0..=2 => Some(number(image, block + bit / 8, 1)? >> (bit % 8) & ((1 << (1 << order)) - 1)),
            _ => number(image, block + bit / 8, 1 << (order - 3)),
        }
    };
    let counts = (0..named.len() as u64).map(|cluster| count(cluster).unwrap_or(0)).collect();
    Some((named, counts))
}
