use super::*;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::task::{Poll, Waker};
use std::time::Duration;

use block::testing::MemStorage;
use block::{ByteRange, Extent, Flush, RawDisk, WriteGuard};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::allowance::Allowance;
use crate::dirty::Log;

const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const SIZE: u16 = 16;

fn guest() -> Memory {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(0x4000).unwrap();
    Memory::from_ranges_with_files([(GuestAddress(0), 0x4000, Some(FileOffset::new(file, 0)))]).unwrap()
}

fn raw() -> RawDisk {
    RawDisk::new(Arc::new(MemStorage::new(4096)), false).unwrap()
}

fn worker(guest: &Memory, disk: Arc<dyn Disk>) -> (Worker, Vring) {
    let maps = Arc::new(Maps::new(Allowance::share(1)).unwrap());
    maps.announce(guest.iter().map(GuestMemoryRegion::len)).unwrap();
    maps.publish(guest).unwrap();
    let memory = maps.current();
    let worker = Worker::new(Parts {
        name: "vda".to_owned(),
        queue: 0,
        disk,
        serial: [0; ID_LEN],
        gate: Arc::default(),
        pulse: Arc::default(),
        parking: Arc::default(),
        on_failure: Arc::new(|_| {}),
        cache: Arc::new(CacheMode::new(Arc::default())),
        maps,
        records: Records::default(),
        dirty: Arc::new(Dirty::new(1)),
        claim: Arc::new(Claim::new(&Arc::default())),
        state: Arc::new(QueueState::new().unwrap()),
    });
    let vring = Vring::new(memory, 256).unwrap();
    vring.set_queue_size(SIZE);
    vring.set_queue_info(0, AVAIL, USED).unwrap();
    vring.set_queue_event_idx(true);
    vring.set_enabled(true);
    vring.set_queue_ready(true);
    (worker.unwrap(), vring)
}

/// GET_VRING_BASE may be answered between a worker's last look at the ring and its wish for kicks. The guest uses the
/// ring's memory for something else by then.
#[test]
fn a_ring_that_was_stopped_is_not_written_to() {
    let guest = guest();
    let (mut worker, vring) = worker(&guest, Arc::new(raw()));
    let avail_event = GuestAddress(USED + 4 + 8 * u64::from(SIZE));
    assert_eq!(worker.pop(&vring), Popped::Empty);
    vring.set_queue_ready(false);
    guest.write_obj(0x5555_u16, avail_event).unwrap();
    guest.write_obj(7_u16, GuestAddress(AVAIL + 2)).unwrap();
    assert!(!worker.rearm(&vring));
    assert_eq!(guest.read_obj::<u16>(avail_event).unwrap(), 0x5555);
    vring.set_queue_ready(true);
    assert!(worker.rearm(&vring), "seven requests wait");
    assert_eq!(guest.read_obj::<u16>(avail_event).unwrap(), 0);
}

/// It is told where nothing else of the ring is written to, if the ring ends with a page; and before anything is answered.
#[test]
fn what_the_driver_is_told_of_kicks_is_logged() {
    let guest = guest();
    let (mut worker, vring) = worker(&guest, Arc::new(raw()));
    let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(8).unwrap();
    worker.dirty.set_log(Arc::new(Log::map(file.try_clone().unwrap().into(), 0, 8).unwrap()));
    worker.dirty.set_all(true);
    worker.dirty.set_used(0, Some(0x3000 - 4 - 8 * u64::from(SIZE)));
    let marked = || {
        let mut bits = [0; 8];
        file.read_exact_at(&mut bits, 0).unwrap();
        file.write_all_at(&[0; 8], 0).unwrap();
        u64::from_le_bytes(bits)
    };
    assert_eq!(worker.pop(&vring), Popped::Empty);
    assert_eq!(marked(), 0);
    assert!(!worker.rearm(&vring));
    assert_eq!(marked(), 1 << 2 | 1 << 3);
    guest.write_obj(1_u16, GuestAddress(AVAIL + 2)).unwrap();
    assert_eq!(worker.pop(&vring), Popped::Some);
    assert_eq!(marked(), 1 << 2 | 1 << 3);
}

/// A disk that takes long to find anything, and notes how many requests had been answered each time it was asked.
#[derive(Debug)]
struct Slow {
    disk: RawDisk,
    guest: Memory,
    answered: Mutex<Vec<u16>>,
}

impl Disk for Slow {
    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    fn read_only(&self) -> bool {
        self.disk.read_only()
    }

    fn discard_granularity(&self) -> u32 {
        self.disk.discard_granularity()
    }

    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        self.answered.lock().unwrap().push(self.guest.read_obj(GuestAddress(USED + 2)).unwrap());
        std::thread::sleep(Duration::from_millis(1));
        self.disk.resolve_read(range, out)
    }

    fn resolve_write(
        &self,
        range: ByteRange,
        waker: &Waker,
        out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>> {
        self.disk.resolve_write(range, waker, out)
    }

    fn discard(&self, range: ByteRange, waker: &Waker) -> Poll<Result<()>> {
        self.disk.discard(range, waker)
    }

    fn write_zeroes(&self, range: ByteRange, unmap: bool, waker: &Waker) -> Poll<Result<()>> {
        self.disk.write_zeroes(range, unmap, waker)
    }

    fn flush(&self) -> Box<dyn Flush> {
        self.disk.flush()
    }
}

/// Offers `count` reads of the first sector, each with a header of its own.
fn offer_reads(guest: &Memory, count: u16) {
    let (header, data, status) = (0x3000, 0x3100, 0x3400);
    guest.write_obj(u64::from(VIRTIO_BLK_T_IN), GuestAddress(header)).unwrap();
    guest.write_obj(0_u64, GuestAddress(header + 8)).unwrap();
    let (next, write) = (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16);
    let describe = |index: u16, addr, len, flags, next| {
        let descriptor = Descriptor::new(addr, len, flags, next);
        guest.write_obj(descriptor, GuestAddress(u64::from(index) * 16)).unwrap();
    };
    describe(14, data, 512, next | write, 15);
    describe(15, status, 1, write, 0);
    for head in 0..count {
        describe(head, header, 16, next, 14);
        guest.write_obj(head, GuestAddress(AVAIL + 4 + 2 * u64::from(head))).unwrap();
    }
    guest.write_obj(count, GuestAddress(AVAIL + 2)).unwrap();
}

/// On a long chain of which nothing was known yet the first requests took a second: none was answered before the tables of
/// all of them had been read.
#[test]
fn what_takes_long_to_find_does_not_hold_up_what_is_found() {
    let guest = guest();
    let slow = Slow { disk: raw(), guest: guest.clone(), answered: Mutex::default() };
    let slow = Arc::new(slow);
    let (mut worker, vring) = worker(&guest, Arc::clone(&slow) as _);
    offer_reads(&guest, 10);
    worker.turn(&vring);
    assert_eq!(*slow.answered.lock().unwrap(), [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]);
    assert_eq!(guest.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 10);
    assert_eq!(worker.state.in_flight(), 0);
}

/// Only the ring's index is in memory, and says that something was offered. Such a ring once took a slot at each look.
#[test]
fn a_ring_that_is_not_all_in_memory_costs_no_slots() {
    let guest = guest();
    let (mut worker, vring) = worker(&guest, Arc::new(raw()));
    let end = 0x4000;
    vring.set_queue_info(0, end - 4, USED).unwrap();
    guest.write_obj(1_u16, GuestAddress(end - 2)).unwrap();
    for _ in 0..2 * SLOTS {
        assert_eq!(worker.pop(&vring), Popped::Blocked);
    }
    vring.set_queue_info(0, AVAIL, USED).unwrap();
    offer_reads(&guest, 10);
    worker.turn(&vring);
    assert_eq!(guest.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 10);
}
