//! Several queues in the same new subclusters: one request has to wait for another, and none waits for ever.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use frazil_tests::{Driver, DriverQueue, Request};

use crate::ledger::{Clock, Ledger, prove};
use crate::load::{Load, Mix};
use crate::served::{Served, Wanted};

const QUEUES: usize = 4;
const ROUNDS: usize = 10;

/// Every sector of a block is another queue's. Each round begins with an overlay in which there is nothing yet.
fn sectors(cache: &'static str) {
    let places = 128;
    let bytes = (512 * places * QUEUES) as u64;
    let served = Served::start(Wanted { format: "raw", cache, disks: 1, queues: QUEUES, bytes });
    let clock = Arc::new(Clock::new());
    let mut ledgers: Vec<Vec<Ledger>> =
        vec![(0..QUEUES).map(|queue| Ledger::new(512, queue, QUEUES, places)).collect()];
    let mut cuts = Vec::new();
    for round in 0..ROUNDS {
        let load = Load::connect(&served.sockets, ledgers, Mix::Zeroes, &clock);
        thread::sleep(Duration::from_millis(15));
        // One overlay in mid-load, one before the next load.
        cuts.push(served.snapshot(&format!("load{round}"), &clock));
        thread::sleep(Duration::from_millis(15));
        ledgers = load.finish();
        let image = served.read(0);
        // All was answered, so this demands the last change of each sector.
        ledgers[0].iter_mut().for_each(|ledger| ledger.settle(&image, clock.now()));
        cuts.push(served.snapshot(&format!("rest{round}"), &clock));
    }
    for cut in &cuts {
        prove(cut, &[(served.export(&cut.name, "vd0"), ledgers[0].iter().collect())]);
    }
}

#[test]
fn sectors_of_new_subclusters_are_the_last_that_was_written() {
    sectors("writeback");
}

#[test]
fn sectors_of_new_subclusters_past_the_page_cache_are_the_last_that_was_written() {
    sectors("none");
}

/// Of a cluster, and of a half of the next one, all but the first sector: the part in the second cluster goes through
/// the kernel while the first subcluster, of which the rest was copied, is nobody else's.
const LARGE: usize = (128 << 10) - 512 + (64 << 10);

/// A buffer so far from a page's start that the second part of it is aligned.
const ALIGNED: usize = 7;

fn large(mut queue: DriverQueue, number: u8, rounds: u8) -> u8 {
    // The two share their first and last subclusters; each covers one of them in part.
    let (offset, mut last) = (if number.is_multiple_of(2) { 512 } else { 0 }, 0);
    for round in 0..rounds {
        last = 1 + number + round * QUEUES as u8;
        queue.fill(ALIGNED, &vec![last; LARGE]);
        queue.queue(ALIGNED, Request::Write(offset)).unwrap();
        queue.kick().unwrap();
        let (mut back, begin) = (Vec::new(), Instant::now());
        while back.is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(20), "a write does not come back");
            queue.wait_for(&mut back, Duration::from_millis(100)).unwrap();
        }
        assert_eq!(back, [(ALIGNED, 0)]);
    }
    last
}

#[test]
fn a_write_waits_for_another_that_is_in_the_hands_of_the_kernel() {
    let bytes = 256 << 10;
    let wanted = Wanted { format: "raw", cache: "none", disks: 1, queues: QUEUES, bytes };
    let (served, clock) = (Served::start(wanted), Clock::new());
    for round in 0..ROUNDS {
        served.snapshot(&format!("s{round}"), &clock);
        let mut driver = Driver::connect(&served.sockets[0], QUEUES, ALIGNED + 1, LARGE).unwrap();
        let queues = std::mem::take(&mut driver.queues).into_iter().zip(0..);
        let threads: Vec<_> =
            queues.map(|(queue, number)| thread::spawn(move || large(queue, number, 3))).collect();
        let last: Vec<u8> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        drop(driver);
        let image = served.read(0);
        // In the middle anybody's last bytes; at each end those of whom it belongs to.
        for (sector, bytes) in image[..LARGE + 512].chunks(512).enumerate() {
            let writers = [0, 1, 2, 3].into_iter().filter(|writer| match writer % 2 {
                0 => sector != 0,
                _ => sector != LARGE / 512,
            });
            let one = writers.into_iter().any(|writer| *bytes == [last[writer]; 512]);
            assert!(one, "sector {sector} in round {round}: {:?} of {last:?}", &bytes[..4]);
        }
        assert!(image[LARGE + 512..].iter().all(|byte| *byte == 0));
    }
}
