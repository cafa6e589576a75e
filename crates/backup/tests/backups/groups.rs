//! Backups that end together.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use snapshot::{JobStatus, JobVerb};

use crate::bench::*;

/// Bitmaps on both disks, something in them, and a target for each.
fn prepare(bench: &Bench, daemon: &Daemon) {
    for (disk, target) in [("vda", "a"), ("vdb", "b")] {
        transaction(daemon, json!([bitmap("add", disk, "b")])).unwrap();
        (0..8).for_each(|at| write(daemon, disk, at << 16, 1));
        bench.target(daemon, target);
    }
}

fn with(mut action: Value, more: Value) -> Value {
    action["data"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    action
}

fn await_status(daemon: &Daemon, id: &str, status: JobStatus) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let job = daemon.manager.jobs().into_iter().find(|job| job.id == id).unwrap();
        if job.status == status {
            return;
        }
        assert!(Instant::now() < deadline, "{job:?} is not {status:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_job_that_is_called_off_takes_those_of_its_group_with_it() {
    let bench = Bench::new();
    let daemon = bench.open();
    prepare(&bench, &daemon);
    let slow = with(incremental("vdb", "b", "b"), json!({"speed": 65536}));
    grouped(&daemon, json!([incremental("vda", "a", "b"), slow])).unwrap();
    // It has copied all, and must not clean its bitmap before the other one has.
    await_status(&daemon, "a", JobStatus::Waiting);
    daemon.manager.ask_job("b", JobVerb::Cancel).unwrap();
    for id in ["a", "b"] {
        assert_eq!(finish(&daemon, id).as_deref(), Some("Operation canceled"));
    }
    for disk in ["vda", "vdb"] {
        assert_eq!(dirty(&daemon, disk, "b"), 8 << 16);
    }
}

#[test]
fn one_that_waits_to_be_finalized_holds_up_its_group() {
    let bench = Bench::new();
    let daemon = bench.open();
    prepare(&bench, &daemon);
    let both = || {
        let by_hand = with(incremental("vdb", "b", "b"), json!({"auto-finalize": false}));
        json!([incremental("vda", "a", "b"), by_hand])
    };
    for (verb, of) in
        [(JobVerb::Cancel, "a"), (JobVerb::Cancel, "b"), (JobVerb::Finalize, "a"), (JobVerb::Finalize, "b")]
    {
        (0..8).for_each(|at| write(&daemon, "vda", at << 16, 1));
        (0..8).for_each(|at| write(&daemon, "vdb", at << 16, 1));
        grouped(&daemon, both()).unwrap();
        for id in ["a", "b"] {
            await_status(&daemon, id, JobStatus::Pending);
        }
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(dirty(&daemon, "vda", "b"), 8 << 16, "it waits for the other one's word");
        daemon.manager.ask_job(of, verb).unwrap();
        let (error, left) = match verb {
            JobVerb::Cancel => (Some("Operation canceled"), 8 << 16),
            _ => (None, 0),
        };
        for (id, disk) in [("a", "vda"), ("b", "vdb")] {
            assert_eq!(finish(&daemon, id).as_deref(), error, "{verb:?} {of}");
            assert_eq!(dirty(&daemon, disk, "b"), left, "{verb:?} {of}");
        }
    }
}

/// Whichever comes first decides, for both.
#[test]
fn a_group_that_is_finalized_and_called_off_at_once_ends_in_one_way() {
    let bench = Bench::new();
    let daemon = bench.open();
    prepare(&bench, &daemon);
    let by_hand = |disk, target| with(incremental(disk, target, "b"), json!({"auto-finalize": false}));
    for round in 0..40 {
        (0..8).for_each(|at| write(&daemon, "vda", at << 16, 1));
        (0..8).for_each(|at| write(&daemon, "vdb", at << 16, 1));
        grouped(&daemon, json!([by_hand("vda", "a"), by_hand("vdb", "b")])).unwrap();
        for id in ["a", "b"] {
            await_status(&daemon, id, JobStatus::Pending);
        }
        std::thread::scope(|scope| {
            scope.spawn(|| daemon.manager.ask_job("a", JobVerb::Finalize));
            scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(round % 4 * 10));
                daemon.manager.ask_job("b", JobVerb::Cancel)
            });
        });
        let ends = ["a", "b"].map(|id| finish(&daemon, id));
        assert_eq!(ends[0], ends[1], "round {round}");
        let left = if ends[0].is_some() { 8 << 16 } else { 0 };
        assert_eq!((dirty(&daemon, "vda", "b"), dirty(&daemon, "vdb", "b")), (left, left));
    }
}
