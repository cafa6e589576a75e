//! A front-end that takes back the memory it gave: it costs its own session, and neither the process nor any other disk.

use std::fs::File;
use std::time::Duration;

use frazil_tests::{Driver, FrontEnd, Request};
use hostio::Cache;
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{Bytes, GuestAddress};

use super::messages::Before;
use super::served::{MIB, Served};

const DATA: u64 = FrontEnd::DATA;
const NEXT: u16 = FrontEnd::NEXT;
const WRITE: u16 = FrontEnd::WRITE;
const SOON: Duration = Duration::from_secs(10);

fn front_end(served: &Served) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    front_end.set_memory(2).unwrap();
    front_end.start(0).unwrap();
    front_end
}

/// Offers a read of a sector to where the regions touch.
fn read(front_end: &mut FrontEnd) {
    front_end.header(DATA, 0, 0);
    let chain = [(DATA, 16, NEXT, 1), (FrontEnd::SEAM, 512, NEXT | WRITE, 2), (DATA + 16, 1, WRITE, 0)];
    front_end.descriptors(0, 0, &chain);
    front_end.offer(0, 0);
}

/// The first disk can be used again, the other all the time.
fn assert_served(served: &Served, neighbour: &mut Driver) {
    assert_eq!(neighbour.queues[0].ask(Request::Write(0)), 0);
    let mut front_end = front_end(served);
    read(&mut front_end);
    assert_eq!(front_end.used(0, SOON), Some((0, 513)));
}

#[test]
fn rings_that_are_gone_cost_the_session() {
    let (served, _) = Served::memory(MIB, 1);
    let (other, _) = Served::memory(MIB, 1);
    let before = Before::new(&served);
    let mut neighbour = Driver::connect(&other.socket, 1, 1, 4096).unwrap();
    for round in 0..3 {
        let mut front_end = front_end(&served);
        read(&mut front_end);
        assert_eq!(front_end.used(0, SOON), Some((0, 513)));
        front_end.kick_without_memory(0);
        served.wait_sessions(2 * round + 2);
        assert_served(&served, &mut neighbour);
        served.wait_sessions(2 * round + 3);
    }
    drop(neighbour);
    before.check(&served);
}

/// The rings are there. Where the bytes are copied by us, that is a signal; where they are copied by the kernel, an error
/// to the request.
#[test]
fn data_that_is_gone_costs_the_session_or_the_request() {
    let (other, _) = Served::memory(MIB, 1);
    let mut neighbour = Driver::connect(&other.socket, 1, 1, 4096).unwrap();
    let (served, _) = Served::memory(MIB, 1);
    let mut first = front_end(&served);
    first.file().set_len(FrontEnd::SEAM).unwrap();
    read(&mut first);
    served.wait_sessions(1);
    assert_served(&served, &mut neighbour);

    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for cache in [Cache::Writeback, Cache::None] {
        let folder = tempfile::tempdir_in(folder.path()).unwrap();
        let served = Served::file(folder.path(), MIB as u64, 1, cache);
        let mut second = front_end(&served);
        read(&mut second);
        assert_eq!(second.used(0, SOON), Some((0, 513)));
        second.file().set_len(FrontEnd::SEAM).unwrap();
        read(&mut second);
        if cache == Cache::Writeback {
            assert_eq!(second.used(0, SOON), Some((0, 1)));
            assert_eq!(second.memory().read_obj::<u8>(GuestAddress(DATA + 16)).unwrap(), 1);
        }
        drop(second);
        served.wait_sessions(1);
        assert_served(&served, &mut neighbour);
    }
}

#[test]
fn a_record_that_is_gone_costs_the_session() {
    let (served, _) = Served::memory(MIB, 1);
    let (other, _) = Served::memory(MIB, 1);
    let mut neighbour = Driver::connect(&other.socket, 1, 1, 4096).unwrap();
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    front_end.track().unwrap();
    let shape = front_end.record().unwrap().0;
    let mine = File::from(memfd_create("record", MemfdFlags::CLOEXEC).unwrap());
    mine.set_len(shape.mmap_size).unwrap();
    front_end.set_record(shape, mine.try_clone().unwrap()).unwrap();
    front_end.set_memory(2).unwrap();
    front_end.start(0).unwrap();
    read(&mut front_end);
    assert_eq!(front_end.used(0, SOON), Some((0, 513)));
    mine.set_len(0).unwrap();
    read(&mut front_end);
    served.wait_sessions(1);
    drop(front_end);
    assert_served(&served, &mut neighbour);
}

/// Huge pages that the host does not have: the first look at the record is a signal.
#[test]
fn a_record_that_never_comes_costs_the_session() {
    const HUGE: u64 = 2 << 20;
    let (served, _) = Served::memory(MIB, 64);
    let (other, _) = Served::memory(MIB, 1);
    let mut neighbour = Driver::connect(&other.socket, 1, 1, 4096).unwrap();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let huge = File::from(memfd_create("huge", flags).unwrap());
    huge.set_len(HUGE).unwrap();
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    // The session may end before it answers.
    let _ = front_end.set_record(VhostUserInflight::new(HUGE, 0, 64, 1024), huge);
    drop(front_end);
    served.wait_sessions(1);
    assert_served(&served, &mut neighbour);
}

#[test]
fn memory_that_was_never_there_is_refused() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    front_end.file().set_len(4096).unwrap();
    assert!(front_end.set_memory(2).is_err());
    drop(front_end);
    served.wait_sessions(1);
}
