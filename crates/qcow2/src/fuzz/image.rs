//! Targets that damage a whole image.

use std::cell::LazyCell;
use std::sync::{Arc, OnceLock};

use block::testing::MemStorage;
use block::{Disk, ErrorKind, read_disk};

use super::{Input, model};
use crate::bytes::be64;
use crate::check::repair;
use crate::compressed::Compression;
use crate::header::Header;
use crate::{CreateOptions, Image, Mode, Parts};

/// Of the image with 512-byte clusters, and of the one with larger ones: each cluster is looked at.
const CAPACITIES: [u64; 2] = [70_000, 200_000];
/// Clusters of damaged images are looked at up to here.
const MOST: u64 = 400_000;

/// A small image with data, zeroes and a compressed cluster, its tables and refcounts right: of 512-byte clusters, or of
/// 16 KiB with subclusters.
fn build(extended: bool) -> Vec<u8> {
    let cluster_bits = if extended { 14 } else { 9 };
    let storage = MemStorage::default();
    let options = CreateOptions::new(CAPACITIES[usize::from(extended)], cluster_bits, extended);
    crate::create(&storage, &options).unwrap();
    let header = Header::read(&storage).unwrap();
    let size = 1_usize << cluster_bits;
    let mut bytes = storage.bytes();
    let (l1, l2) = (header.l1.0 as usize, bytes.len());
    bytes.resize(l2 + 5 * size, 0);
    put(&mut bytes, l1, 1 << 63 | l2 as u64);
    let step = if extended { 16 } else { 8 };
    for (index, data) in [(0, l2 + size), (5, l2 + 2 * size)] {
        put(&mut bytes, l2 + index * step, 1 << 63 | data as u64);
        bytes[data..data + size].fill(index as u8 + 1);
    }
    if extended {
        put(&mut bytes, l2 + 8, 0xff00_0000_00ff);
        put(&mut bytes, l2 + 5 * step + 8, 0xffff_ffff);
        put(&mut bytes, l2 + 7 * step + 8, 0xffff_ffff << 32);
    } else {
        put(&mut bytes, l2 + 7 * step, 1);
    }
    // Across the end of a cluster.
    let packed = model::deflate(&vec![9; size]);
    let at = l2 + 4 * size - 5;
    bytes[at..at + packed.len()].copy_from_slice(&packed);
    put(&mut bytes, l2 + 9 * step, 1 << 62 | sectors(1, cluster_bits) | at as u64);
    let storage = MemStorage::from(bytes);
    repair(&storage, &header).unwrap();
    storage.bytes()
}

/// That a compressed cluster has so many sectors more than one.
fn sectors(more: u64, cluster_bits: u32) -> u64 {
    more << (70 - cluster_bits)
}

/// The two images, made once.
fn images() -> &'static [Vec<u8>; 2] {
    static IMAGES: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
    IMAGES.get_or_init(|| [build(false), build(true)])
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// An image with some of its bytes changed: mostly words of tables.
fn damaged(data: &[u8]) -> Vec<u8> {
    let mut input = Input(data);
    let mut bytes = images()[usize::from(input.byte() & 1)].clone();
    let header = Header::read(&MemStorage::from(bytes.clone())).unwrap();
    let size = 1_u64 << header.cluster_bits;
    let l2 = be64(&bytes, header.l1.0 as usize) & !(1 << 63);
    while !input.is_empty() {
        let place = match input.byte() % 6 {
            0 => header.l1.0,
            1 => header.refcount_table.0,
            2 => header.refcount_table.0 + size,
            3 => u64::from(input.byte()) * 8,
            _ => l2,
        };
        let at = ((place + u64::from(input.byte() % 32) * 8) as usize).min(bytes.len() - 8);
        let place = u64::from(input.byte() % 32) * size;
        match input.byte() % 4 {
            0 => put(&mut bytes, at, 1 << 63 | place),
            1 => put(&mut bytes, at, place | input.number(2)),
            2 => {
                let more = sectors(u64::from(input.byte() % 2), header.cluster_bits);
                put(&mut bytes, at, 1 << 62 | more | place | input.number(2));
            }
            _ => put(&mut bytes, at, input.number(8)),
        }
    }
    bytes
}

/// A damaged image reads what the words of the specification say, or is refused; one that is right in all parts is not.
pub fn tables(data: &[u8]) {
    let bytes = damaged(data);
    let storage = Arc::new(MemStorage::from(bytes.clone()));
    let Ok(header) = Header::read(&*storage) else { return };
    if header.version != 3 || header.compression != Compression::Deflate || header.has_data_file {
        return;
    }
    let size = 1_u64 << header.cluster_bits;
    let clusters = header.capacity.min(MOST).div_ceil(size);
    let image = match Image::open(Parts::new(storage.clone(), None), Mode::ReadOnly) {
        Ok(image) => image,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            return;
        }
    };
    // Entries behind the end of the disk, in its last table, must make sense too: it may grow. They are many, and looked at
    // only where it matters.
    let is_whole = LazyCell::new(|| {
        let end = clusters.next_multiple_of(size / if header.extended_l2 { 16 } else { 8 });
        let makes_sense = |number| model::read_cluster(&bytes, number).is_some();
        header.capacity <= MOST && (0..end).all(makes_sense)
    });
    for number in 0..clusters {
        let expected = model::read_cluster(&bytes, number);
        let len = size.min(image.capacity() - number * size) as usize;
        let mut found = vec![0; len];
        match (read_disk(&image, number * size, &mut found), expected) {
            (Ok(()), Some(expected)) => assert!(found == expected[..len], "cluster {number}"),
            (Ok(()), None) => panic!("cluster {number} makes no sense, and was read"),
            (Err(error), _) => {
                assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io), "{error}");
                assert!(!*is_whole, "cluster {number}: {error}");
            }
        }
    }
    assert!(storage.bytes() == bytes, "it was written");
}

/// A damaged image can be checked. It is repaired, and is then right and reads the same, or refused, and left alone.
pub fn check(data: &[u8]) {
    let bytes = damaged(data);
    let storage = MemStorage::from(bytes.clone());
    let (Ok(header), Ok(report)) = (Header::read(&storage), crate::check(&storage)) else { return };
    match repair(&storage, &header) {
        Ok(()) => {
            assert_eq!(report.broken, 0);
            let after = crate::check(&storage).unwrap();
            assert_eq!((after.broken, after.short, after.leaks), (0, 0, 0), "{:?}", after.first);
            let clusters = header.capacity.min(MOST).div_ceil(1 << header.cluster_bits);
            let repaired = storage.bytes();
            let same = |n| model::read_cluster(&bytes, n) == model::read_cluster(&repaired, n);
            assert!((0..clusters).all(same), "the repair changed what the disk reads");
            if let Some((named, counted)) = model::refcounts(&repaired) {
                assert_eq!(named, counted, "the repair counts otherwise than the specification");
            }
        }
        Err(_) => assert!(storage.bytes() == bytes, "an image that is refused was written"),
    }
}
