//! A guest that is moved from one front-end to another: pages that are written to are logged, and the disk is one's at a
//! time.

use std::thread;
use std::time::{Duration, Instant};

use frazil_tests::FrontEnd;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress};

use super::served::{MIB, Served};

const PROMPT: Duration = Duration::from_secs(10);
const SOON: Duration = Duration::from_millis(50);

/// Where requests are: header, data of two pages across a third, status.
const HEADER: u64 = 0x20000;
const DATA: u64 = 0x30800;
const STATUS: u64 = 0x40000;

/// Where the configuration space has the write cache's field.
const WRITEBACK: u32 = 32;

fn connect(served: &Served, rings: usize) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&served.socket, rings, 0).unwrap();
    front_end.set_memory(2).unwrap();
    front_end
}

/// Offers a request of `kind` with 8 KiB of data.
fn offer(front_end: &mut FrontEnd, kind: u32) {
    let data_flags = if kind == 0 { FrontEnd::WRITE } else { 0 } | FrontEnd::NEXT;
    front_end.header(HEADER, kind, 0);
    let chain =
        [(HEADER, 16, FrontEnd::NEXT, 1), (DATA, 0x2000, data_flags, 2), (STATUS, 1, FrontEnd::WRITE, 0)];
    front_end.descriptors(FrontEnd::table(0), 0, &chain);
    front_end.offer(0, 0);
}

fn ask(front_end: &mut FrontEnd, kind: u32) {
    offer(front_end, kind);
    assert!(front_end.used(0, PROMPT).is_some());
}

#[test]
fn the_pages_that_the_device_writes_to_are_logged_and_no_others() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = connect(&served, 1);
    front_end.start(0).unwrap();
    ask(&mut front_end, 0);
    let log = front_end.log(1).unwrap();
    ask(&mut front_end, 0);
    front_end.stop(0).unwrap();
    assert_eq!(FrontEnd::logged(&log), [2, 0x30, 0x31, 0x32, 0x40], "the used ring, the data, the status");
    front_end.start(0).unwrap();
    let first = log;
    let second = front_end.log(1).unwrap();
    ask(&mut front_end, 1);
    front_end.stop(0).unwrap();
    assert_eq!(FrontEnd::logged(&second), [2, 0x40], "what is written to the disk is only read");
    assert!(FrontEnd::logged(&first).is_empty(), "another log took its place");
}

/// The table of the guest's memory changes while it is logged: memory is plugged in.
#[test]
fn memory_that_comes_later_is_logged_too() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    front_end.set_memory(1).unwrap();
    front_end.start(0).unwrap();
    let log = front_end.log(1).unwrap();
    front_end.set_memory(2).unwrap();
    front_end.header(HEADER, 0, 0);
    let chain = [
        (HEADER, 16, FrontEnd::NEXT, 1),
        (FrontEnd::SEAM - 0x200, 0x400, FrontEnd::WRITE | FrontEnd::NEXT, 2),
        (STATUS, 1, FrontEnd::WRITE, 0),
    ];
    front_end.descriptors(FrontEnd::table(0), 0, &chain);
    front_end.offer(0, 0);
    assert!(front_end.used(0, PROMPT).is_some());
    front_end.stop(0).unwrap();
    assert_eq!(FrontEnd::logged(&log), [2, 0x40, 0xff, 0x100]);
}

/// Logging begins and ends a thousand times while requests are answered: where a ring's addresses are told anew, the
/// framework would set its place in the used ring back.
#[test]
fn a_ring_that_runs_is_not_set_back_when_logging_begins() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = connect(&served, 1);
    front_end.start(0).unwrap();
    for _ in 0..1000 {
        offer(&mut front_end, 1);
        front_end.log(1).unwrap();
        assert_eq!(front_end.used(0, PROMPT).map(|(head, _)| head), Some(0));
    }
}

#[test]
fn the_disk_is_the_second_front_ends_once_the_first_ones_guest_is_moved() {
    let (served, _) = Served::memory(MIB, 1);
    let (mut first, mut second) = (connect(&served, 1), connect(&served, 1));
    first.start(0).unwrap();
    ask(&mut first, 1);
    second.start(0).unwrap();
    offer(&mut second, 0);
    assert_eq!(second.used(0, SOON), None);
    // A guest that is paused or reset has not gone.
    first.stop(0).unwrap();
    assert_eq!(second.used(0, SOON), None);
    first.start(0).unwrap();
    ask(&mut first, 1);
    first.log(1).unwrap();
    ask(&mut first, 1);
    assert_eq!(second.used(0, SOON), None);
    first.stop(0).unwrap();
    assert!(second.used(0, PROMPT).is_some(), "the guest is moved");
    // It may come back when the other one has gone.
    first.start(0).unwrap();
    offer(&mut first, 1);
    assert_eq!(first.used(0, SOON), None);
    ask(&mut second, 0);
    second.disconnect();
    assert!(first.used(0, PROMPT).is_some());
    assert_eq!(served.gate.in_flight(), 0);
}

/// A front-end that comes back at once tells where its ring is while the session before it still answers.
#[test]
fn a_ring_that_has_waited_goes_on_where_the_used_ring_is_by_then() {
    let (served, _) = Served::memory(MIB, 1);
    let (mut first, mut second) = (connect(&served, 1), connect(&served, 1));
    first.start(0).unwrap();
    ask(&mut first, 1);
    second.start(0).unwrap();
    let used = GuestAddress(FrontEnd::table(0) + 0x2002);
    second.memory().write_obj(5_u16, used).unwrap();
    offer(&mut second, 1);
    first.disconnect();
    let (index, deadline) = (|| second.memory().read_obj::<u16>(used).unwrap(), Instant::now() + PROMPT);
    while index() == 5 && Instant::now() < deadline {
        thread::sleep(SOON);
    }
    assert_eq!(index(), 6);
}

/// All of them come back after a restart, the one whose guest has gone first. What the other one's guest believes of its
/// write cache was forgotten, and its writes were not synced any more.
#[test]
fn a_write_cache_is_what_the_guest_that_has_the_disk_has_set() {
    let (before, _) = Served::memory(MIB, 1);
    let mut second = connect(&before, 1);
    second.track().unwrap();
    second.start(0).unwrap();
    second.messages().set_config(WRITEBACK, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    let (after, _) = Served::memory(MIB, 1);
    let mut first = connect(&after, 1);
    first.track().unwrap();
    first.start(0).unwrap();
    ask(&mut first, 1);
    second.reconnect(&after.socket).unwrap();
    assert_eq!(first.config(WRITEBACK, 1).unwrap(), [1], "it has the disk");
    first.disconnect();
    ask(&mut second, 1);
    assert_eq!(second.config(WRITEBACK, 1).unwrap(), [0]);
}
