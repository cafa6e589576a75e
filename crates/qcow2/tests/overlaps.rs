//! Two requests in the same subcluster at the same time, each order a story of its own.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;
use std::task::{Poll, Waker};

use block::testing::{CrashStorage, MemStorage};
use block::{ByteRange, Disk, Extent, Flush, FlushStep, RawDisk, Source, Storage, WriteGuard, write_disk};
use qcow2::{Image, Mode, Parts};
use support::{Files, contents, options};

/// Subclusters of 2 KiB.
const SUB: u64 = 2048;

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange { offset, len }
}

fn base() -> Arc<dyn Disk> {
    Arc::new(RawDisk::new(Arc::new(MemStorage::from(vec![9; 1 << 17])), true).unwrap())
}

fn image() -> (Arc<CrashStorage>, Files, Image) {
    let storage = Arc::new(CrashStorage::new());
    let files = Files::new(storage.clone(), &options(1 << 17, 16, true));
    let image = files.open(Some(base())).unwrap();
    (storage, files, image)
}

fn resolve(image: &Image, range: ByteRange) -> Option<(WriteGuard, Vec<Extent>)> {
    let mut extents = Vec::new();
    match image.resolve_write(range, Waker::noop(), &mut extents) {
        Poll::Ready(guard) => Some((guard.unwrap(), extents)),
        Poll::Pending => None,
    }
}

fn move_data(extents: &[Extent], value: u8) {
    for Extent { len, source } in extents {
        let Source::File { storage, offset } = source else { panic!("a write to nowhere") };
        storage.write_at(&vec![value; *len as usize], *offset).unwrap();
    }
}

fn zero(image: &Image, range: ByteRange) -> Poll<()> {
    image.write_zeroes(range, true, Waker::noop()).map(Result::unwrap)
}

/// The value of the disk's first byte of each sector of the first two subclusters.
fn sectors(disk: &dyn Disk) -> Vec<u8> {
    contents(disk)[..2 * SUB as usize].iter().copied().step_by(512).collect()
}

#[test]
fn zeroes_wait_for_a_write_that_has_copied_what_they_cover() {
    for abort in [false, true] {
        let (_, _, image) = image();
        let (guard, extents) = resolve(&image, range(512, 512)).unwrap();
        assert!(zero(&image, range(0, SUB)).is_pending());
        assert!(zero(&image, range(1024, 512)).is_pending());
        move_data(&extents, 7);
        if abort {
            drop(guard);
            assert_eq!(sectors(&image), [9; 8]);
        } else {
            guard.complete().unwrap();
            assert_eq!(sectors(&image), [9, 7, 9, 9, 9, 9, 9, 9]);
        }
        assert!(zero(&image, range(1024, 512)).is_ready());
        assert_eq!(sectors(&image)[1..], [if abort { 9 } else { 7 }, 0, 9, 9, 9, 9, 9]);
        assert!(zero(&image, range(0, SUB)).is_ready());
        assert_eq!(sectors(&image), [0, 0, 0, 0, 9, 9, 9, 9]);
    }
}

#[test]
fn zeroes_beneath_a_whole_write_in_flight_show_until_it_completes() {
    for abort in [false, true] {
        let (_, files, image) = image();
        let (guard, extents) = resolve(&image, range(0, SUB)).unwrap();
        assert!(zero(&image, range(0, 2 * SUB)).is_ready());
        move_data(&extents, 7);
        assert_eq!(sectors(&image), [0; 8]);
        // A flush in between knows of the zeroes, and not of the room that the write was given.
        image.flush().run().unwrap();
        let seen = Image::open(Parts::new(files.image.clone(), Some(base())), Mode::ReadOnly).unwrap();
        assert_eq!(sectors(&seen), [0; 8]);
        match abort {
            true => drop(guard),
            false => guard.complete().unwrap(),
        }
        let expected = if abort { [0; 8] } else { [7, 7, 7, 7, 0, 0, 0, 0] };
        assert_eq!(sectors(&image), expected);
        drop(image);
        assert_eq!(sectors(&files.open(Some(base())).unwrap()), expected);
    }
}

#[test]
fn a_discard_leaves_the_other_sectors_of_a_subcluster_alone() {
    let (_, _, image) = image();
    write_disk(&image, 0, &[1; SUB as usize]).unwrap();
    // In place, its data already on the way.
    let (guard, extents) = resolve(&image, range(512, 512)).unwrap();
    move_data(&extents, 7);
    assert!(image.discard(range(1024, 512), Waker::noop()).is_ready());
    guard.complete().unwrap();
    assert_eq!(sectors(&image), [1, 7, 0, 1, 9, 9, 9, 9]);
    // Where there is only a part of a subcluster, and none of it here yet, nothing is given back.
    assert!(image.discard(range(SUB, 1024), Waker::noop()).is_ready());
    assert_eq!(sectors(&image), [1, 7, 0, 1, 9, 9, 9, 9]);
}

fn step(flush: &mut dyn Flush) -> Poll<FlushStep> {
    flush.step(Ok(()), Waker::noop()).map(Result::unwrap)
}

#[test]
fn a_flush_writes_what_it_took_and_leaves_what_came_later() {
    let (storage, _, image) = image();
    write_disk(&image, 0, &[1; SUB as usize]).unwrap();
    let mut flush = image.flush();
    assert!(matches!(step(&mut *flush), Poll::Ready(FlushStep::Sync(_))));
    storage.sync().unwrap();
    // The same cluster changes while the flush is under way.
    write_disk(&image, SUB, &[2; SUB as usize]).unwrap();
    flush.run().unwrap();
    let lost = || {
        let left = Arc::new(storage.after_power_loss(|| false));
        sectors(&Image::open(Parts::new(left, Some(base())), Mode::ReadOnly).unwrap())
    };
    assert_eq!(lost(), [1, 1, 1, 1, 9, 9, 9, 9]);
    assert_eq!(image.pending(), 1);
    image.flush().run().unwrap();
    assert_eq!(lost(), [1, 1, 1, 1, 2, 2, 2, 2]);
    assert!(image.is_clean());
}

/// What a flush that was asked for later is to cover: also data that went where data already was, of which no table
/// knows. A flush whose sync may have begun before that is not good enough for it.
#[test]
fn a_flush_under_way_does_not_answer_for_data_written_since() {
    let (storage, _, image) = image();
    write_disk(&image, 0, &[1; SUB as usize]).unwrap();
    image.flush().run().unwrap();
    let mut first = image.flush();
    assert!(matches!(step(&mut *first), Poll::Ready(FlushStep::Sync(_))));
    storage.sync().unwrap();
    write_disk(&image, 0, &[2; 512]).unwrap();
    let mut second = image.flush();
    assert!(step(&mut *second).is_pending());
    assert!(matches!(step(&mut *first), Poll::Ready(FlushStep::Done)));
    assert!(matches!(step(&mut *second), Poll::Ready(FlushStep::Sync(_))));
    storage.sync().unwrap();
    assert!(matches!(step(&mut *second), Poll::Ready(FlushStep::Done)));
    let left = Arc::new(storage.after_power_loss(|| false));
    let image = Image::open(Parts::new(left, Some(base())), Mode::ReadOnly).unwrap();
    assert_eq!(sectors(&image), [2, 1, 1, 1, 9, 9, 9, 9]);
}
