//! Drivers of ill will: whatever they do, the disk is served, and so are the others.

use std::time::Duration;

use frazil_tests::{Desc, Driver, FrontEnd, Request};
use vm_memory::{Bytes, GuestAddress};

use super::served::{MIB, Served};

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
    let mut front_end = front_end(&served, 0);
    front_end.offer(0, 4000);
    assert_eq!(front_end.used(0, Duration::from_millis(20)), None, "there is no such chain to give back");
    assert_alive(&mut front_end);
    // More than the ring holds: the ring is broken until it is set up again.
    front_end.set_offered(0, 1000);
    assert_eq!(front_end.used(0, Duration::from_millis(20)), None);
    front_end.stop(0).unwrap();
    drop(front_end);
    served.wait_sessions(1);
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    assert_eq!(driver.queues[0].ask(Request::Read(0)), 0);
}

#[test]
fn memory_that_goes_away_under_the_rings_is_survived() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = front_end(&served, 0);
    assert_alive(&mut front_end);
    let table_without_rings = front_end.set_memory(0);
    front_end.set_offered(0, 7);
    drop(front_end);
    served.wait_sessions(1);
    assert!(table_without_rings.is_ok() || table_without_rings.is_err());
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
        drop(front_end);
        served.wait_sessions(round + 1);
        assert_eq!(neighbour.queues[0].ask(Request::Read(0)), 0);
    }
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    assert_eq!(driver.queues[0].ask(Request::Read(0)), 0);
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
