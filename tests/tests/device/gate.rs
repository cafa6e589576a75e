//! The gate in front of the rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use frazil_tests::{Driver, FrontEnd, Request};
use hostio::Cache;

use super::served::{MIB, Served};

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// Four queues under load, and a gate that closes and opens beneath them.
#[test]
fn nothing_is_in_flight_while_quiesced_and_everything_comes_back() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for cache in [Cache::Writeback, Cache::None] {
        let folder = tempfile::tempdir_in(folder.path()).unwrap();
        let served = Served::file(folder.path(), 16 * MIB as u64, 4, cache);
        let mut driver = Driver::connect(&served.socket, 4, 16, 4096).unwrap();
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads: Vec<_> = std::mem::take(&mut driver.queues)
            .into_iter()
            .enumerate()
            .map(|(number, mut queue)| {
                let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
                thread::spawn(move || {
                    let (mut free, mut back): (Vec<usize>, Vec<_>) = ((0..16).collect(), Vec::new());
                    let mut next = number as u64;
                    while !stop.load(Ordering::Relaxed) || queue.in_flight() > 0 {
                        while !stop.load(Ordering::Relaxed)
                            && let Some(index) = free.pop()
                        {
                            next = (next * 5 + 7) % 4096;
                            let offset = next * 4096;
                            let write = next.is_multiple_of(2);
                            let request = if write { Request::Write(offset) } else { Request::Read(offset) };
                            queue.queue(index, request).unwrap();
                        }
                        queue.kick().unwrap();
                        queue.wait(&mut back).unwrap();
                        for (index, status) in back.drain(..) {
                            assert_eq!(status, 0);
                            done.fetch_add(1, Ordering::SeqCst);
                            free.push(index);
                        }
                    }
                })
            })
            .collect();
        let mut progress = 0;
        for _ in 0..100 {
            let closed = served.gate.close();
            closed.drain(deadline()).unwrap();
            assert_eq!(served.gate.in_flight(), 0);
            thread::sleep(Duration::from_millis(1));
            assert_eq!(served.gate.in_flight(), 0);
            drop(closed);
            let before = done.load(Ordering::SeqCst);
            super::served::wait_until("requests to flow again", || done.load(Ordering::SeqCst) > before + 10);
            progress += 1;
        }
        assert_eq!(progress, 100);
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

fn flush_chain(front_end: &FrontEnd) {
    front_end.header(FrontEnd::DATA, 4, 0);
    let chain = [(FrontEnd::DATA, 16, FrontEnd::NEXT, 1), (FrontEnd::DATA + 16, 1, FrontEnd::WRITE, 0)];
    front_end.descriptors(0, 0, &chain);
}

/// Whatever the front-end does while the gate is closed is answered: no message waits for the gate.
#[test]
fn messages_are_answered_while_the_gate_is_closed() {
    let (served, _) = Served::memory(MIB, 1);
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    front_end.set_memory(2).unwrap();
    front_end.start(0).unwrap();
    flush_chain(&front_end);
    let closed = served.gate.close();
    closed.drain(deadline()).unwrap();
    front_end.offer(0, 0);
    assert_eq!(front_end.used(0, Duration::from_millis(20)), None);
    front_end.set_memory(1).unwrap();
    front_end.set_memory(2).unwrap();
    assert_eq!(front_end.stop(0).unwrap(), 0, "a request was taken through a closed gate");
    front_end.rewind();
    front_end.start(0).unwrap();
    front_end.offer(0, 0);
    assert_eq!(front_end.used(0, Duration::from_millis(20)), None);
    let wait = closed.open();
    assert!(wait.longest >= Duration::from_millis(15), "{wait:?}");
    assert_eq!(front_end.used(0, Duration::from_secs(10)), Some((0, 1)));
}

#[test]
fn a_front_end_may_go_and_come_while_the_gate_is_closed() {
    let (served, _) = Served::memory(MIB, 1);
    let closed = served.gate.close();
    for round in 0..3 {
        let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
        front_end.set_memory(2).unwrap();
        front_end.start(0).unwrap();
        flush_chain(&front_end);
        front_end.offer(0, 0);
        assert_eq!(front_end.used(0, Duration::from_millis(5)), None);
        drop(front_end);
        served.wait_sessions(round + 1);
    }
    closed.drain(deadline()).unwrap();
    drop(closed);
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    assert_eq!(driver.queues[0].ask(Request::Write(0)), 0);
}
