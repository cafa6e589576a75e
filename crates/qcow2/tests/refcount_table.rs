//! An image whose refcount table is too short for what is written to it: the table grows, whatever happens meanwhile.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::testing::{CrashStorage, FaultStorage, MemStorage, Random};
use block::{Disk, ErrorKind, FlushStep, Storage, blocking, read_disk, write_disk};
use hostio::{Cache, HostFile, Open};
use qcow2::{Image, Mode, Parts};
use support::{Files, Verdict, check, memory, options};

const MIB: u64 = 1 << 20;

/// An image of QEMU's, of 16 MiB: a refcount block counts 32 KiB, and a cluster of the table names blocks for 2 MiB.
fn image(folder: &Path) -> Vec<u8> {
    let path = folder.join("image");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64"]);
    assert!(create.arg(&path).arg("16M").status().unwrap().success());
    fs::read(path).unwrap()
}

fn table_clusters(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[56..60].try_into().unwrap())
}

/// That QEMU finds nothing wrong but leaks, and none of those either if there may be none.
#[track_caller]
fn assert_sound(folder: &Path, bytes: &[u8], leaks: bool) {
    let path = folder.join("checked");
    fs::write(&path, bytes).unwrap();
    let checked = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output().unwrap();
    let code = checked.status.code().unwrap();
    assert!(code == 0 || (leaks && code == 3), "{code}: {}", String::from_utf8_lossy(&checked.stdout));
}

/// That the first `len` bytes read what `fill` wrote.
#[track_caller]
fn assert_filled(storage: Arc<dyn Storage>, len: u64) {
    let image = Image::open(Parts::new(storage, None), Mode::ReadOnly).unwrap();
    let mut found = vec![0; len as usize];
    read_disk(&image, 0, &mut found).unwrap();
    assert!(found.chunks(MIB as usize).zip(1..).all(|(mib, n)| mib.iter().all(|byte| *byte == n)));
}

/// Writes from one MiB to another, each with its own byte.
fn fill(image: &Image, mibs: std::ops::Range<u64>) {
    mibs.for_each(|n| write_disk(image, n * MIB, &vec![n as u8 + 1; MIB as usize]).unwrap());
}

/// One flush may need a table many times as long.
#[test]
fn the_table_grows_as_far_as_one_flush_needs_it() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Arc::new(MemStorage::from(image(folder.path())));
    let files = Files { image: storage.clone(), journal: [memory(), memory()] };
    let image = files.open(None).unwrap();
    let before = table_clusters(&storage.bytes());
    for mibs in [0..1, 1..15, 15..16] {
        fill(&image, mibs);
        image.flush().run().unwrap();
        assert_sound(folder.path(), &storage.bytes(), false);
    }
    assert!(table_clusters(&storage.bytes()) >= 8 * before);
    assert_filled(storage, 16 * MIB);
}

#[test]
fn power_lost_while_the_table_grows_leaves_the_old_one_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Arc::new(CrashStorage::new());
    storage.write_at(&image(folder.path()), 0).unwrap();
    storage.sync().unwrap();
    let files = Files { image: storage.clone(), journal: [memory(), memory()] };
    let image = files.open(None).unwrap();
    fill(&image, 0..1);
    image.flush().run().unwrap();
    let (mut random, mut lengths) = (Random(1), std::collections::BTreeSet::new());
    // The second time the table that grew is itself too short.
    for (first, last) in [(1, 4), (4, 9)] {
        fill(&image, first..last);
        let mut flush = image.flush();
        while let FlushStep::Sync(files) = blocking(|waker| flush.step(Ok(()), waker)).unwrap() {
            for chance in [0, 100, 50, 10, 90] {
                let left = storage.after_power_loss(|| random.below(100) < chance);
                lengths.insert(table_clusters(&left.bytes()));
                assert_sound(folder.path(), &left.bytes(), true);
                assert_filled(Arc::new(left), first * MIB);
            }
            files.iter().for_each(|file| file.sync().unwrap());
        }
        assert_filled(Arc::new(storage.after_power_loss(|| false)), last * MIB);
    }
    assert_eq!(lengths.len(), 3, "the table's lengths: {lengths:?}");
    assert_sound(folder.path(), &storage.after_power_loss(|| true).bytes(), false);
}

/// A flush that failed half-way is done again, by when more has been written than the larger table can count.
#[test]
fn a_table_whose_growth_failed_grows_further() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = image(folder.path());
    let storages = || Arc::new(FaultStorage::new(MemStorage::from(bytes.clone())));
    // At the first write of each step; and where room ends among the new tables, or within the refcount table.
    let mut failed = Vec::new();
    for (steps, room) in [(0, 0), (1, 0), (2, 0), (3, 0), (0, 10), (0, 60), (0, 90), (0, 130)] {
        let storage = storages();
        let files = Files { image: storage.clone(), journal: [memory(), memory()] };
        let image = files.open(None).unwrap();
        fill(&image, 0..2);
        let end = storage.len().unwrap();
        let mut flush = image.flush();
        for _ in 0..steps {
            assert!(matches!(blocking(|waker| flush.step(Ok(()), waker)).unwrap(), FlushStep::Sync(_)));
        }
        match room {
            0 => storage.fail_writes(1),
            clusters => storage.limit_len(end + clusters * 512),
        }
        failed.push(blocking(|waker| flush.step(Ok(()), waker)).is_err());
        drop(flush);
        storage.limit_len(u64::MAX);
        storage.fail_writes(0);
        fill(&image, 2..8);
        image.flush().run().unwrap();
        image.flush().run().unwrap();
        assert_sound(folder.path(), &storage.bytes(), false);
        assert_filled(storage, 8 * MIB);
    }
    assert!(failed.iter().filter(|failed| **failed).count() >= 5, "{failed:?}");
}

/// Many blocks at once, of which each counts the next ones' clusters at best: they are named in a few steps, and nothing that
/// is named after a loss of power is not counted.
#[test]
fn new_blocks_are_named_together_and_never_before_what_counts_them() {
    let storage = Arc::new(CrashStorage::new());
    let files = Files::new(storage.clone(), &options(8 * MIB, 9, false));
    let image = files.open(None).unwrap();
    let mut random = Random(1);
    for mibs in [0..1, 1..3, 3..8] {
        fill(&image, mibs.clone());
        let (mut flush, mut syncs) = (image.flush(), 0);
        while let FlushStep::Sync(files) = blocking(|waker| flush.step(Ok(()), waker)).unwrap() {
            for chance in [0, 100, 50, 50, 50, 10, 90] {
                let left = storage.after_power_loss(|| random.below(100) < chance);
                assert_eq!(check(&left.bytes()).errors, Vec::<String>::new());
            }
            files.iter().for_each(|file| file.sync().unwrap());
            syncs += 1;
        }
        assert!(syncs <= 4, "{syncs} syncs for {mibs:?}, with eight blocks and more a MiB");
        assert_eq!(check(&storage.after_power_loss(|| false).bytes()), Verdict::default());
    }
}

/// As small clusters and as wide refcounts as can be: the largest refcount table counts 32 GiB. What was written to the
/// last of it could not be flushed, for want of clusters to count it in.
#[test]
fn an_image_as_large_as_can_be_counted_takes_nothing_that_it_can_not_flush() {
    const LIMIT: u64 = 1 << 26;
    let folder = tempfile::tempdir().unwrap();
    // So many clusters before the end; then so many that there is room for the tables, and for some data.
    for (left, room) in [(20, 0..1), ((1 << 20) + 3 * (1 << 14) + 512 + 300, 300..400)] {
        fs::write(folder.path().join("image"), image(folder.path())).unwrap();
        let how = Open { writable: true, cache: Cache::Writeback };
        let storage = Arc::new(HostFile::open(&folder.path().join("image"), how).unwrap());
        storage.set_len((LIMIT - left) * 512).unwrap();
        let files = Files { image: storage.clone(), journal: [memory(), memory()] };
        let image = files.open(None).unwrap();
        // Each in an L2 table of its own: the most that is to be counted.
        let write = |n: u64| write_disk(&image, n * 32768, &[7; 512]);
        let refused = (0..512).find_map(|n| write(n).err().map(|error| (n, error.kind())));
        let (written, kind) = refused.unwrap();
        assert!(room.contains(&written) && kind == ErrorKind::NoSpace, "{written} writes, then {kind:?}");
        image.flush().run().unwrap();
        drop(image);
        let image = files.open(None).unwrap();
        let mut found = [0; 512];
        read_disk(&image, written.saturating_sub(1) * 32768, &mut found).unwrap();
        assert_eq!(found, [if written > 0 { 7 } else { 0 }; 512]);
    }
}
