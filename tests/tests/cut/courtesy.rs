//! A job gives way to a guest that is at work, and does not to one that is not.

use std::thread;
use std::time::{Duration, Instant};

use frazil_tests::{Driver, Request};
use serde_json::json;

use crate::ledger::Clock;
use crate::served::{Served, Wanted};

const SIZE: u64 = 128 << 20;
const CHUNK: usize = 1 << 20;

/// So many times longer than before may a guest's request take in the median while a job is at work. It is far more than
/// is noticed, for the machine may have something else to do.
const BOUND: u32 = 5;

struct Guest(Driver);

impl Guest {
    /// Writes one block after the other as long as it is told to; the median of how long each took.
    fn work(&mut self, mut is_on: impl FnMut() -> bool) -> Duration {
        let mut times = Vec::new();
        while is_on() {
            for turn in 0..50_u64 {
                let start = Instant::now();
                assert_eq!(self.0.queues[0].ask(Request::Write(turn * 7919 % (SIZE / 4096) * 4096)), 0);
                times.push(start.elapsed());
            }
        }
        times.sort_unstable();
        times[times.len() / 2]
    }
}

/// A daemon with two snapshots, and all of the disk to be merged if the first one goes.
fn served() -> Served {
    let served =
        Served::start(Wanted { format: "raw", cache: "writeback", disks: 1, queues: 1, bytes: SIZE });
    let clock = Clock::new();
    served.snapshot("one", &clock);
    let mut driver = Driver::connect(&served.sockets[0], 1, 1, CHUNK).unwrap();
    driver.queues[0].fill(0, &[1; CHUNK]);
    (0..SIZE).step_by(CHUNK).for_each(|offset| assert_eq!(driver.queues[0].ask(Request::Write(offset)), 0));
    drop(driver);
    served.snapshot("two", &clock);
    served
}

fn is_at_work(served: &Served) -> bool {
    !served.ask("query-jobs", json!({})).as_array().unwrap().is_empty()
}

/// How long the job has rested, as the log tells.
fn rested(served: &Served) -> u64 {
    let log = std::fs::read_to_string(served.path("log")).unwrap();
    let line = log.lines().find(|line| line.contains("all is copied")).unwrap();
    let digits = line.split("rested_ms=").nth(1).unwrap();
    digits.split(|digit: char| !digit.is_ascii_digit()).next().unwrap().parse().unwrap()
}

#[test]
fn a_guest_at_work_is_hardly_slower_for_a_job() {
    let served = served();
    let mut guest = Guest(Driver::connect(&served.sockets[0], 1, 1, 4096).unwrap());
    let before = {
        let start = Instant::now();
        guest.work(|| start.elapsed() < Duration::from_millis(500))
    };
    served.ask("snapshot-delete", json!({ "name": "one" }));
    let meanwhile = guest.work(|| is_at_work(&served));
    let rested = rested(&served);
    // Once at least it has looked how the guest is without it.
    assert!(rested >= 50, "it did not rest: {rested} ms");
    assert!(
        meanwhile < before * BOUND,
        "{meanwhile:?} with the job, {before:?} without; it rested {rested} ms"
    );
}

#[test]
fn a_job_does_not_rest_for_a_guest_that_asks_for_nothing() {
    let served = served();
    let _idle = Driver::connect(&served.sockets[0], 1, 1, 4096).unwrap();
    // What it asked for before is over.
    thread::sleep(Duration::from_millis(200));
    served.ask("snapshot-delete", json!({ "name": "one" }));
    while is_at_work(&served) {
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(rested(&served), 0);
}
