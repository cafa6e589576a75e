//! A host that fails or runs full: a clear error, nothing lost, and a second try that works.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use block::testing::{FaultStorage, MemStorage};
use block::{ByteRange, Disk, Error, ErrorKind, Storage, blocking, read_disk, write_disk};
use qcow2::{CreateOptions, Image, Journal, Mode, Parts};
use support::{Files, Hook, Hooked, Verdict, assert_same, check, contents, memory, options};

fn image() -> (Arc<FaultStorage>, Files, Image) {
    let storage = memory();
    let files = Files::new(storage.clone(), &options(1 << 20, 16, true));
    let image = files.open(None).unwrap();
    (storage, files, image)
}

/// A file in memory of which one write fails: the `n`th from when it is told so.
#[derive(Debug, Default)]
struct FailingWrite {
    inner: MemStorage,
    left: AtomicI64,
}

impl Hooked for FailingWrite {
    fn inner(&self) -> &dyn Storage {
        &self.inner
    }

    fn write(&self, buf: &[u8], offset: u64) -> block::Result<()> {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            1 => Err(Error::new(ErrorKind::Io, "injected: input/output error")),
            _ => self.inner.write_at(buf, offset),
        }
    }
}

/// Each write of two flushes fails in its turn: those of new tables, of refcounts, of entries, of the L1 table.
fn fail_a_write(failing: i64, kill: bool) -> bool {
    let storage = Arc::new(Hook::<FailingWrite>::default());
    let files = Files::new(storage.clone(), &options(1 << 20, 16, true));
    let mut image = files.open(None).unwrap();
    let mut expected = vec![0; 1 << 20];
    let mut failed = false;
    for round in 0..2 {
        for cluster in [0, 3, 9] {
            let at = (cluster << 16) + round * 4096;
            write_disk(&image, at as u64, &[7; 4096]).unwrap();
            expected[at..at + 4096].fill(7);
        }
        storage
            .0
            .left
            .store(if round == failing as usize / 8 { failing % 8 + 1 } else { 0 }, Ordering::SeqCst);
        let flushed = image.flush().run();
        assert_eq!(flushed.is_ok(), image.is_clean());
        failed |= flushed.is_err();
        storage.0.left.store(0, Ordering::SeqCst);
        assert_eq!(check(&storage.0.inner.bytes()).errors, Vec::<String>::new());
        // What comes between must not be lost either.
        write_disk(&image, 700_000, &[9; 512]).unwrap();
        expected[700_000..700_512].fill(9);
        if kill {
            drop(image);
            image = files.open(None).unwrap();
        }
        assert_same(&contents(&image), &expected, "after the fault");
    }
    image.flush().run().unwrap();
    assert!(image.is_clean());
    let verdict = check(&storage.0.inner.bytes());
    // A process killed between counting and naming a table leaves that one cluster counted.
    assert!(verdict.errors.is_empty() && verdict.leaks <= usize::from(kill && failed), "{verdict:?}");
    failed
}

#[test]
fn a_flush_that_could_not_write_is_tried_again() {
    for kill in [false, true] {
        let failures = (0..16).filter(|failing| fail_a_write(*failing, kill)).count();
        assert!(failures >= 6, "only {failures} writes failed");
    }
}

#[test]
fn a_failed_sync_is_final_for_writes_and_reads_go_on() {
    let (storage, _, image) = image();
    write_disk(&image, 0, &[7; 4096]).unwrap();
    storage.fail_syncs(1);
    assert_eq!(image.flush().run().unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(image.flush().run().unwrap_err().kind(), ErrorKind::Latched);
    assert_eq!(write_disk(&image, 0, &[1]).unwrap_err().kind(), ErrorKind::Latched);
    let range = ByteRange { offset: 0, len: 4096 };
    let zeroed = blocking(|waker| image.write_zeroes(range, true, waker));
    assert_eq!(zeroed.unwrap_err().kind(), ErrorKind::Latched);
    assert_eq!(contents(&image)[..4096], [7; 4096]);
}

#[test]
fn a_full_host_fails_writes_and_flushes_until_there_is_room() {
    let (storage, files, image) = image();
    let len = storage.bytes().len() as u64;
    storage.limit_len(len + 4096);
    assert_eq!(write_disk(&image, 0, &[7; 8192]).unwrap_err().kind(), ErrorKind::NoSpace);
    write_disk(&image, 0, &[7; 4096]).unwrap();
    // The data went in, its L2 table does not.
    assert_eq!(image.flush().run().unwrap_err().kind(), ErrorKind::NoSpace);
    let mut found = [0; 8192];
    read_disk(&image, 0, &mut found).unwrap();
    assert_eq!((found[..4096].to_vec(), found[4096..].to_vec()), (vec![7; 4096], vec![0; 4096]));
    storage.limit_len(u64::MAX);
    image.flush().run().unwrap();
    write_disk(&image, 4096, &[7; 4096]).unwrap();
    drop(image);
    assert_eq!(contents(&files.open(None).unwrap())[..8192], [7; 8192]);
    assert_eq!(check(&storage.bytes()), Verdict::default());
}

#[test]
fn a_journal_that_takes_no_record_fails_the_write_and_only_it() {
    let storage = memory();
    qcow2::create(&*storage, &CreateOptions::overlay(1 << 20, None)).unwrap();
    let (a, b) = (memory(), memory());
    let journal = Journal::create(a.clone(), b.clone(), "boot").unwrap();
    let image = Image::open(Parts::new(storage, None), Mode::Writable(journal)).unwrap();
    a.fail_writes(1);
    b.fail_writes(1);
    write_disk(&image, 0, &[7; 4096]).unwrap_err();
    assert_eq!(contents(&image)[..4096], [0; 4096]);
    write_disk(&image, 0, &[7; 4096]).unwrap();
    assert_eq!(contents(&image)[..4096], [7; 4096]);
}

#[test]
fn an_aborted_write_publishes_nothing_and_its_room_is_used_again() {
    let (storage, _, image) = image();
    let range = ByteRange { offset: 0, len: 1 << 16 };
    drop(blocking(|waker| image.resolve_write(range, waker, &mut Vec::new())).unwrap());
    assert!(image.is_clean());
    let len = storage.bytes().len();
    write_disk(&image, 0, &[7; 1 << 16]).unwrap();
    assert_eq!(storage.bytes().len(), len + (1 << 16));
    image.flush().run().unwrap();
    assert_eq!(check(&storage.bytes()), Verdict::default());
}

#[test]
fn an_early_dropped_flush_leaves_its_work_to_the_next() {
    let (storage, _, image) = image();
    write_disk(&image, 0, &[7; 4096]).unwrap();
    let mut flush = image.flush();
    drop(blocking(|waker| flush.step(Ok(()), waker)).unwrap());
    drop(flush);
    assert!(!image.is_clean());
    image.flush().run().unwrap();
    assert!(image.is_clean());
    assert_eq!(check(&storage.bytes()), Verdict::default());
}
