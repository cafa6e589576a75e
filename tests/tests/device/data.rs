//! What is written is what is read.

use std::sync::Arc;
use std::thread;

use block::testing::MemStorage;
use block::{RawDisk, Storage};
use frazil_tests::{Driver, DriverQueue, FrontEnd, Request};
use hostio::Cache;
use vm_memory::{Bytes, GuestAddress};

use super::served::{MIB, Served, wait_until};

const EIO: i32 = -5;
const ENOTSUP: i32 = -95;
const BLOCK: usize = 4096;

/// A block's content: who wrote it, where, and for which time.
fn stamp(queue: usize, offset: u64, generation: u64) -> Vec<u8> {
    let words = [queue as u64, offset, generation, !generation];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.iter().copied().cycle().take(BLOCK).collect()
}

/// Writes a share of the disk again and again, `depth` requests at a time, and reads it all back.
fn exercise(mut queue: DriverQueue, number: usize, share: u64, depth: usize) {
    let blocks = share / BLOCK as u64;
    let offset = |block: u64| number as u64 * share + block * BLOCK as u64;
    let generations: Vec<u64> = (0..blocks).collect();
    let mut back = Vec::new();
    for (round, write) in [(0, true), (0, false), (1, true), (1, false)] {
        let mut next = 0;
        let mut held = vec![0; depth];
        let mut free: Vec<usize> = (0..depth).collect();
        while next < blocks || queue.in_flight() > 0 {
            while next < blocks
                && let Some(index) = free.pop()
            {
                // Not in order: a stride that has no factor in common with a power of two.
                let block = next * 7919 % blocks;
                held[index] = block;
                if write {
                    queue.fill(index, &stamp(number, offset(block), generations[block as usize] + round));
                    queue.queue(index, Request::Write(offset(block))).unwrap();
                } else {
                    queue.queue(index, Request::Read(offset(block))).unwrap();
                }
                next += 1;
            }
            queue.kick().unwrap();
            queue.wait(&mut back).unwrap();
            for (index, status) in back.drain(..) {
                assert_eq!(status, 0);
                let block = held[index];
                if !write {
                    let expected = stamp(number, offset(block), generations[block as usize] + round);
                    assert!(queue.bytes(index) == expected, "queue {number}, block {block}, round {round}");
                }
                free.push(index);
            }
        }
    }
    assert_eq!(queue.ask(Request::Flush), 0);
}

fn four_queues(served: &Served) {
    let mut driver = Driver::connect(&served.socket, 4, 32, BLOCK).unwrap();
    let share = driver.capacity().unwrap() / 4;
    let queues: Vec<_> = driver.queues.drain(..).enumerate().collect();
    let threads: Vec<_> = queues
        .into_iter()
        .map(|(number, queue)| thread::spawn(move || exercise(queue, number, share, 32)))
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    // Each queue: two rounds of writes and of reads, and a flush.
    let expected = 4 * (4 * share / BLOCK as u64 + 1);
    wait_until("the pulse of all requests", || {
        let pulse = served.pulse.read();
        (pulse.completed, pulse.in_flight) == (expected, 0) && pulse.samples >= expected / 128
    });
    assert!(!served.pulse.read().latency.is_zero());
}

#[test]
fn four_queues_at_once_keep_their_data_apart_in_a_cached_file() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    four_queues(&Served::file(folder.path(), 16 * MIB as u64, 4, Cache::Writeback));
}

#[test]
fn four_queues_at_once_keep_their_data_apart_past_the_page_cache() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    four_queues(&Served::file(folder.path(), 16 * MIB as u64, 4, Cache::None));
}

#[test]
fn four_queues_at_once_keep_their_data_apart_in_memory() {
    four_queues(&Served::memory(16 * MIB, 4).0);
}

#[test]
fn single_sectors_reach_a_file_that_is_opened_past_the_page_cache() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let served = Served::file(folder.path(), MIB as u64, 1, Cache::None);
    let mut driver = Driver::connect(&served.socket, 1, 1, 512).unwrap();
    let queue = &mut driver.queues[0];
    for sector in 0..16_u64 {
        queue.fill(0, &[sector as u8 + 1; 512]);
        assert_eq!(queue.ask(Request::Write(sector * 512)), 0);
    }
    for sector in 0..16_u64 {
        assert_eq!(queue.ask(Request::Read(sector * 512)), 0);
        assert_eq!(queue.bytes(0), [sector as u8 + 1; 512]);
    }
}

#[test]
fn discards_and_write_zeroes_read_as_zeroes() {
    for cache in [Cache::Writeback, Cache::None] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let served = Served::file(folder.path(), MIB as u64, 1, cache);
        let mut driver = Driver::connect(&served.socket, 1, 1, 65536).unwrap();
        let queue = &mut driver.queues[0];
        let zero = [
            Request::Discard(4096, 8192),
            Request::WriteZeroes(16384, 8192, true),
            Request::WriteZeroes(32768, 8192, false),
        ];
        queue.fill(0, &[7; 65536]);
        assert_eq!(queue.ask(Request::Write(0)), 0);
        zero.iter().for_each(|request| assert_eq!(queue.ask(*request), 0, "{request:?}"));
        assert_eq!(queue.ask(Request::Read(0)), 0);
        for (index, byte) in queue.bytes(0).into_iter().enumerate() {
            let zeroed = [4096..12288, 16384..24576, 32768..40960].iter().any(|range| range.contains(&index));
            assert_eq!(byte, if zeroed { 0 } else { 7 }, "byte {index}");
        }
    }
}

#[test]
fn a_read_only_disk_is_read_and_not_written() {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::from(vec![3; MIB]));
    let served = Served::disk(Arc::new(RawDisk::new(Arc::clone(&storage), true).unwrap()), 1);
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    assert_ne!(driver.features() & (1 << 5), 0, "RO is offered");
    let queue = &mut driver.queues[0];
    assert_eq!(queue.ask(Request::Read(0)), 0);
    assert_eq!(queue.bytes(0), [3; 4096]);
    assert_eq!(queue.ask(Request::Write(0)), EIO);
    assert_eq!(queue.ask(Request::Discard(0, 4096)), EIO);
    assert_eq!(queue.ask(Request::Flush), 0);
    let mut bytes = [0; 4096];
    storage.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [3; 4096]);
}

#[test]
fn requests_past_the_end_are_refused() {
    let (served, _) = Served::memory(MIB, 1);
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    let queue = &mut driver.queues[0];
    for offset in [MIB as u64, MIB as u64 - 512, u64::MAX / 4096 * 4096] {
        assert_eq!(queue.ask(Request::Read(offset)), EIO);
        assert_eq!(queue.ask(Request::Write(offset)), EIO);
    }
    assert_eq!(queue.ask(Request::Discard(MIB as u64 - 4096, 8192)), EIO);
    assert_eq!(queue.ask(Request::WriteZeroes(0, 1 << 30, false)), EIO);
    assert_eq!(queue.ask(Request::Read(0)), 0);
    assert_ne!(queue.ask(Request::Read(MIB as u64)), ENOTSUP);
}

#[test]
fn what_the_host_fails_is_an_error_to_the_guest() {
    let (served, storage) = Served::memory(MIB, 1);
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    let queue = &mut driver.queues[0];
    storage.fail_reads(1);
    assert_eq!(queue.ask(Request::Read(0)), EIO);
    assert_eq!(queue.ask(Request::Read(0)), 0);
    storage.fail_writes(1);
    assert_eq!(queue.ask(Request::Write(0)), EIO);
    assert_eq!(queue.ask(Request::Write(0)), 0);
    storage.fail_syncs(1);
    assert_eq!(queue.ask(Request::Flush), EIO);
    // The failure of a sync is final, though the storage would sync again.
    assert_eq!(queue.ask(Request::Flush), EIO);
    assert_eq!(queue.ask(Request::Write(0)), EIO);
}

/// With the write cache off a driver sends no flushes, so a write that could not be synced must not be acknowledged.
#[test]
fn with_the_write_cache_off_every_write_is_synced() {
    let (served, storage) = Served::memory(MIB, 1);
    let connect = || {
        let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
        front_end.set_memory(2).unwrap();
        front_end.start(0).unwrap();
        front_end.header(FrontEnd::DATA, 1, 0);
        let chain = [
            (FrontEnd::DATA, 16, FrontEnd::NEXT, 1),
            (FrontEnd::DATA + 0x1000, 512, FrontEnd::NEXT, 2),
            (FrontEnd::DATA + 0x800, 1, FrontEnd::WRITE, 0),
        ];
        front_end.descriptors(0, 0, &chain);
        front_end
    };
    let write = |front_end: &mut FrontEnd| {
        front_end.offer(0, 0);
        front_end.used(0, std::time::Duration::from_secs(10)).unwrap();
        front_end.memory().read_obj::<u8>(GuestAddress(FrontEnd::DATA + 0x800)).unwrap()
    };
    let mut front_end = connect();
    storage.fail_syncs(1);
    assert_eq!(write(&mut front_end), 0, "a cached write does not sync");
    storage.fail_syncs(0);
    use vhost::vhost_user::VhostUserFrontend;
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    front_end.messages().set_config(32, flags, &[0]).unwrap();
    assert_eq!(front_end.config(32, 1).unwrap(), [0]);
    assert_eq!(write(&mut front_end), 0);
    // The same guest, after its front-end lost the connection: it does not set the cache again.
    drop(front_end);
    let mut front_end = connect();
    assert_eq!(front_end.config(32, 1).unwrap(), [0]);
    assert_eq!(write(&mut front_end), 0);
    storage.fail_syncs(1);
    assert_eq!(write(&mut front_end), 1, "a write that was not synced was acknowledged");
}

#[test]
fn the_serial_is_told() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    front_end.set_memory(2).unwrap();
    front_end.start(0).unwrap();
    front_end.header(FrontEnd::DATA, 8, 0);
    let id = FrontEnd::DATA + 0x100;
    for (len, expected) in
        [(20, &b"frazil-serial-0001\0\0"[..]), (6, b"frazil"), (64, b"frazil-serial-0001\0\0")]
    {
        let chain = [
            (FrontEnd::DATA, 16, FrontEnd::NEXT, 1),
            (id, len, FrontEnd::NEXT | FrontEnd::WRITE, 2),
            (FrontEnd::DATA + 0x800, 1, FrontEnd::WRITE, 0),
        ];
        front_end.memory().write_slice(&[0xff; 64], GuestAddress(id)).unwrap();
        front_end.descriptors(0, 0, &chain);
        front_end.offer(0, 0);
        let used = front_end.used(0, std::time::Duration::from_secs(10)).unwrap();
        assert_eq!(used, (0, expected.len() as u32 + 1));
        let mut found = vec![0; expected.len()];
        front_end.memory().read_slice(&mut found, GuestAddress(id)).unwrap();
        assert_eq!(found, expected);
        assert_eq!(
            front_end.memory().read_obj::<u8>(GuestAddress(id + expected.len() as u64)).unwrap(),
            0xff
        );
    }
}

#[test]
fn a_buffer_across_two_memory_regions_is_one_buffer() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for cache in [Cache::Writeback, Cache::None] {
        let folder = tempfile::tempdir_in(folder.path()).unwrap();
        let served = Served::file(folder.path(), MIB as u64, 1, cache);
        let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
        front_end.set_memory(2).unwrap();
        front_end.start(0).unwrap();
        let at = FrontEnd::SEAM - 4096;
        let bytes: Vec<u8> = (0..8192_u32).map(|index| (index / 7) as u8).collect();
        front_end.memory().write_slice(&bytes, GuestAddress(at)).unwrap();
        for (kind, flags) in [(1, 0), (0, FrontEnd::WRITE)] {
            front_end.header(FrontEnd::DATA, kind, 8);
            let chain = [
                (FrontEnd::DATA, 16, FrontEnd::NEXT, 1),
                (at, 8192, FrontEnd::NEXT | flags, 2),
                (FrontEnd::DATA + 0x800, 1, FrontEnd::WRITE, 0),
            ];
            front_end.descriptors(0, 0, &chain);
            front_end.offer(0, 0);
            front_end.used(0, std::time::Duration::from_secs(10)).unwrap();
            assert_eq!(front_end.memory().read_obj::<u8>(GuestAddress(FrontEnd::DATA + 0x800)).unwrap(), 0);
            let mut found = vec![0; 8192];
            front_end.memory().read_slice(&mut found, GuestAddress(at)).unwrap();
            assert!(found == bytes);
            front_end.memory().write_slice(&[0; 8192], GuestAddress(at)).unwrap();
        }
    }
}
