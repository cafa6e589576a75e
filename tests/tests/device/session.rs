//! Front-ends come and go.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use frazil_tests::{Driver, FrontEnd, Request, open_files, threads};
use hostio::Cache;

use super::served::{MIB, Served, wait_until};

#[test]
fn two_hundred_front_ends_leave_nothing_behind() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let served = Served::file(folder.path(), MIB as u64, 2, Cache::Writeback);
    let mut after_warm_up = (0, 0);
    for round in 0..200_usize {
        let mut driver = Driver::connect(&served.socket, 2, 1, 4096).unwrap();
        let queue = &mut driver.queues[round % 2];
        assert_eq!(queue.ask(Request::Read(0)), 0);
        assert_eq!(queue.bytes(0)[0] as usize, round);
        queue.fill(0, &[round as u8 + 1; 4096]);
        assert_eq!(queue.ask(Request::Write(0)), 0);
        assert_eq!(queue.ask(Request::Flush), 0);
        drop(driver);
        served.wait_sessions(round + 1);
        if round == 20 {
            after_warm_up = (open_files(), threads());
        }
    }
    // A session is told to be over just before it lets go, and the kernel's own threads for io_uring end later still.
    wait_until("files to be closed and threads to end", || {
        open_files() <= after_warm_up.0 && threads() <= after_warm_up.1
    });
}

/// A second one may ask, as the QEMU does that a guest is to be moved to, and a third one waits outside.
#[test]
fn a_second_front_end_is_not_served_before_the_first_has_gone() {
    let (served, _) = Served::memory(MIB, 1);
    let mut first = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    assert_eq!(first.queues[0].ask(Request::Write(0)), 0);
    let mut second = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    assert_eq!(second.capacity().unwrap(), MIB as u64);
    let path = served.socket.clone();
    let third = std::thread::spawn(move || Driver::connect(&path, 1, 1, 4096).unwrap().capacity().unwrap());
    let (queue, mut back) = (&mut second.queues[0], Vec::new());
    queue.queue(0, Request::Read(0)).unwrap();
    queue.kick().unwrap();
    queue.wait_for(&mut back, Duration::from_millis(50)).unwrap();
    assert!(back.is_empty() && !third.is_finished());
    assert_eq!(first.queues[0].ask(Request::Write(0)), 0);
    drop(first);
    queue.wait(&mut back).unwrap();
    assert_eq!(back, [(0, 0)]);
    assert!(served.server.connected());
    assert_eq!(third.join().unwrap(), MIB as u64);
}

/// The memory goes away under requests that are still in the kernel's hands.
#[test]
fn a_front_end_that_goes_with_requests_in_flight_harms_nobody() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for cache in [Cache::Writeback, Cache::None] {
        let folder = tempfile::tempdir_in(folder.path()).unwrap();
        let served = Served::file(folder.path(), 16 * MIB as u64, 4, cache);
        for round in 0..20 {
            let mut driver = Driver::connect(&served.socket, 4, 64, 16384).unwrap();
            for queue in &mut driver.queues {
                for index in 0..64_u64 {
                    let offset = (index * 37 + round) % 1024 * 16384;
                    let request = if index % 2 == 0 { Request::Write(offset) } else { Request::Read(offset) };
                    queue.queue(index as usize, request).unwrap();
                }
                queue.kick().unwrap();
            }
            drop(driver);
            served.wait_sessions(round as usize + 1);
            assert_eq!(served.gate.in_flight(), 0);
        }
    }
}

#[test]
fn a_ring_is_stopped_and_goes_on_where_it_was() {
    let (served, _) = Served::memory(MIB, 2);
    let mut front_end = FrontEnd::connect(&served.socket, 2, 0).unwrap();
    front_end.set_memory(2).unwrap();
    for round in 0..50_u16 {
        for ring in 0..2 {
            front_end.start(ring).unwrap();
            front_end.header(FrontEnd::DATA, 4, 0);
            let chain =
                [(FrontEnd::DATA, 16, FrontEnd::NEXT, 1), (FrontEnd::DATA + 16, 1, FrontEnd::WRITE, 0)];
            front_end.descriptors(FrontEnd::table(ring), 0, &chain);
            front_end.offer(ring, 0);
            assert_eq!(front_end.used(ring, Duration::from_secs(10)), Some((0, 1)));
            assert_eq!(front_end.stop(ring).unwrap(), u32::from(round) + 1);
            // Nothing is taken from a ring that was stopped.
            front_end.offer(ring, 0);
            assert_eq!(front_end.used(ring, Duration::from_millis(2)), None);
            front_end.set_offered(ring, round + 1);
        }
        // What was offered too early is offered again from the same place.
        front_end.rewind();
    }
}

#[test]
fn stopping_the_server_ends_the_session_and_removes_the_socket() {
    let (served, _) = Served::memory(MIB, 1);
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    assert_eq!(driver.queues[0].ask(Request::Write(0)), 0);
    let socket = served.socket.clone();
    served.server.stop();
    assert!(!socket.exists());
    assert!(UnixStream::connect(&socket).is_err());
}

#[test]
fn the_configuration_space_is_as_long_as_it_is_asked_for() {
    let (served, _) = Served::memory(MIB, 3);
    let mut front_end = FrontEnd::connect(&served.socket, 3, 0).unwrap();
    for size in [1, 8, 57, 60, 96, 200, 256] {
        assert_eq!(front_end.config(0, size).unwrap().len(), size as usize);
    }
    let config = front_end.config(0, 57).unwrap();
    assert_eq!(config[..8], (MIB as u64 / 512).to_le_bytes());
    assert_eq!(config[32], 1, "the write cache is on: with 0, Linux would send no flush at all");
    assert_eq!(config[34..36], [3, 0]);
    assert_eq!(front_end.config(34, 2).unwrap(), [3, 0]);
}
