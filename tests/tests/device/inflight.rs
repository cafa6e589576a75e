//! The record of what is in flight. That a daemon which is killed loses nothing is shown with the daemon itself
//! (`tests/cut/killed.rs`); here the record is written by hand.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use block::testing::{FaultStorage, MemStorage};
use block::{RawDisk, Storage, WriteErrors};
use frazil_tests::FrontEnd;
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vm_memory::{Bytes, GuestAddress};

use super::served::{MIB, Served, wait_until};

const DATA: u64 = FrontEnd::DATA;
const NEXT: u16 = FrontEnd::NEXT;
const WRITE: u16 = FrontEnd::WRITE;
const SOON: Duration = Duration::from_secs(10);

/// Offsets in the record: the index of the used ring, and of a head's state the mark and the counter.
const VERSION: u64 = 8;
const USED_IDX: u64 = 14;

fn state(head: u16) -> u64 {
    16 + 16 * u64::from(head)
}

fn tracked(served: &Served) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    front_end.track().unwrap();
    front_end.set_memory(2).unwrap();
    front_end.start(0).unwrap();
    front_end
}

/// Makes a flush of the two descriptors from `head` on.
fn flush(front_end: &FrontEnd, head: u16) {
    let at = DATA + 0x100 * u64::from(head);
    front_end.header(at, 4, 0);
    front_end.memory().write_obj(u8::MAX, GuestAddress(at + 16)).unwrap();
    front_end.descriptors(0, head, &[(at, 16, NEXT, head + 1), (at + 16, 1, WRITE, 0)]);
}

/// Offers such a flush, and sees it answered.
fn carried_out(front_end: &mut FrontEnd, head: u16) {
    flush(front_end, head);
    front_end.offer(0, head);
    assert_eq!(front_end.used(0, SOON), Some((u32::from(head), 1)));
}

fn status(front_end: &FrontEnd, head: u16) -> u8 {
    front_end.memory().read_obj(GuestAddress(DATA + 0x100 * u64::from(head) + 16)).unwrap()
}

fn note(front_end: &FrontEnd, at: u64, bytes: &[u8]) {
    front_end.record().unwrap().1.write_all_at(bytes, at).unwrap();
}

/// A daemon took four requests and answered one of them; then it was killed. The places of the others in the available
/// ring have been used again since.
#[test]
fn what_was_in_flight_is_answered_once_and_in_its_order() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = tracked(&served);
    carried_out(&mut front_end, 0);
    assert_eq!(front_end.stop(0).unwrap(), 1);
    for (head, counter) in [(3_u16, 9_u64), (6, 5), (9, 7)] {
        flush(&front_end, head);
        front_end.offer(0, 60);
        note(&front_end, state(head), &[1]);
        note(&front_end, state(head) + 8, &counter.to_ne_bytes());
    }
    front_end.disconnect();
    served.wait_sessions(1);
    front_end.reconnect(&served.socket).unwrap();
    for head in [6, 9, 3] {
        assert_eq!(front_end.used(0, SOON), Some((u32::from(head), 1)), "nobody kicked the ring");
        assert_eq!(status(&front_end, head), 0);
    }
    assert_eq!(front_end.used(0, Duration::from_millis(20)), None, "something was answered twice");
    front_end.offer(0, 0);
    assert_eq!(front_end.used(0, SOON), Some((0, 1)), "the ring does not go on where it was");
    // And once more, with nothing in flight.
    front_end.disconnect();
    served.wait_sessions(2);
    front_end.reconnect(&served.socket).unwrap();
    assert_eq!(front_end.used(0, Duration::from_millis(20)), None);
    front_end.offer(0, 3);
    assert_eq!(front_end.used(0, SOON), Some((3, 1)));
}

/// The answer had reached the used ring, and the daemon was killed before it could say so.
#[test]
fn what_was_answered_last_is_not_answered_again() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = tracked(&served);
    for head in [0, 3] {
        carried_out(&mut front_end, head);
    }
    front_end.disconnect();
    served.wait_sessions(1);
    note(&front_end, state(3), &[1]);
    note(&front_end, USED_IDX, &1_u16.to_ne_bytes());
    front_end.reconnect(&served.socket).unwrap();
    assert_eq!(front_end.used(0, Duration::from_millis(20)), None);
    front_end.offer(0, 0);
    assert_eq!(front_end.used(0, SOON), Some((0, 1)));
}

/// The answer had reached the used ring, and the daemon was killed before it called the driver, which waits for that call
/// alone. Or QEMU itself was called while it started the ring: it gives the driver's call last.
#[test]
fn a_call_that_is_new_is_used_for_what_the_driver_may_not_know() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = tracked(&served);
    carried_out(&mut front_end, 0);
    front_end.disconnect();
    served.wait_sessions(1);
    while front_end.is_called(0, Duration::ZERO) {}
    front_end.reconnect(&served.socket).unwrap();
    assert!(front_end.is_called(0, SOON), "a driver that waits for its answer waits for ever");
    for _ in 0..20 {
        front_end.replace_call(0);
        assert!(front_end.is_called(0, SOON), "what was told to another was told to nobody");
    }
}

/// A restart of the daemon while the host's disk is full: the guest had an error of it.
#[test]
fn requests_that_wait_for_the_host_wait_for_the_next_session() {
    let storage = Arc::new(FaultStorage::new(MemStorage::new(MIB)));
    let disk = RawDisk::new(Arc::clone(&storage) as Arc<dyn Storage>, false).unwrap();
    let served = Served::with(Arc::new(disk), 1, WriteErrors::Enospc);
    let mut front_end = tracked(&served);
    storage.limit_len(0);
    front_end.header(DATA, 1, 8);
    front_end.memory().write_slice(&[7; 512], GuestAddress(DATA + 0x200)).unwrap();
    let chain = [(DATA, 16, NEXT, 1), (DATA + 0x200, 512, NEXT, 2), (DATA + 16, 1, WRITE, 0)];
    front_end.descriptors(0, 0, &chain);
    front_end.offer(0, 0);
    wait_until("the write to be parked", || served.parking.parked() == 1);
    front_end.disconnect();
    served.wait_sessions(1);
    assert_eq!((served.parking.parked(), served.gate.in_flight()), (0, 0));
    assert_eq!(front_end.used(0, Duration::ZERO), None);
    storage.limit_len(u64::MAX);
    front_end.reconnect(&served.socket).unwrap();
    assert_eq!(front_end.used(0, SOON), Some((0, 1)));
    assert_eq!(status(&front_end, 0), 0);
    assert_eq!(storage.bytes()[8 * 512..9 * 512], [7; 512]);
}

/// Another daemon knows nothing of what the guest once set, and the front-end does not say it again.
#[test]
fn the_record_remembers_that_the_write_cache_is_off() {
    let (first, _) = Served::memory(MIB, 1);
    let (second, storage) = Served::memory(MIB, 1);
    let mut front_end = tracked(&first);
    front_end.messages().set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    front_end.reconnect(&second.socket).unwrap();
    assert_eq!(front_end.config(32, 1).unwrap(), [0]);
    storage.fail_syncs(1);
    front_end.header(DATA, 1, 0);
    let chain = [(DATA, 16, NEXT, 1), (DATA + 0x200, 512, NEXT, 2), (DATA + 16, 1, WRITE, 0)];
    front_end.descriptors(0, 0, &chain);
    front_end.offer(0, 0);
    assert_eq!(front_end.used(0, SOON), Some((0, 1)));
    assert_eq!(status(&front_end, 0), 1, "nothing was synced before the answer");
}

#[test]
fn records_that_make_no_sense_harm_nobody() {
    let (served, _) = Served::memory(MIB, 1);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut sessions = 0;
    for round in 0..60_usize {
        let mut front_end = tracked(&served);
        flush(&front_end, 0);
        front_end.offer(0, 0);
        assert_eq!(front_end.used(0, SOON), Some((0, 1)));
        front_end.disconnect();
        let len = front_end.record().unwrap().1.metadata().unwrap().len();
        let noise: Vec<u8> = (0..len)
            .map(|_| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round as u64 | 1);
                (random >> 56) as u8 & if round % 2 == 0 { 0xff } else { 1 }
            })
            .collect();
        note(&front_end, 0, &noise);
        if round % 3 != 0 {
            // All but the head of it makes sense.
            note(&front_end, 0, &[0; 8]);
            note(&front_end, VERSION, &[1, 64].map(u16::to_ne_bytes).concat());
        }
        let back = front_end.reconnect(&served.socket);
        assert!(back.is_ok() || round % 3 == 0, "{back:?}");
        front_end.set_offered(0, 2);
        front_end.disconnect();
        sessions += 2;
        served.wait_sessions(sessions);
    }
    let mut front_end = tracked(&served);
    carried_out(&mut front_end, 0);
}

#[test]
fn records_that_do_not_fit_end_the_session() {
    let (served, _) = Served::memory(MIB, 1);
    let good = tracked(&served).record().unwrap().0;
    served.wait_sessions(1);
    let shapes = [
        VhostUserInflight::new(good.mmap_size, 0, 9, 64),
        VhostUserInflight::new(good.mmap_size, 4096, 1, 64),
        VhostUserInflight::new(good.mmap_size, u64::MAX - 100, 1, 64),
        VhostUserInflight::new(16, 0, 1, 64),
        VhostUserInflight::new(1 << 40, 0, 1, 64),
    ];
    for (round, shape) in shapes.into_iter().enumerate() {
        let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
        let file = std::fs::File::from(memfd_create("record", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(good.mmap_size).unwrap();
        assert!(front_end.set_record(shape, file).is_err());
        front_end.disconnect();
        served.wait_sessions(round + 2);
    }
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    assert!(front_end.messages().get_inflight_fd(&VhostUserInflight::new(0, 0, 9, 64)).is_err());
}
