//! Front-ends that have ever more mapped, of files that take no room: they lose their own session, and no other disk anything.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use block::testing::{FaultStorage, MemStorage};
use block::{RawDisk, Storage, WriteErrors};
use frazil_tests::{Driver, FrontEnd, Request};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;

use super::messages::{Before, memory, table};
use super::served::{MIB, Served, wait_until};
use super::wire::{PLAIN, Wire};

const TIB: u64 = 1 << 40;
const PAGE: u64 = 4096;
/// Bytes of a piece, and how many of them one of two disks may have mapped: of 112 TiB the half.
const PIECE: u64 = 4 * TIB;
const PIECES: u64 = 14;

const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const ADD_MEM_REG: u32 = 37;

const SOON: Duration = Duration::from_secs(10);
const DATA: u64 = FrontEnd::DATA;
const NEXT: u16 = FrontEnd::NEXT;
const WRITE: u16 = FrontEnd::WRITE;

/// Adds these pieces, one message after the other, and waits for none.
fn add(wire: &Wire, pieces: std::ops::Range<u64>, len: u64, file: &OwnedFd) {
    for at in pieces.map(|index| index * len) {
        let piece = [0, at, len, at, 0].map(u64::to_ne_bytes).concat();
        wire.send(ADD_MEM_REG, PLAIN, &piece, &[file]).unwrap();
    }
}

/// All that was sent so far has been dealt with.
fn is_served(wire: &Wire) -> bool {
    wire.send(1, PLAIN, &[], &[]).is_ok() && wire.answer().is_ok()
}

#[test]
fn memory_without_end_ends_the_session_and_takes_nothing_from_another_disk() {
    let (served, _) = Served::memory(MIB, 1);
    let (other, _) = Served::memory(MIB, 1);
    let (file, before) = (memory(PIECE), Before::new(&served));
    for round in 1..=3 {
        let (hostile, honest) = (Wire::negotiated(&served.socket), Wire::negotiated(&other.socket));
        add(&hostile, 0..PIECES, PIECE, &file);
        assert!(is_served(&hostile));
        add(&honest, 0..PIECES, PIECE, &file);
        assert!(is_served(&honest));
        match round {
            // Before the table that it has is let go of.
            1 => hostile.send(SET_MEM_TABLE, PLAIN, &table(&[[0, PAGE, 0, 0]]), &[&file]).unwrap(),
            2 => {
                let log = [PAGE, 0].map(u64::to_ne_bytes).concat();
                hostile.send(SET_LOG_BASE, PLAIN, &log, &[&file]).unwrap();
            }
            _ => add(&hostile, PIECES..PIECES + 1, PIECE, &file),
        }
        assert!(hostile.has_ended(), "round {round}");
        served.wait_sessions(round + 1);
        assert!(is_served(&honest));
        drop(honest);
        other.wait_sessions(round);
    }
    before.check(&served);
}

/// Each is a descriptor of the daemon's too.
#[test]
fn more_pieces_than_a_disk_may_have_end_the_session() {
    const MOST: u64 = 2048;
    hostio::raise_open_files().unwrap();
    let (served, _) = Served::memory(MIB, 1);
    let (file, before) = (memory(PAGE), Before::new(&served));
    let wire = Wire::negotiated(&served.socket);
    add(&wire, 0..MOST, PAGE, &file);
    assert!(is_served(&wire));
    add(&wire, MOST..MOST + 1, PAGE, &file);
    assert!(wire.has_ended());
    drop(wire);
    served.wait_sessions(2);
    before.check(&served);
}

#[test]
fn both_front_ends_of_a_disk_have_one_share() {
    let (served, _) = Served::memory(MIB, 1);
    let (file, before) = (memory(PIECE), Before::new(&served));
    let [first, second] = [(); 2].map(|()| Wire::negotiated(&served.socket));
    add(&first, 0..PIECES - 1, PIECE, &file);
    assert!(is_served(&first));
    add(&second, 0..1, PIECE, &file);
    assert!(is_served(&second));
    add(&second, 1..2, PIECE, &file);
    assert!(second.has_ended());
    served.wait_sessions(2);
    add(&first, PIECES - 1..PIECES, PIECE, &file);
    assert!(is_served(&first));
    drop((first, second));
    served.wait_sessions(3);
    before.check(&served);
}

/// A piece of the guest's memory far above the rings. No two are alike, should one be mapped where another was.
fn piece(file: &OwnedFd, index: u64) -> VhostUserMemoryRegionInfo {
    let at = (1 + index) * PIECE;
    VhostUserMemoryRegionInfo {
        guest_phys_addr: at,
        memory_size: PIECE - index * PAGE,
        userspace_addr: at,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

fn front_end(served: &Served) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    front_end.set_memory(2).unwrap();
    front_end.start(0).unwrap();
    front_end
}

/// Offers a write of a sector, or a flush, as chain `index`.
fn offer(front_end: &mut FrontEnd, index: u16, flush: bool) {
    let (at, head) = (DATA + 0x40 * u64::from(index), 3 * index);
    front_end.header(at, if flush { 4 } else { 1 }, 0);
    let status = (at + 16, 1, WRITE, 0);
    let data = (DATA + 0x1000, 512, NEXT, head + 2);
    match flush {
        true => front_end.descriptors(0, head, &[(at, 16, NEXT, head + 1), status]),
        false => front_end.descriptors(0, head, &[(at, 16, NEXT, head + 1), data, status]),
    }
    front_end.offer(0, head);
}

#[test]
fn what_only_a_parked_request_holds_counts_until_it_ends() {
    let storage = Arc::new(FaultStorage::new(MemStorage::new(MIB)));
    let disk = RawDisk::new(Arc::clone(&storage) as Arc<dyn Storage>, false).unwrap();
    let served = Served::with(Arc::new(disk), 1, WriteErrors::Enospc);
    let (other, _) = Served::memory(MIB, 1);
    let mut neighbour = Driver::connect(&other.socket, 1, 1, 4096).unwrap();
    let (file, before) = (memory(PIECE), Before::new(&served));
    let mut front_end = front_end(&served);
    // Taken away with nothing in flight, it counts no longer.
    for index in 0..2 * PIECES {
        front_end.messages().add_mem_region(&piece(&file, index)).unwrap();
        front_end.messages().remove_mem_region(&piece(&file, index)).unwrap();
        // The worker has let go of it.
        offer(&mut front_end, 0, true);
        assert_eq!(front_end.used(0, SOON), Some((0, 1)));
    }
    storage.limit_len(0);
    let parks = |index: &u64| {
        if front_end.messages().add_mem_region(&piece(&file, *index)).is_err() {
            return false;
        }
        offer(&mut front_end, *index as u16, false);
        wait_until("it to be parked", || served.parking.parked() as u64 == index + 1);
        front_end.messages().remove_mem_region(&piece(&file, *index)).is_ok()
    };
    let parked = (0..PIECES + 3).take_while(parks).count() as u64;
    // The rings are in memory too.
    assert_eq!(parked, PIECES - 1);
    served.wait_sessions(2);
    assert_eq!(neighbour.queues[0].ask(Request::Write(0)), 0);
    drop(front_end);
    assert_eq!(served.parking.parked(), 0);
    let wire = Wire::negotiated(&served.socket);
    add(&wire, 0..PIECES, PIECE, &file);
    assert!(is_served(&wire));
    drop(wire);
    served.wait_sessions(3);
    before.check(&served);
}

/// Larger than most of today, and there twice.
#[test]
fn a_guest_of_24_tib_is_served_while_both_front_ends_of_a_move_have_it_mapped() {
    let (served, _) = Served::memory(MIB, 1);
    let file = memory(PIECE);
    let mut first = front_end(&served);
    let mut second = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    second.set_memory(2).unwrap();
    for index in 0..6 {
        first.messages().add_mem_region(&piece(&file, index)).unwrap();
        second.messages().add_mem_region(&piece(&file, index)).unwrap();
    }
    // To the last sector of its memory.
    first.header(DATA, 0, 0);
    let last = piece(&file, 5);
    let end = last.guest_phys_addr + last.memory_size;
    let chain = [(DATA, 16, NEXT, 1), (end - 512, 512, NEXT | WRITE, 2), (DATA + 16, 1, WRITE, 0)];
    first.descriptors(0, 0, &chain);
    first.offer(0, 0);
    assert_eq!(first.used(0, SOON), Some((0, 513)));
}
