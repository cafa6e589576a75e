//! No content makes a probe panic, fail, or read without end.
//!
//! The bytes that are changed are bytes that the probe reads, in images that tools made: so each round meets a parser
//! and not a hole. The seed is fixed, and a failure names its round.

use std::sync::Arc;

use block::{ByteRange, RawDisk, Storage};
use snapshot::probe::probe;

use crate::disk::Image;
use crate::{btrfs, ext, fat, ntfs, tables, ufs, xfs};

const ROUNDS: u64 = 1500;
/// The most one disk may cost: 128 partitions, each with every signature's place looked at.
const MOST_READS: usize = 16_000;
const MOST_BYTES: u64 = 64 << 20;

/// Marsaglia's xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    /// Any byte, often one of those that make counters and lengths extreme.
    fn byte(&mut self) -> u8 {
        match self.below(4) {
            0 => [0, 1, 0x7f, 0x80, 0xff, 0xfe][self.below(6) as usize],
            _ => self.below(256) as u8,
        }
    }

    /// Up to eight bytes in a row, somewhere in `range`: half of the time in its first 64 bytes, where headers are.
    fn patch(&mut self, range: ByteRange) -> Vec<(u64, u8)> {
        let bound = if self.below(2) == 0 { range.len.min(64) } else { range.len };
        let at = range.offset + self.below(bound);
        let fill = (self.below(3) == 0).then(|| self.byte());
        (at..range.end().min(at + 1 + self.below(8)))
            .map(|at| (at, fill.unwrap_or_else(|| self.byte())))
            .collect()
    }
}

fn fuzz(image: &Image, seed: u64) {
    let storage = image.storage();
    let disk = RawDisk::new(Arc::clone(&storage) as Arc<dyn Storage>, true).unwrap();
    probe(&disk).unwrap();
    let read = storage.take_reads();
    let mut random = Random(seed);
    for round in 0..ROUNDS {
        let changes = 1 + random.below(6);
        let mut patches = Vec::new();
        for _ in 0..changes {
            let range = read[random.below(read.len() as u64) as usize];
            patches.extend(random.patch(range));
        }
        storage.patch(patches);
        let verdicts = probe(&disk).unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}"));
        let reads = storage.take_reads();
        let bytes: u64 = reads.iter().map(|range| range.len).sum();
        assert!(!verdicts.is_empty() && verdicts.len() <= 129, "seed {seed}, round {round}");
        assert!(
            reads.len() <= MOST_READS && bytes <= MOST_BYTES,
            "seed {seed}, round {round}: {}",
            reads.len()
        );
    }
}

#[test]
fn damaged_extended_file_systems_are_survived() {
    fuzz(&ext::make("ext4"), 1);
    fuzz(&ext::make("ext2"), 2);
}

#[test]
fn a_damaged_xfs_and_its_log_are_survived() {
    // Without checksums, so that damage gets past the super-block.
    let image = xfs::make(&["-m", "crc=0"]);
    let mut log = xfs::LogWriter::new(&image);
    let tail = log.record(1 << 32 | 2, &xfs::transaction(0));
    log.record(tail, &xfs::transaction(0));
    fuzz(&image, 3);
}

#[test]
fn a_damaged_btrfs_is_survived() {
    fuzz(&btrfs::make(), 4);
}

#[test]
fn damaged_fats_are_survived() {
    fuzz(&fat::make("12", 4), 5);
    fuzz(&fat::make("16", 32), 6);
    fuzz(&fat::make("32", 64), 7);
}

#[test]
fn a_damaged_ntfs_is_survived() {
    fuzz(&ntfs::make(), 8);
}

#[test]
fn a_damaged_ufs_is_survived() {
    fuzz(&ufs::make(1, "be"), 9);
    fuzz(&ufs::make(2, "le"), 10);
}

#[test]
fn damaged_partition_tables_are_survived() {
    fuzz(&tables::gpt(), 11);
    fuzz(&tables::mbr(), 12);
}
