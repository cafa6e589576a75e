//! Many clients at once: whatever they ask, and in whatever order, all is answered, and in the end nothing is left in use.

use std::time::{Duration, Instant};

use serde_json::json;
use snapshot::{JobType, JobVerb};

use crate::bench::*;

const TIME: Duration = Duration::from_millis(1500);

/// One client, which puts filters on and takes them off, begins and cancels jobs, and does not mind what is refused. If it
/// `writes`, so does its guest.
fn client(daemon: &Daemon, number: usize, bench: &Bench, writes: bool) {
    let until = Instant::now() + TIME;
    let (disk, target) = (["vda", "vdb"][number % 2], format!("t{number}"));
    let (filter, access) = (format!("cbw{number}"), format!("access{number}"));
    let file = bench.path(&format!("made{number}"));
    let mut round = number;
    while Instant::now() < until {
        round += 1;
        let fleece = format!("t{}", round % 4);
        let mut backup = full([disk, &access][round % 2], &target);
        backup["data"]["job-id"] = json!(format!("j{}", round % 5));
        backup["data"]["auto-dismiss"] = json!(true);
        backup["data"]["auto-finalize"] = json!(!round.is_multiple_of(3));
        let to_file = json!({"type": "drive-backup", "data": {"device": disk, "target": file, "format": "qcow2",
            "sync": "full", "compress": round.is_multiple_of(2), "job-id": format!("d{number}")}});
        let _ = add(
            daemon,
            json!({"driver": "copy-before-write", "node-name": filter, "file": disk, "target": fleece}),
        );
        let _ = add(daemon, json!({"driver": "snapshot-access", "node-name": access, "file": filter}));
        let _ = daemon.backups.set_drive(disk, &filter);
        let both = json!([bitmap(["add", "remove", "clear"][round % 3], disk, "b"), backup, to_file]);
        let _ = if round.is_multiple_of(2) { transaction(daemon, both) } else { grouped(daemon, both) };
        if writes {
            write(daemon, disk, (round as u64 % 64) << 16, round as u8);
        }
        let verb = [JobVerb::Cancel, JobVerb::Pause, JobVerb::Resume, JobVerb::Finalize][round % 4];
        let _ = daemon.manager.ask_job(&format!("j{}", round % 5), verb);
        let _ = daemon.backups.remove_node(&access);
        let _ = daemon.backups.set_drive(disk, disk);
        let _ = daemon.backups.remove_node(&filter);
        let _ = daemon.backups.nodes();
    }
}

#[test]
fn clients_that_get_in_each_others_way_leave_nothing_in_use() {
    let bench = Bench::new();
    let daemon = bench.open();
    (0..4).for_each(|number| drop(bench.target(&daemon, &format!("t{number}"))));
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (daemon, bench) = (&daemon, &bench);
            scope.spawn(move || client(daemon, number, bench, true));
        }
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    while !daemon.manager.jobs().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", daemon.manager.jobs());
        for job in daemon.manager.jobs() {
            for verb in [JobVerb::Cancel, JobVerb::Dismiss] {
                let _ = daemon.manager.ask_job(&job.id, verb);
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    for disk in ["vda", "vdb"] {
        daemon.backups.set_drive(disk, disk).unwrap();
        assert!(daemon.manager.bitmaps(disk).unwrap().iter().all(|bitmap| !bitmap.busy));
    }
    for number in 0..4 {
        let _ = daemon.backups.remove_node(&format!("access{number}"));
        let _ = daemon.backups.remove_node(&format!("cbw{number}"));
    }
    (0..4).for_each(|number| daemon.backups.remove_node(&format!("t{number}")).unwrap());
    assert!(daemon.backups.nodes().is_empty());
    let expected = content(&daemon, "vda");
    let last = bench.target(&daemon, "last");
    transaction(&daemon, json!([full("vda", "last")])).unwrap();
    assert_eq!(finish(&daemon, "last"), None);
    assert!(std::fs::read(last).unwrap() == expected);
}

/// The daemon ends while clients are at it: they are refused, or their jobs end with it.
#[test]
fn the_daemon_ends_in_the_midst_of_what_clients_ask() {
    for round in 0..3_u64 {
        let bench = Bench::new();
        let daemon = bench.open();
        (0..4).for_each(|number| drop(bench.target(&daemon, &format!("t{number}"))));
        std::thread::scope(|scope| {
            for number in 0..3 {
                let (daemon, bench) = (&daemon, &bench);
                scope.spawn(move || client(daemon, number, bench, false));
            }
            std::thread::sleep(Duration::from_millis(100 + 150 * round));
            daemon.manager.shut_down().unwrap();
        });
        drop(daemon);
        let daemon = bench.open();
        assert!(daemon.manager.jobs().iter().all(|job| job.r#type != JobType::Backup));
        content(&daemon, "vda");
    }
}
