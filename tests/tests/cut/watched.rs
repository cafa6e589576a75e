//! What is counted is what was done.

use frazil_tests::{Driver, Request};
use serde_json::{Value, json};

use crate::served::{Served, Wanted};

const BLOCK: u64 = 4096;
const WANTED: Wanted = Wanted { format: "qcow2", cache: "writeback", disks: 2, queues: 2, bytes: 64 << 20 };

/// The statistics of a disk.
fn stats(served: &Served, disk: usize) -> Value {
    let all = served.ask("query-blockstats", json!({}));
    assert_eq!(all[disk]["device"], format!("vd{disk}"));
    all[disk]["stats"].clone()
}

fn number(stats: &Value, name: &str) -> u64 {
    stats[name].as_u64().unwrap()
}

/// Requests of each kind on two queues, some of them past the end, counted here and there; a session that ends takes
/// nothing along.
#[test]
fn block_statistics_are_the_drivers_own_counts() {
    let served = Served::start(WANTED);
    for session in 1..=2_u64 {
        let mut driver = Driver::connect(&served.sockets[0], 2, 1, BLOCK as usize).unwrap();
        for (queue, reads) in driver.queues.iter_mut().zip([100, 23]) {
            (0..reads).for_each(|at| assert_eq!(queue.ask(Request::Read(at * BLOCK)), 0));
            (0..50).for_each(|at| assert_eq!(queue.ask(Request::Write(at * BLOCK)), 0));
            (0..3).for_each(|_| assert_eq!(queue.ask(Request::Flush), 0));
            assert_eq!(queue.ask(Request::Discard(1 << 20, 1 << 20)), 0);
            assert_eq!(queue.ask(Request::WriteZeroes(8 << 20, 2 << 20, true)), 0);
            assert_ne!(queue.ask(Request::Read(WANTED.bytes)), 0);
        }
        drop(driver);
        while served.ask("query-frazil", json!({}))["disks"][0]["connected"] == true {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let stats = stats(&served, 0);
        let all = |name: &str| number(&stats, name) / session;
        assert_eq!((all("rd_operations"), all("rd_bytes")), (123, 123 * BLOCK));
        assert_eq!((all("wr_operations"), all("wr_bytes")), (102, 100 * BLOCK + (4 << 20)));
        assert_eq!((all("unmap_operations"), all("unmap_bytes")), (2, 2 << 20));
        assert_eq!((all("flush_operations"), all("invalid_rd_operations")), (6, 2));
        assert_eq!((all("failed_rd_operations"), all("failed_wr_operations")), (0, 0));
        assert_eq!(number(&stats, "wr_highest_offset"), 10 << 20);
        // One request at a time: the worker rests after each, so each is timed.
        for (kind, count) in [("rd", 125), ("wr", 102), ("flush", 6)] {
            let bins = stats[format!("{kind}_latency_histogram")]["bins"].as_array().unwrap();
            let timed: u64 = bins.iter().map(|bin| bin.as_u64().unwrap()).sum();
            assert!(timed > 0 && timed <= count * session, "{kind}: {timed}");
            assert!(number(&stats, &format!("{kind}_total_time_ns")) > 0);
        }
    }
    let other = stats(&served, 1);
    assert_eq!((number(&other, "rd_operations"), number(&other, "wr_operations")), (0, 0));
}
