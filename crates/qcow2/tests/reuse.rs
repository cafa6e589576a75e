//! Clusters that are freed and used again, while others read and write: bytes of one place never show in another.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::thread;

use block::testing::{CrashStorage, FaultStorage, MemStorage, Random};
use block::{ByteRange, Disk, Extent, RawDisk, Source, blocking, read_disk, write_disk};
use qcow2::{Image, Journal, Mode, Parts};
use support::{Files, Verdict, assert_same, check, contents, memory, options};

const CAPACITY: u64 = 2 << 20;
const CLUSTER: u64 = 1 << 16;
const SUB: u64 = 2048;

/// What a place holds tells the place: its sector's number, and who wrote it last.
fn stamp(offset: u64, turn: u32) -> Vec<u8> {
    let mut sector = [0; 512];
    sector[..8].copy_from_slice(&(offset / 512 + 1).to_be_bytes());
    sector[8..12].copy_from_slice(&turn.to_be_bytes());
    sector.to_vec()
}

fn stamps(offset: u64, len: u64, turn: u32) -> Vec<u8> {
    (offset..offset + len).step_by(512).flat_map(|at| stamp(at, turn)).collect()
}

/// That each sector of `found` is zero or was written there.
fn assert_own(found: &[u8], offset: u64, story: &str) {
    for (sector, at) in found.chunks(512).zip((offset..).step_by(512)) {
        let number = u64::from_be_bytes(sector[..8].try_into().unwrap());
        assert!(number == 0 || number == at / 512 + 1, "{story}: sector {} holds {number}", at / 512 + 1);
        assert!(number != 0 || sector.iter().all(|byte| *byte == 0), "{story}: torn");
    }
}

/// Resolves, takes its time, and then reads: a cluster that was freed meanwhile must not be another's yet.
fn slow_read(image: &Image, range: ByteRange) -> Vec<u8> {
    let mut extents: Vec<Extent> = Vec::new();
    image.resolve_read(range, &mut extents).unwrap();
    (0..20).for_each(|_| thread::yield_now());
    let mut bytes = Vec::new();
    for extent in &extents {
        let mut part = vec![0; extent.len as usize];
        if let Source::File { storage, offset } = &extent.source {
            storage.read_at(&mut part, *offset).unwrap();
        }
        bytes.extend(part);
    }
    bytes
}

/// Each thread owns every third cluster for its writes, and reads everywhere.
fn work(image: &Image, thread: u64, seed: u64) -> Vec<(u64, Vec<u8>)> {
    let mut random = Random(seed * 1000 + thread);
    let clusters = CAPACITY / CLUSTER / 3;
    let mut mine: Vec<(u64, Vec<u8>)> =
        (0..clusters).map(|n| ((n * 3 + thread) * CLUSTER, vec![0; CLUSTER as usize])).collect();
    for turn in 0..400 {
        let index = random.below(clusters) as usize;
        let (start, expected) = &mut mine[index];
        let whole = ByteRange { offset: *start, len: CLUSTER };
        match random.below(8) {
            0..=2 => {
                blocking(|waker| image.discard(whole, waker)).unwrap();
                expected.fill(0);
            }
            3 => {
                blocking(|waker| image.write_zeroes(whole, random.0 & 1 == 0, waker)).unwrap();
                expected.fill(0);
            }
            4 => {
                // Aborted after its bytes went out: its room is another's next.
                let mut extents = Vec::new();
                let guard = blocking(|waker| image.resolve_write(whole, waker, &mut extents)).unwrap();
                drop(guard);
                let now = slow_read(image, whole);
                assert_own(&now, *start, "aborted");
            }
            _ => {
                let sub = random.below(CLUSTER / SUB - 4) * SUB;
                let bytes = stamps(*start + sub, SUB * (1 + random.below(4)), turn);
                write_disk(image, *start + sub, &bytes).unwrap();
                expected[sub as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
        }
        assert_same(&slow_read(image, whole), expected, "what this thread alone writes");
        let anywhere = ByteRange { offset: random.below(CAPACITY / CLUSTER) * CLUSTER, len: CLUSTER };
        assert_own(&slow_read(image, anywhere), anywhere.offset, "what others write");
    }
    mine
}

#[test]
fn what_is_freed_shows_nowhere_else_while_somebody_reads_it() {
    for seed in 0..4 {
        let storage = memory();
        let files = Files::new(storage.clone(), &options(CAPACITY, 16, seed % 2 == 0));
        // One slice at a time: entries are read from the file again and again.
        let image =
            files.open_parts(Parts { cache_bytes: 0, ..Parts::new(files.image.clone(), None) }).unwrap();
        let over = AtomicBool::new(false);
        let mut expected = vec![0; CAPACITY as usize];
        thread::scope(|scope| {
            let flusher = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    image.flush().run().unwrap();
                    thread::yield_now();
                }
            });
            let workers: Vec<_> = (0..3)
                .map(|thread| (thread, &image))
                .map(|(thread, image)| scope.spawn(move || work(image, thread, seed)))
                .collect();
            for (start, bytes) in workers.into_iter().flat_map(|worker| worker.join().unwrap()) {
                expected[start as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            over.store(true, Ordering::Relaxed);
            flusher.join().unwrap();
        });
        assert_same(&contents(&image), &expected, &format!("seed {seed}"));
        // It was used again, not only freed: else the file would be many times as long.
        assert!(storage.bytes().len() as u64 <= 3 * CAPACITY, "{}", storage.bytes().len());
        drop(image);
        let image = files.open(None).unwrap();
        assert_same(&contents(&image), &expected, &format!("seed {seed}, after a kill"));
        image.flush().run().unwrap();
        assert_eq!(check(&storage.bytes()).errors, Vec::<String>::new());
    }
}

fn host_of(image: &Image, offset: u64) -> Option<u64> {
    let mut extents = Vec::new();
    image.resolve_read(ByteRange { offset, len: 512 }, &mut extents).unwrap();
    match extents[0].source {
        Source::File { offset, .. } => Some(offset),
        _ => None,
    }
}

fn discard(image: &Image, offset: u64, len: u64) {
    blocking(|waker| image.discard(ByteRange { offset, len }, waker)).unwrap();
}

#[test]
fn a_freed_cluster_waits_for_the_flush_and_for_its_readers() {
    let storage = memory();
    let files = Files::new(storage.clone(), &options(CAPACITY, 16, true));
    let image = files.open(None).unwrap();
    let write = |n: u64| write_disk(&image, n * CLUSTER, &[n as u8 + 1; CLUSTER as usize]).unwrap();
    write(0);
    image.flush().run().unwrap();
    let first = host_of(&image, 0).unwrap();
    let mut reader = Vec::new();
    image.resolve_read(ByteRange { offset: 0, len: 512 }, &mut reader).unwrap();
    discard(&image, 0, CLUSTER);
    assert_eq!(host_of(&image, 0), None);
    // The tables on disk still name it.
    write(1);
    assert_ne!(host_of(&image, CLUSTER), Some(first));
    image.flush().run().unwrap();
    assert_eq!(check(&storage.bytes()), Verdict::default());
    // Somebody may still be reading it.
    write(2);
    assert_ne!(host_of(&image, 2 * CLUSTER), Some(first));
    let mut found = [0; 512];
    files.image.read_at(&mut found, first).unwrap();
    assert_eq!(found, [1; 512], "its bytes are gone while somebody reads them");
    drop(reader);
    write(3);
    assert_eq!(host_of(&image, 3 * CLUSTER), Some(first));
    image.flush().run().unwrap();
    assert_eq!(check(&storage.bytes()), Verdict::default());
}

#[test]
fn a_job_keeps_the_bytes_of_what_it_frees_and_uses_none_of_it_again() {
    let files = Files::new(memory(), &options(CAPACITY, 16, true));
    write_disk(&files.open(None).unwrap(), 0, &[7; CLUSTER as usize]).unwrap();
    let journal = Journal::open(files.journal[0].clone(), files.journal[1].clone(), "this boot").unwrap();
    let image = Image::open(Parts::new(files.image.clone(), None), Mode::Job(journal)).unwrap();
    let first = host_of(&image, 0).unwrap();
    discard(&image, 0, CLUSTER);
    image.flush().run().unwrap();
    for n in 1..4 {
        write_disk(&image, n * CLUSTER, &[1; CLUSTER as usize]).unwrap();
        image.flush().run().unwrap();
    }
    // Who knows the image by its runs finds what was there.
    let mut found = [0; 512];
    files.image.read_at(&mut found, first).unwrap();
    assert_eq!(found, [7; 512]);
    drop(image);
    let image = files.open(None).unwrap();
    write_disk(&image, 5 * CLUSTER, &[1; CLUSTER as usize]).unwrap();
    image.flush().run().unwrap();
    write_disk(&image, 6 * CLUSTER, &[1; CLUSTER as usize]).unwrap();
    assert!([5, 6].iter().any(|n| host_of(&image, n * CLUSTER) == Some(first)), "it is free by now");
}

/// What one who knows the image by its runs has resolved outlasts the job, and the next one.
#[test]
fn what_a_job_freed_is_no_room_for_the_next_job() {
    let files = Files::new(memory(), &options(CAPACITY, 16, true));
    let image = files.open(None).unwrap();
    (0..4).for_each(|n| write_disk(&image, n * CLUSTER, &[7; CLUSTER as usize]).unwrap());
    image.seal();
    image.flush().run().unwrap();
    let known: Vec<u64> = (0..4).map(|n| host_of(&image, n * CLUSTER).unwrap()).collect();
    for turn in 0..3 {
        let journal = Journal::open(files.journal[0].clone(), files.journal[1].clone(), "this boot").unwrap();
        let job = Image::open(Parts::new(files.image.clone(), None), Mode::Job(journal)).unwrap();
        discard(&job, turn * CLUSTER, CLUSTER);
        job.flush().run().unwrap();
        (8..12).for_each(|n| write_disk(&job, n * CLUSTER, &[turn as u8; CLUSTER as usize]).unwrap());
        assert!((8..12).all(|n| !known.contains(&host_of(&job, n * CLUSTER).unwrap())), "turn {turn}");
        discard(&job, 8 * CLUSTER, 4 * CLUSTER);
        job.seal();
        job.flush().run().unwrap();
        for at in &known {
            let mut found = [0; 512];
            files.image.read_at(&mut found, *at).unwrap();
            assert_eq!(found, [7; 512], "turn {turn}");
        }
    }
}

/// A layer is sealed and flushed, and opened anew for writing, while a flush of before still waits for its turn and
/// somebody still reads what was freed last: that flush took the new writer's clusters for its own free ones.
#[test]
fn a_late_flush_of_a_sealed_image_leaves_alone_what_another_writes_by_then() {
    let storage = memory();
    let files = Files::new(storage.clone(), &options(CAPACITY, 16, true));
    let image = files.open(None).unwrap();
    write_disk(&image, 0, &[1; CLUSTER as usize]).unwrap();
    image.flush().run().unwrap();
    let first = host_of(&image, 0).unwrap();
    let mut reader = Vec::new();
    image.resolve_read(ByteRange { offset: 0, len: 512 }, &mut reader).unwrap();
    discard(&image, 0, CLUSTER);
    image.seal();
    image.flush().run().unwrap();
    image.close().unwrap();

    let next = files.open(None).unwrap();
    write_disk(&next, CLUSTER, &[7; CLUSTER as usize]).unwrap();
    assert_eq!(host_of(&next, CLUSTER), Some(first), "the room of what was freed is not used again");
    drop(reader);
    image.flush().run().unwrap();
    let mut found = [0; CLUSTER as usize];
    read_disk(&next, CLUSTER, &mut found).unwrap();
    assert!(found == [7; CLUSTER as usize], "what the next writer wrote is gone");
    next.seal();
    next.flush().run().unwrap();
    assert_eq!(check(&storage.bytes()), Verdict::default());
}

/// A flush had failed, so the journal could not be turned. The last flush takes away all of it, and with it the reason to
/// keep what was freed.
#[test]
fn what_a_failed_flush_left_to_be_freed_is_no_leak_of_a_sealed_image() {
    let storage = memory();
    let files = Files::new(storage.clone(), &options(CAPACITY, 16, true));
    let image = files.open(None).unwrap();
    write_disk(&image, 0, &[1; CLUSTER as usize]).unwrap();
    image.flush().run().unwrap();
    discard(&image, 0, CLUSTER);
    write_disk(&image, CLUSTER, &[2; CLUSTER as usize]).unwrap();
    storage.fail_writes(1);
    image.flush().run().unwrap_err();
    discard(&image, CLUSTER, CLUSTER);
    write_disk(&image, 2 * CLUSTER, &[3; CLUSTER as usize]).unwrap();
    image.seal();
    image.flush().run().unwrap();
    assert_eq!(check(&storage.bytes()), Verdict::default());
}

/// A disk that is written and discarded all the time needs no more room than it has.
#[test]
fn a_file_does_not_grow_for_ever() {
    for extended in [false, true] {
        let storage = memory();
        let files = Files::new(storage.clone(), &options(CAPACITY, 16, extended));
        let mut image = files.open(None).unwrap();
        let mut longest = 0;
        for round in 0..30 {
            for n in 0..CAPACITY / CLUSTER {
                write_disk(&image, n * CLUSTER, &stamps(n * CLUSTER, CLUSTER, round)).unwrap();
            }
            image.flush().run().unwrap();
            discard(&image, 0, CAPACITY);
            image.flush().run().unwrap();
            assert_eq!(check(&storage.bytes()), Verdict::default());
            if round == 2 {
                longest = storage.bytes().len();
            }
            if round % 7 == 6 {
                // Another process finds the free clusters by their refcounts.
                drop(image);
                image = files.open(None).unwrap();
            }
        }
        assert!(storage.bytes().len() <= longest + 2 * CAPACITY as usize, "{}", storage.bytes().len());
    }
}

/// What a loss of power leaves: each place has what was written there, never what another wrote to its old room.
#[test]
fn power_lost_between_freeing_and_using_again_mixes_nothing() {
    let mut reused = 0;
    for seed in 0..6 {
        let storage = Arc::new(CrashStorage::new());
        let files = Files::new(storage.clone(), &options(CAPACITY, 16, seed % 2 == 0));
        let base: Arc<dyn Disk> =
            Arc::new(RawDisk::new(Arc::new(MemStorage::from(stamps(0, CAPACITY / 2, 9999))), true).unwrap());
        let image = files.open(Some(base.clone())).unwrap();
        let mut random = Random(seed);
        let mut homes = std::collections::HashSet::new();
        for turn in 0..80 {
            let offset = random.below(12) * CLUSTER;
            match random.below(6) {
                0 | 1 => discard(&image, offset, CLUSTER),
                2 => {
                    let mut flush = image.flush();
                    // Cut short at times.
                    for _ in 0..1 + random.below(4) {
                        match flush.step(Ok(()), Waker::noop()) {
                            Poll::Ready(Ok(block::FlushStep::Sync(files))) => {
                                files.iter().for_each(|file| file.sync().unwrap());
                            }
                            _ => break,
                        }
                    }
                }
                _ => {
                    write_disk(&image, offset, &stamps(offset, CLUSTER, turn)).unwrap();
                    reused += usize::from(!homes.insert(host_of(&image, offset)));
                }
            }
            for chance in [0, 50, 100] {
                let left = storage.after_power_loss(|| random.below(100) < chance);
                assert_eq!(check(&left.bytes()).errors, Vec::<String>::new(), "seed {seed}");
                let seen =
                    Image::open(Parts::new(Arc::new(left), Some(base.clone())), Mode::ReadOnly).unwrap();
                assert_own(&contents(&seen), 0, &format!("seed {seed}, turn {turn}"));
            }
        }
    }
    assert!(reused > 50, "only {reused} clusters were used again");
}

/// A full host fails nothing that needs no room: a file that is only opened, with what a journal says, is not written.
#[test]
fn an_image_opens_on_a_full_host() {
    let storage: Arc<FaultStorage> = memory();
    let files = Files::new(storage.clone(), &options(CAPACITY, 16, true));
    let image = files.open(None).unwrap();
    write_disk(&image, 0, &[7; CLUSTER as usize]).unwrap();
    image.seal();
    image.flush().run().unwrap();
    drop(image);
    storage.limit_len(0);
    storage.fail_writes(u64::MAX);
    let journal = [memory(), memory()];
    journal.iter().for_each(|half| half.fail_writes(u64::MAX));
    let [a, b] = journal;
    let journal = Journal::open(a, b, "another boot").unwrap();
    let image = Image::open(Parts::new(storage, None), Mode::Writable(journal)).unwrap();
    let mut found = [0; 512];
    read_disk(&image, 0, &mut found).unwrap();
    assert_eq!(found, [7; 512]);
    write_disk(&image, 0, &[8; 512]).unwrap_err();
}
