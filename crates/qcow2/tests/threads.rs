//! Several threads on one image: writes that overlap in subclusters, but not in bytes, lose nothing of each other.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use block::testing::{MemStorage, Random};
use block::{ByteRange, Disk, RawDisk, blocking, read_disk, write_disk};
use qcow2::Image;
use support::{Files, Verdict, assert_same, check, contents, memory, options};

const CAPACITY: u64 = 1 << 20;
const THREADS: u64 = 4;
/// Each thread owns every fourth piece of this many bytes: two threads are in each subcluster.
const PIECE: u64 = 1024;

/// Writes and zeroes this thread's pieces in random order, some of them with a piece held open, and checks each at once.
fn work(image: &Image, thread: u64, seed: u64) -> Vec<(u64, u8)> {
    let mut random = Random(seed * 100 + thread);
    let mut written = Vec::new();
    for _ in 0..300 {
        let piece = random.below(CAPACITY / PIECE / THREADS) * THREADS + thread;
        let (offset, value) = (piece * PIECE, if random.below(5) == 0 { 0 } else { random.number() as u8 });
        if value == 0 {
            let range = ByteRange { offset, len: PIECE };
            blocking(|waker| image.write_zeroes(range, random.0 & 1 == 0, waker)).unwrap();
        } else {
            if random.below(8) == 0 {
                // Aborted: what it copied must not be seen, nor hinder those who wait for it.
                let range = ByteRange { offset, len: 100 };
                drop(blocking(|waker| image.resolve_write(range, waker, &mut Vec::new())).unwrap());
            }
            write_disk(image, offset, &[value; PIECE as usize]).unwrap();
        }
        let mut found = [0; PIECE as usize];
        read_disk(image, offset, &mut found).unwrap();
        assert_eq!(found, [value; PIECE as usize], "piece {piece} of thread {thread}");
        written.push((offset, value));
    }
    written
}

#[test]
fn overlapping_writes_to_new_room_lose_nothing() {
    for seed in 0..12 {
        let memory = memory();
        let files = Files::new(memory.clone(), &options(CAPACITY, 16, seed % 2 == 0));
        let bytes: Vec<u8> = (0..CAPACITY).map(|at| (at / 512 + 1) as u8).collect();
        let mut expected = bytes.clone();
        let base: Arc<dyn Disk> = Arc::new(RawDisk::new(Arc::new(MemStorage::from(bytes)), true).unwrap());
        let image = files.open(Some(base.clone())).unwrap();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let flusher = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    image.flush().run().unwrap();
                    thread::yield_now();
                }
            });
            let workers: Vec<_> = (0..THREADS)
                .map(|n| (n, &image))
                .map(|(n, image)| scope.spawn(move || work(image, n, seed)))
                .collect();
            for worker in workers {
                for (offset, value) in worker.join().unwrap() {
                    expected[offset as usize..][..PIECE as usize].fill(value);
                }
            }
            over.store(true, Ordering::Relaxed);
            flusher.join().unwrap();
        });
        assert_same(&contents(&image), &expected, &format!("seed {seed}"));
        // Killed here, the next process finds it all; and the file has no fault and no leak.
        drop(image);
        let image = files.open(Some(base)).unwrap();
        assert_same(&contents(&image), &expected, &format!("seed {seed}, reopened"));
        assert_eq!(check(&memory.bytes()), Verdict::default());
    }
}

#[test]
fn flushes_asked_for_together_are_one_or_two() {
    let files = Files::new(memory(), &options(CAPACITY, 16, true));
    let image = files.open(None).unwrap();
    write_disk(&image, 0, &[1; 4096]).unwrap();
    let mut first = image.flush();
    let first_step = blocking(|waker| first.step(Ok(()), waker)).unwrap();
    assert!(matches!(first_step, block::FlushStep::Sync(_)));
    // Asked for while the first is under way: they have to wait, for it may have begun before their writes.
    let mut others: Vec<_> = (0..3).map(|_| image.flush()).collect();
    let waker = std::task::Waker::noop();
    assert!(others.iter_mut().all(|flush| flush.step(Ok(()), waker).is_pending()));
    while !matches!(blocking(|waker| first.step(Ok(()), waker)).unwrap(), block::FlushStep::Done) {}
    others[0].run().unwrap();
    // The second began after all of them were asked for, so it was everybody's.
    for flush in &mut others[1..] {
        let step = blocking(|waker| flush.step(Ok(()), waker)).unwrap();
        assert!(matches!(step, block::FlushStep::Done));
    }
}
