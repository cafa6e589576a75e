//! Requests that wait for the host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::testing::{FaultStorage, MemStorage};
use block::{IoStatus, RawDisk, Storage, WriteErrors};
use frazil_tests::{Driver, DriverQueue, FrontEnd, Request};
use vm_memory::{Bytes, GuestAddress};

use super::served::{MIB, Served, wait_until};

const BLOCK: usize = 4096;
const EIO: i32 = -5;

fn served(policy: WriteErrors, queues: u16) -> (Served, Arc<FaultStorage>) {
    let storage = Arc::new(FaultStorage::new(MemStorage::new(MIB)));
    let disk = RawDisk::new(Arc::clone(&storage) as Arc<dyn Storage>, false).unwrap();
    (Served::with(Arc::new(disk), queues, policy), storage)
}

/// Asks with buffer `index`, while others are in flight.
fn ask(queue: &mut DriverQueue, index: usize, request: Request) -> i32 {
    queue.queue(index, request).unwrap();
    queue.kick().unwrap();
    let (mut back, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(10));
    while back.is_empty() {
        assert!(Instant::now() < deadline, "{request:?} was not answered");
        queue.wait_for(&mut back, Duration::from_millis(100)).unwrap();
    }
    assert_eq!((back.len(), back[0].0), (1, index));
    back[0].1
}

fn write(queue: &mut DriverQueue, index: usize) {
    queue.fill(index, &[index as u8 + 1; BLOCK]);
    queue.queue(index, Request::Write((index * BLOCK) as u64)).unwrap();
    queue.kick().unwrap();
}

fn all_back(queue: &mut DriverQueue) -> Vec<i32> {
    let (mut back, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(10));
    while queue.in_flight() > 0 {
        assert!(Instant::now() < deadline, "{} requests were not answered", queue.in_flight());
        queue.wait_for(&mut back, Duration::from_millis(100)).unwrap();
    }
    back.iter().map(|(_, status)| *status).collect()
}

#[test]
fn writes_wait_for_room_and_reads_and_flushes_do_not() {
    let (served, storage) = served(WriteErrors::Enospc, 2);
    let mut driver = Driver::connect(&served.socket, 2, 41, BLOCK).unwrap();
    storage.limit_len(0);
    let (one, two) = driver.queues.split_at_mut(1);
    (0..40).for_each(|index| write(&mut one[0], index));
    write(&mut two[0], 40);
    wait_until("all writes to be parked", || served.parking.parked() == 41);
    assert_eq!(served.parking.status(), IoStatus::NoSpace);
    let told: Vec<_> = served.failures.try_iter().collect();
    assert!(told.iter().all(|told| told.write && told.parked && told.no_space));
    assert_eq!(told.len(), 2, "one event from each queue: {told:?}");
    for queue in [&mut one[0], &mut two[0]] {
        for _ in 0..100 {
            assert_eq!(ask(queue, if queue.in_flight() > 1 { 40 } else { 0 }, Request::Read(0)), 0);
        }
        let index = if queue.in_flight() > 1 { 40 } else { 0 };
        assert_eq!(ask(queue, index, Request::Flush), 0);
    }
    // A try a second, in vain, of which nothing new is told.
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!((served.parking.parked(), served.failures.try_iter().count()), (41, 0));
    assert_eq!(storage.bytes(), vec![0; MIB]);

    storage.limit_len(u64::MAX);
    let start = Instant::now();
    assert_eq!(all_back(&mut one[0]), [0; 40]);
    assert_eq!(all_back(&mut two[0]), [0]);
    assert!(start.elapsed() < Duration::from_secs(5), "nobody tried them again");
    wait_until("the state to be well", || served.parking.status() == IoStatus::Ok);
    for index in 0..40 {
        assert_eq!(ask(&mut one[0], 40, Request::Read((index * BLOCK) as u64)), 0);
        assert_eq!(one[0].bytes(40), [index as u8 + 1; BLOCK], "block {index}");
    }
    let pulse = served.pulse.read();
    assert!(pulse.latency < Duration::from_secs(1), "the wait for room was taken for latency: {pulse:?}");
}

#[test]
fn told_to_go_on_they_do_at_once() {
    let (served, storage) = served(WriteErrors::Stop, 1);
    let mut driver = Driver::connect(&served.socket, 1, 4, BLOCK).unwrap();
    let queue = &mut driver.queues[0];
    storage.fail_writes(3);
    write(queue, 0);
    queue.queue(1, Request::Discard(0, MIB as u64)).unwrap();
    queue.queue(2, Request::WriteZeroes(0, MIB as u64, true)).unwrap();
    queue.kick().unwrap();
    wait_until("all to be parked", || served.parking.parked() == 3);
    assert_eq!(served.parking.status(), IoStatus::Failed);
    let start = Instant::now();
    served.parking.resume();
    assert_eq!(all_back(queue), [0; 3]);
    assert!(start.elapsed() < Duration::from_millis(700), "they waited for the next try");
}

#[test]
fn only_what_the_policy_names_waits() {
    let (served, storage) = served(WriteErrors::Enospc, 1);
    let mut driver = Driver::connect(&served.socket, 1, 1, BLOCK).unwrap();
    storage.fail_writes(1);
    assert_eq!(driver.queues[0].ask(Request::Write(0)), EIO);
    storage.fail_reads(1);
    assert_eq!(driver.queues[0].ask(Request::Read(0)), EIO);
    let told: Vec<_> = served.failures.try_iter().map(|told| (told.write, told.parked)).collect();
    assert_eq!(told, [(true, false), (false, false)]);
    assert_eq!(served.parking.parked(), 0);
}

/// The kernel tells of a lost page once. A second try would be told that all is well.
#[test]
fn a_failed_sync_is_final_whatever_the_policy() {
    let (served, storage) = served(WriteErrors::Stop, 1);
    let mut driver = Driver::connect(&served.socket, 1, 1, BLOCK).unwrap();
    storage.fail_syncs(1);
    for request in [Request::Flush, Request::Flush, Request::Write(0)] {
        assert_eq!(driver.queues[0].ask(request), EIO, "{request:?}");
    }
    assert_eq!(served.parking.parked(), 0);
}

/// What waits for the host is not in flight for the gate, and not tried while it is closed.
#[test]
fn a_cut_does_not_wait_for_them() {
    let (served, storage) = served(WriteErrors::Enospc, 1);
    let mut driver = Driver::connect(&served.socket, 1, 2, BLOCK).unwrap();
    let queue = &mut driver.queues[0];
    storage.limit_len(0);
    write(queue, 0);
    wait_until("it to be parked", || served.parking.parked() == 1);
    let closed = served.gate.close();
    closed.drain(Instant::now() + Duration::from_secs(1)).unwrap();
    storage.limit_len(u64::MAX);
    served.parking.resume();
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(storage.bytes(), vec![0; MIB], "a write went through a closed gate");
    assert_eq!((served.gate.in_flight(), served.parking.parked()), (0, 1));
    drop(closed);
    assert_eq!(all_back(queue), [0]);
    assert_eq!(storage.bytes()[..BLOCK], [1; BLOCK]);
    wait_until("nothing in flight", || served.gate.in_flight() == 0 && served.pulse.read().in_flight == 0);
}

fn parked_by_hand(served: &Served) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    front_end.set_memory(2).unwrap();
    front_end.start(0).unwrap();
    let (data, next) = (FrontEnd::DATA, FrontEnd::NEXT);
    front_end.header(data, 1, 0);
    let chain = [(data, 16, next, 1), (data + 0x1000, 512, next, 2), (data + 16, 1, FrontEnd::WRITE, 0)];
    front_end.descriptors(0, 0, &chain);
    front_end.memory().write_obj(0xff_u8, GuestAddress(data + 16)).unwrap();
    front_end.offer(0, 0);
    wait_until("it to be parked", || served.parking.parked() == 1);
    front_end
}

#[test]
fn a_ring_that_is_stopped_gets_them_back_as_errors() {
    for closed in [false, true] {
        let (served, storage) = served(WriteErrors::Enospc, 1);
        storage.limit_len(0);
        let mut front_end = parked_by_hand(&served);
        let closed = closed.then(|| served.gate.close());
        let start = Instant::now();
        assert_eq!(front_end.stop(0).unwrap(), 1);
        assert!(start.elapsed() < Duration::from_millis(900), "it waited for the next try");
        assert_eq!(front_end.used(0, Duration::ZERO), Some((0, 1)));
        let status = GuestAddress(FrontEnd::DATA + 16);
        assert_eq!(front_end.memory().read_obj::<u8>(status).unwrap(), 1, "VIRTIO_BLK_S_IOERR");
        assert_eq!(served.parking.parked(), 0);
        // The ring starts again, and waits again.
        drop(closed);
        front_end.start(0).unwrap();
        front_end.offer(0, 0);
        wait_until("it to be parked", || served.parking.parked() == 1);
        storage.limit_len(u64::MAX);
        assert_eq!(front_end.used(0, Duration::from_secs(5)), Some((0, 1)));
        assert_eq!(front_end.memory().read_obj::<u8>(status).unwrap(), 0);
    }
}

#[test]
fn neither_a_front_end_that_goes_nor_the_servers_end_waits_for_them() {
    let (served, storage) = served(WriteErrors::Enospc, 1);
    storage.limit_len(0);
    drop(parked_by_hand(&served));
    served.wait_sessions(1);
    assert_eq!((served.parking.parked(), served.gate.in_flight()), (0, 0));
    let front_end = parked_by_hand(&served);
    let start = Instant::now();
    served.server.stop();
    assert!(start.elapsed() < Duration::from_millis(900), "it waited for the next try");
    drop(front_end);
}
