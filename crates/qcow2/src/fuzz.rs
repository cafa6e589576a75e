//! The bodies of the fuzz targets: each takes any bytes, and panics if the crate does other than an exact model of it.
//!
//! `fuzz/` hands them to libFuzzer; the tests here run them for a moment on mutated seeds, so that they stay true.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a panic is how a fuzz target speaks"
)]

mod image;
mod journal;
mod model;

use std::collections::BTreeSet;

use block::testing::{Input, MemStorage};
use block::{ByteRange, DirtyBitmap, ErrorKind, Storage};

use crate::bitmaps::Directory;
use crate::bytes::be32;
use crate::compressed::{Compression, decompress};
use crate::extensions::{BITMAPS, Extensions};
use crate::header::{AUTOCLEAR_BITMAPS, Header};
use crate::refcount_bits::RefcountWidth;
pub use image::{check, tables};
pub use journal::journal;

/// A fuzz target's body.
pub type Target = fn(&[u8]);

/// All targets, by the names that they have in `fuzz/`.
pub const TARGETS: [(&str, Target); 9] = [
    ("header", header),
    ("extensions", extensions),
    ("directory", directory),
    ("bitmap", bitmap),
    ("refcounts", refcounts),
    ("compressed", compressed),
    ("tables", tables),
    ("check", check),
    ("journal", journal),
];

/// A header that is accepted says what a plain reading of it does, and the same when it is written anew; and it can be given
/// another backing file, or is left alone.
pub fn header(data: &[u8]) {
    let mut bytes = data.to_vec();
    bytes.resize(bytes.len().max(4096).next_multiple_of(512), 0);
    let storage = MemStorage::from(bytes.clone());
    let found = match Header::read(&storage) {
        Ok(found) => found,
        Err(error) => return assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported)),
    };
    let number = |at, len| model::number(&bytes, at, len).unwrap();
    assert_eq!((found.capacity, u64::from(found.cluster_bits)), (number(24, 8), number(20, 4)));
    assert_eq!((found.l1.0, u64::from(found.l1_entries)), (number(40, 8), number(36, 4)));
    let refcounts = (found.refcount_table.0, u64::from(found.refcount_table_clusters));
    assert_eq!(refcounts, (number(48, 8), number(56, 4)));
    if found.version == 3 {
        let features = [found.incompatible, found.compatible, found.autoclear];
        assert_eq!(features, [72, 80, 88].map(|at| number(at, 8)));
        assert_eq!(u64::from(found.refcount_order), number(96, 4));
    }
    let encoded = found.encode();
    if encoded.len() <= 1 << found.cluster_bits && encoded.len() <= bytes.len() {
        let mut again = bytes.clone();
        again[..encoded.len()].copy_from_slice(&encoded);
        assert_eq!(essence(&Header::read(&MemStorage::from(again)).unwrap()), essence(&found));
    }
    let name = "b".repeat(usize::from(*data.last().unwrap_or(&0)) + 1);
    match crate::set_backing(&storage, Some((&name, "raw"))) {
        Ok(()) => {
            let mut changed = Header::read(&storage).unwrap();
            assert_eq!(changed.backing_file.take().unwrap(), name);
            assert_eq!(changed.backing_format.take().unwrap(), "raw");
            assert_eq!(changed.autoclear, found.kept_autoclear());
            assert_eq!((changed.capacity, changed.l1), (found.capacity, found.l1));
            assert_eq!(changed.optional_fields, found.optional_fields);
        }
        Err(_) => assert!(storage.bytes() == bytes, "an image that is refused was written"),
    }
}

/// What a header says, but for where it says it.
fn essence(header: &Header) -> String {
    format!("{:?}", Header { extensions_end: 0, name_at: 0, ..header.clone() })
}

/// Extensions are found where a plain reading of the format finds them, and survive being written.
pub fn extensions(data: &[u8]) {
    let plain = model::extensions(data);
    match Extensions::decode(data) {
        Ok((found, used)) => {
            let plain = plain.expect("the model refuses what is accepted");
            assert!(used <= data.len());
            for (kind, body) in &plain {
                assert_eq!(found.get(*kind), Some(&**body));
            }
            let mut encoded = Vec::new();
            found.encode(&mut encoded);
            assert_eq!(Extensions::decode(&encoded).unwrap(), (found.clone(), encoded.len()));
            let without = plain.iter().fold(found, |left, (kind, _)| left.with(*kind, None));
            assert_eq!(without, Extensions::default());
        }
        Err(_) => assert!(plain.is_none(), "the model accepts what is refused: {plain:?}"),
    }
}

/// A bitmap directory is what a plain reading of the format finds; and none makes the reader believe in anything outside
/// the file.
pub fn directory(data: &[u8]) {
    let mut input = Input(data);
    let count = u32::from(input.byte());
    let body = input.0;
    let extension =
        [&count.to_be_bytes()[..], &[0; 4], &(body.len() as u64).to_be_bytes(), &(2_u64 << 9).to_be_bytes()];
    let mut header = Header::new(1 << 20, 9, false);
    header.extensions = Extensions::default().with(BITMAPS, Some(&extension.concat()));
    header.autoclear = AUTOCLEAR_BITMAPS;
    let mut bytes = vec![0; 2 << 9];
    bytes.extend(body);
    bytes.resize((bytes.len() + 8192).next_multiple_of(512), 0);
    let storage = MemStorage::from(bytes);
    let plain = model::directory(body, count);
    match Directory::read(&storage, &header) {
        Ok(found) => {
            let entries = found.unwrap().entries;
            assert_eq!(Some(entries.len()), plain.as_ref().map(Vec::len));
            for (entry, (at, name)) in entries.iter().zip(plain.unwrap()) {
                assert_eq!(
                    (entry.position, &*entry.name),
                    ((2 << 9) + at as u64, &*String::from_utf8_lossy(&name))
                );
                assert!(entry.table.0 + entry.table_bytes() <= storage.len().unwrap());
                let _ = entry.read_table(&storage, &header, 0..entry.table_entries.min(1000));
            }
        }
        Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt),
    }
}

/// A dirty bitmap is a set of granules, whatever is marked, merged, grown and looked for.
pub fn bitmap(data: &[u8]) {
    let mut input = Input(data);
    let bits = 9 + u32::from(input.byte() % 3);
    let mut capacity = input.number(2) * 100;
    let bitmap = DirtyBitmap::new(capacity, bits).unwrap();
    let mut model = BTreeSet::new();
    while !input.is_empty() {
        let (act, at, len) = (input.byte() % 5, input.number(3) % (capacity + 1), input.number(2));
        match act {
            0 | 1 => {
                bitmap.mark(ByteRange { offset: at, len });
                let end = (at + len).min(capacity);
                model.extend((at >> bits..end.div_ceil(1 << bits)).filter(|_| at < end));
            }
            2 => {
                let byte = at / 8 / 512;
                bitmap.merge_bytes(byte, &[len as u8]);
                let granules = (0..8).filter(|bit| len >> bit & 1 == 1).map(|bit| byte * 8 + bit);
                model.extend(granules.filter(|granule| granule << bits < capacity));
            }
            3 => {
                capacity += len;
                bitmap.grow(capacity).unwrap();
            }
            _ => {
                let end = (at + len).min(capacity);
                let first = model.range(at >> bits..).next().filter(|first| **first << bits < end);
                let run = first.map(|first| {
                    let stop = (*first..).find(|granule| !model.contains(granule)).unwrap();
                    (at.max(first << bits), end.min(stop << bits))
                });
                let found = bitmap.next_dirty(ByteRange { offset: at, len });
                assert_eq!(found.map(|found| (found.offset, found.end())), run.filter(|_| at < end));
            }
        }
    }
    let mut bytes = vec![0; bitmap.byte_len() as usize];
    bitmap.read_bytes(0, &mut bytes);
    let set = (0..bytes.len() as u64 * 8).filter(|bit| bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1);
    assert_eq!(set.collect::<BTreeSet<u64>>(), model);
    let mut found = BTreeSet::new();
    let mut offset = 0;
    while let Some(run) = bitmap.next_dirty(ByteRange { offset, len: capacity - offset }) {
        found.extend(run.offset >> bits..run.end().div_ceil(1 << bits));
        offset = run.end();
    }
    assert_eq!(found, model);
    assert_eq!(bitmap.dirty_bytes(), ((model.len() as u64) << bits).min(capacity));
}

/// Refcounts of any width are an array of numbers.
pub fn refcounts(data: &[u8]) {
    let mut input = Input(data);
    let width = RefcountWidth::new(u32::from(input.byte() % 7));
    let mut block = [0; 512];
    let mut model = vec![0; width.per_block(512) as usize];
    while !input.is_empty() {
        let index = input.number(2) as usize % (model.len() + 1);
        let value = input.number(8) >> (input.byte() % 64);
        let done = width.set(&mut block, index, value).is_ok();
        assert_eq!(done, index < model.len() && value <= width.max());
        if done {
            model[index] = value;
        }
    }
    assert!((0..model.len()).all(|index| width.get(&block, index) == model[index]));
}

/// What was compressed comes back, and anything else fills the cluster exactly or is refused.
pub fn compressed(data: &[u8]) {
    let size = 4096;
    let mut out = vec![0; size];
    for compression in [Compression::Deflate, Compression::Zstd] {
        match decompress(compression, data, &mut out) {
            Ok(()) if compression == Compression::Deflate => {
                assert_eq!(model::inflate(data, size).unwrap(), out)
            }
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt),
        }
    }
    let mut cluster = data.to_vec();
    cluster.resize(size, be32(data, 0) as u8);
    decompress(Compression::Deflate, &model::deflate(&cluster), &mut out).unwrap();
    assert!(out == cluster);
}

#[cfg(test)]
mod tests;
