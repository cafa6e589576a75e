//! `stop` and `cont`: the disks stand still while the guest asks for more, and nothing else does.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::ledger::{Clock, Ledger};
use crate::load::{Load, Mix};
use crate::served::{Served, Wanted};

const QUEUES: usize = 2;

fn new_ledgers() -> Vec<Vec<Ledger>> {
    let ledgers = |_| (0..QUEUES).map(|queue| Ledger::new(4096, queue, QUEUES, 64)).collect();
    (0..2).map(ledgers).collect()
}

#[test]
fn while_the_disks_are_stopped_nothing_changes_but_cuts_go_on() {
    let bytes = 4096 * 64 * QUEUES as u64;
    let served = Served::start(Wanted { format: "raw", cache: "writeback", disks: 2, queues: QUEUES, bytes });
    let clock = Arc::new(Clock::new());
    let load = Load::connect(&served.sockets, new_ledgers(), Mix::Stamps, &clock);
    thread::sleep(Duration::from_millis(30));
    served.ask("stop", json!({}));
    served.ask("stop", json!({}));
    let status = || served.ask("query-status", json!({}))["status"].clone();
    assert_eq!(status(), "paused");
    served.snapshot("first", &clock);
    thread::sleep(Duration::from_millis(50));
    served.snapshot("second", &clock);
    assert_eq!(status(), "paused", "a cut opens no gate that it has not closed");
    assert!(served.export_all("first") == served.export_all("second"));

    let mut events = Vec::new();
    let mut client = served.qmp();
    client.execute("cont", json!({}), |event, _| events.push(event.to_owned())).unwrap();
    client.execute("query-status", json!({}), |event, _| events.push(event.to_owned())).unwrap();
    assert!(events.contains(&"RESUME".to_owned()), "{events:?}");
    thread::sleep(Duration::from_millis(50));
    served.snapshot("third", &clock);
    assert!(served.export_all("second") != served.export_all("third"));
    load.finish();
    // It sees a little later that the front-end has gone.
    let deadline = Instant::now() + Duration::from_secs(10);
    while served.ask("query-status", json!({}))["status"] != "prelaunch" {
        assert!(Instant::now() < deadline, "the front-end is gone");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_daemon_ends_while_its_disks_are_stopped_and_requests_wait() {
    let bytes = 4096 * 64 * QUEUES as u64;
    let mut served =
        Served::start(Wanted { format: "raw", cache: "writeback", disks: 2, queues: QUEUES, bytes });
    let clock = Arc::new(Clock::new());
    let load = Load::connect(&served.sockets, new_ledgers(), Mix::Stamps, &clock);
    thread::sleep(Duration::from_millis(20));
    served.ask("stop", json!({}));
    served.stop();
    let mut ledgers = load.leave();
    served.restart();
    for (disk, ledgers) in ledgers.iter_mut().enumerate() {
        let image = served.read(disk);
        ledgers.iter_mut().for_each(|ledger| ledger.settle(&image, clock.now()));
    }
}
