//! The daemon is replaced under a guest at work, as an upgrade does: asked to end, by a signal or by a client, and started again.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::guest::Guest;
use crate::images::check_clean;
use crate::ledger::{Clock, Ledger};
use crate::load::Mix;
use crate::served::{Served, Wanted};

const QUEUES: usize = 2;
const PLACES: usize = 64;
const SIZE: usize = 4096;
const WANTED: Wanted = Wanted {
    format: "qcow2",
    cache: "writeback",
    disks: 2,
    queues: QUEUES,
    bytes: (SIZE * PLACES * QUEUES) as u64,
};
const SOON: Duration = Duration::from_secs(5);

/// Every request is answered once and without an error, all that was answered is there, and the images are clean each time.
#[test]
fn a_guest_at_work_sees_a_pause_and_no_error() {
    let mut served = Served::start(WANTED);
    let clock = Arc::new(Clock::new());
    let ledgers = || (0..QUEUES).map(|queue| Ledger::new(SIZE, queue, QUEUES, PLACES)).collect();
    let guests = served.sockets.iter().map(|socket| Guest::start(socket, ledgers(), Mix::Discards, &clock));
    let guests: Vec<_> = guests.collect();
    for round in 0..8_u64 {
        // At a moment of its own each time.
        thread::sleep(Duration::from_millis(20 + round * 37 % 80));
        if round == 3 {
            served.ask("snapshot-create", json!({ "name": "between" }));
        }
        match round % 2 {
            0 => served.terminate(),
            _ => served.stop(),
        }
        for (path, _) in served.ids().iter().flat_map(|id| served.layers(id)) {
            check_clean(&path);
        }
        let begun = Instant::now();
        served.restart();
        for guest in &guests {
            while guest.back().len() as u64 <= round {
                assert!(begun.elapsed() < SOON, "round {round}: a guest is not served again");
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
    let ledgers: Vec<_> = guests.into_iter().map(Guest::finish).collect();
    for (disk, mut ledgers) in ledgers.into_iter().enumerate() {
        let image = served.read(disk);
        ledgers.iter_mut().for_each(|ledger| ledger.settle(&image, clock.now()));
    }
    assert_eq!(served.names(), ["between"]);
}
