//! Drivers of ill will: whatever they do, the disk is served, and so are the others.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use block::testing::Random;
use block::{RawDisk, Storage};
use frazil_tests::{Desc, Driver, FrontEnd, Request};
use hostio::{Cache, HostFile};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use super::messages::Before;
use super::served::{MIB, Served, wait_until};

const DATA: u64 = FrontEnd::DATA;
const NEXT: u16 = FrontEnd::NEXT;
const WRITE: u16 = FrontEnd::WRITE;
const SOON: Duration = Duration::from_secs(10);

fn front_end(served: &Served, without: u64) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&served.socket, 1, without).unwrap();
    front_end.set_memory(2).unwrap();
    front_end.start(0).unwrap();
    front_end
}

/// The session still works, on the same ring.
fn assert_alive(front_end: &mut FrontEnd) {
    front_end.header(DATA, 4, 0);
    front_end.descriptors(0, 0, &[(DATA, 16, NEXT, 1), (DATA + 16, 1, WRITE, 0)]);
    front_end.offer(0, 0);
    assert_eq!(front_end.used(0, SOON), Some((0, 1)));
}

#[test]
fn broken_chains_are_given_back_and_the_ring_goes_on() {
    let (served, _) = Served::memory(MIB, 1);
    let before = Before::new(&served);
    let mut front_end = front_end(&served, 0);
    let chains: &[&[Desc]] = &[
        &[(DATA, 16, NEXT, 0)],
        &[(DATA, 16, NEXT, 1), (DATA + 16, 1, WRITE | NEXT, 0)],
        &[(DATA, 16, NEXT, 999)],
        &[(DATA, 16, 0, 0)],
        &[(DATA, 16, NEXT, 1), (DATA + 16, 1, WRITE | NEXT, 2), (DATA, 16, 0, 0)],
        &[(0x7fff_0000, 48, FrontEnd::INDIRECT, 0)],
        // A status that can not be written.
        &[(DATA, 16, NEXT, 1), (0x7fff_0000, 1, WRITE, 0)],
        &[(DATA, 16, NEXT, 1), (u64::MAX, 2, WRITE, 0)],
    ];
    for chain in chains {
        front_end.header(DATA, 4, 0);
        front_end.descriptors(0, 0, chain);
        front_end.offer(0, 0);
        assert_eq!(front_end.used(0, SOON), Some((0, 0)), "{chain:x?}");
        assert_alive(&mut front_end);
    }
    drop(front_end);
    before.check(&served);
}

#[test]
fn requests_with_data_out_of_memory_are_errors() {
    let (served, storage) = Served::memory(MIB, 1);
    let mut front_end = front_end(&served, 0);
    for (kind, flags) in [(0, WRITE), (1, 0), (8, WRITE)] {
        for (addr, len) in [(0x7fff_0000, 512), (2 * MIB as u64 - 256, 512), (u64::MAX - 100, 512)] {
            front_end.header(DATA, kind, 0);
            let chain = [(DATA, 16, NEXT, 1), (addr, len, NEXT | flags, 2), (DATA + 0x800, 1, WRITE, 0)];
            front_end.descriptors(0, 0, &chain);
            front_end.offer(0, 0);
            assert_eq!(front_end.used(0, SOON), Some((0, 1)));
            assert_eq!(front_end.memory().read_obj::<u8>(GuestAddress(DATA + 0x800)).unwrap(), 1);
        }
    }
    assert_eq!(storage.bytes(), vec![0; MIB]);
    assert_alive(&mut front_end);
}

#[test]
fn a_head_past_the_table_and_an_index_far_ahead_are_survived() {
    let (served, _) = Served::memory(MIB, 1);
    let before = Before::new(&served);
    let mut front_end = front_end(&served, 0);
    front_end.offer(0, 4000);
    assert_eq!(front_end.used(0, Duration::from_millis(20)), None, "there is no such chain to give back");
    assert_alive(&mut front_end);
    // More than the ring holds: the ring is broken until it is set up again.
    front_end.set_offered(0, 1000);
    assert_eq!(front_end.used(0, Duration::from_millis(20)), None);
    front_end.stop(0).unwrap();
    drop(front_end);
    before.check(&served);
}

#[test]
fn memory_that_goes_away_under_the_rings_is_survived() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = front_end(&served, 0);
    assert_alive(&mut front_end);
    // It may be refused, or not.
    drop(front_end.set_memory(0));
    front_end.set_offered(0, 7);
    drop(front_end);
    served.wait_sessions(1);
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    assert_eq!(driver.queues[0].ask(Request::Read(0)), 0);
}

#[test]
fn messages_that_make_no_sense_end_the_session_and_no_more() {
    use vhost::VhostBackend;
    let (served, _) = Served::memory(MIB, 1);
    let (other, _) = Served::memory(MIB, 1);
    let mut neighbour = Driver::connect(&other.socket, 1, 1, 4096).unwrap();
    let stories: [&dyn Fn(&mut FrontEnd); 4] = [
        &|front_end| drop(front_end.messages().set_vring_num(40, 16)),
        &|front_end| drop(front_end.messages().set_vring_num(0, 5000)),
        &|front_end| drop(front_end.messages().get_vring_base(60)),
        &|front_end| drop(front_end.messages().set_features(u64::MAX)),
    ];
    for (round, story) in stories.iter().enumerate() {
        let mut front_end = front_end(&served, 0);
        assert_alive(&mut front_end);
        story(&mut front_end);
        // It stays connected.
        served.wait_sessions(round + 1);
        assert_eq!(neighbour.queues[0].ask(Request::Read(0)), 0);
    }
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    assert_eq!(driver.queues[0].ask(Request::Read(0)), 0);
}

/// They keep the worker of that ring busy, and nothing waits for it.
#[test]
fn kicks_without_end_hold_up_nobody_else() {
    let (served, _) = Served::memory(MIB, 2);
    let (other, _) = Served::memory(MIB, 1);
    let mut neighbour = Driver::connect(&other.socket, 1, 1, 4096).unwrap();
    // Each look takes one of them.
    let kick = EventFd::new(EFD_NONBLOCK | EFD_SEMAPHORE).unwrap();
    kick.write(1 << 60).unwrap();
    let left = || {
        let all = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", kick.as_raw_fd())).unwrap();
        let count = all.lines().find_map(|line| line.strip_prefix("eventfd-count:")).unwrap();
        u64::from_str_radix(count.trim(), 16).unwrap()
    };
    let mut front_end = FrontEnd::connect(&served.socket, 2, 0).unwrap();
    front_end.replace_kick(0, kick.try_clone().unwrap());
    front_end.set_memory(2).unwrap();
    (0..2).for_each(|ring| front_end.start(ring).unwrap());
    let chain = [(DATA, 16, NEXT, 1), (DATA + 16, 1, WRITE, 0)];
    front_end.header(DATA, 4, 0);
    (0..2).for_each(|ring| front_end.descriptors(FrontEnd::table(ring), 0, &chain));
    for _ in 0..100 {
        for ring in 0..2 {
            front_end.offer(ring, 0);
            assert_eq!(front_end.used(ring, SOON), Some((0, 1)));
        }
        assert_eq!(neighbour.queues[0].ask(Request::Write(0)), 0);
        let before = left();
        let closed = served.gate.close();
        closed.drain(Instant::now() + SOON).unwrap();
        wait_until("more kicks to be looked at", || left() < before);
    }
    front_end.stop(0).unwrap();
    let stopped = left();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(left(), stopped, "a ring that is stopped is not looked at");
    front_end.start(0).unwrap();
    wait_until("more kicks to be looked at", || left() < stopped);
    drop(front_end);
    served.wait_sessions(1);
}

/// Chains of four that a racing thread changes while they are looked at, 16 of them in the ring at once.
mod raced {
    use super::*;

    const CHAINS: u16 = 16;

    fn header(head: u16) -> u64 {
        DATA + 0x1000 * u64::from(head)
    }

    /// What is sound at one look and is not at the next: kinds, sectors, addresses, lengths, flags, links.
    pub(super) fn change(memory: &GuestMemoryMmap<()>, stop: &AtomicBool) {
        let mut dice = Random(7);
        while !stop.load(Ordering::Relaxed) {
            let head = dice.below(u64::from(CHAINS)) as u16;
            let descriptor = FrontEnd::table(0) + 64 * u64::from(head);
            let (kind, sector) = (header(head), header(head) + 8);
            let data = descriptor + 16;
            match dice.below(6) {
                0 => set(memory, kind, dice.pick(&[0_u32, 1, 4, 8, 11, 13])),
                1 => set(memory, sector, dice.pick(&[0_u64, 2047, 2048, u64::MAX / 512])),
                2 => set(memory, data, dice.pick(&[header(head) + 0x100, 0x7fff_0000, u64::MAX - 255])),
                3 => set(memory, data + 8, dice.pick(&[512_u32, 1024, 0, u32::MAX - 511])),
                4 => set(memory, data + 12, dice.pick(&[NEXT, NEXT | WRITE, 0, FrontEnd::INDIRECT])),
                _ => set(memory, data + 14, dice.pick(&[head * 4 + 2, head * 4, 999])),
            }
        }
    }

    fn set<T: vm_memory::ByteValued>(memory: &GuestMemoryMmap<()>, at: u64, value: T) {
        memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Offers all chains and has them back, each once.
    pub(super) fn round(front_end: &mut FrontEnd) {
        for head in 0..CHAINS {
            let at = header(head);
            let status = (at + 0x800, 1, WRITE, 0);
            front_end.header(at, 1, 0);
            let first = head * 4;
            let data = (at + 0x100, 512, NEXT, first + 2);
            front_end.descriptors(FrontEnd::table(0), first, &[(at, 16, NEXT, first + 1), data, status]);
            front_end.offer(0, first);
        }
        let mut back: Vec<_> = (0..CHAINS).map(|_| front_end.used(0, SOON).expect("an answer").0).collect();
        back.sort_unstable();
        assert_eq!(back, (0..CHAINS).map(|head| u32::from(head) * 4).collect::<Vec<_>>());
    }
}

/// Whoever reads a header or a descriptor twice writes where it has not looked: past the disk's end, to a disk that is read
/// only, to memory of its own.
#[test]
fn what_a_racing_thread_changes_is_judged_as_it_is_used() {
    let (other, _) = Served::memory(MIB, 1);
    let mut neighbour = Driver::connect(&other.socket, 1, 1, 4096).unwrap();
    for read_only in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let file = Arc::new(HostFile::create(&folder.path().join("disk.raw"), Cache::Writeback).unwrap());
        file.set_len(MIB as u64).unwrap();
        let disk = RawDisk::new(Arc::clone(&file) as Arc<dyn Storage>, read_only).unwrap();
        let served = Served::disk(Arc::new(disk), 1);
        let mut front_end = front_end(&served, 0);
        let (memory, stop) = (front_end.memory().clone(), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| raced::change(&memory, &stop));
            let _stop = Stop(&stop);
            (0..200).for_each(|_| raced::round(&mut front_end));
        });
        assert_alive(&mut front_end);
        assert_eq!(neighbour.queues[0].ask(Request::Read(0)), 0);
        let now = std::fs::read(folder.path().join("disk.raw")).unwrap();
        assert_eq!(now.len(), MIB);
        assert!(!read_only || now == vec![0; MIB], "a disk that is read only was written");
    }
}

/// Ends the other thread, when a test fails too.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_ring_without_event_index_works_too() {
    const EVENT_IDX: u64 = 1 << 29;
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = front_end(&served, EVENT_IDX);
    for _ in 0..200 {
        assert_alive(&mut front_end);
    }
}
