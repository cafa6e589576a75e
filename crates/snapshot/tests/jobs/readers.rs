//! Jobs beside those who read snapshots or hold cuts, and which snapshots go by themselves.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use block::{ErrorKind, read_disk};
use snapshot::{CutRequest, Event, FreezePolicy, ImageFormat, JobStatus, Manager};

use super::bench::{self, Bench, SIZE, delete, finish, snapshot, stamp};
use super::{begin_delete, chain_of, content, nodes, wait_for};

/// Each merge syncs many times, which takes seconds on a busy host; and after one that failed, a disk is left alone for a minute.
const PATIENCE: Duration = Duration::from_secs(150);

#[test]
fn a_snapshot_that_is_being_read_is_not_spoiled() {
    let (bench, manager) = chain_of(2);
    let out = bench.path("out");
    let mut refused = None;
    manager
        .export("s0", "vda", &out, ImageFormat::Raw, &mut |_, _| {
            refused.get_or_insert_with(|| delete(&manager, "s0"));
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(refused.unwrap().unwrap_err().contains("being read"));
    assert_eq!(std::fs::read(&out).unwrap()[4096], 0);
    delete(&manager, "s0").unwrap();
}

/// Its layer is merged up, which no reader sees; but once it is not known any more, what is beneath is merged into: the copy
/// had bytes of a later snapshot in it.
#[test]
fn a_snapshot_goes_only_when_nobody_reads_it_any_more() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let last = SIZE - 4096;
    for (name, places) in [("s0", vec![last]), ("s1", vec![0]), ("s2", vec![0, 1 << 20, 2 << 20, last])] {
        places.into_iter().for_each(|place| stamp(&manager, "vda", place, name.as_bytes()[1]));
        snapshot(&manager, name);
    }
    let out = bench.path("out");
    let id = begin_delete(&manager, "s1", 1);
    let mut is_begun = false;
    manager
        .export("s1", "vda", &out, ImageFormat::Raw, &mut |_, _| {
            if !std::mem::replace(&mut is_begun, true) {
                manager.set_job_speed(&id, 0).unwrap();
                let begun = Instant::now();
                let is_over = || manager.jobs().iter().all(|job| job.status == JobStatus::Concluded);
                while !is_over() && begun.elapsed() < Duration::from_millis(300) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                if is_over() {
                    finish(&manager, &id).unwrap();
                    delete(&manager, "s0").unwrap();
                }
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(std::fs::read(&out).unwrap()[last as usize], b'0');
    finish(&manager, &id).unwrap();
    assert_eq!(manager.list().len(), 2);
}

/// A job that nobody asked for was called off for a revert, and could put away what it had begun only after the cut that
/// was held: the client waited for another one's lease.
#[test]
fn a_revert_does_not_wait_for_a_snapshot_that_is_held() {
    let mut bench = Bench::new(&["vda"]);
    bench.disks[0].max_overlays = Some(2);
    let manager = bench.open();
    for name in ["a", "b"] {
        stamp(&manager, "vda", 0, 1);
        snapshot(&manager, name);
    }
    let second = manager.disks()[0].layers[1].path.clone();
    snapshot(&manager, "c");
    // "a" is to go, and its layer into the base: for that the job writes into the header of the layer of "c".
    let third = manager.disks()[0].layers[2].path.clone();
    let how = hostio::Open { writable: false, cache: hostio::Cache::Writeback };
    let reader = hostio::HostFile::open(&third, how).unwrap();
    wait_for(&manager, "expire-a", JobStatus::Waiting);
    manager.prepare(bench::request("held"), Duration::from_secs(10)).unwrap();
    let start = Instant::now();
    let error = manager.revert("c", true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(start.elapsed() < Duration::from_secs(5), "it has waited for the lease");
    assert!(second.exists());
    manager.abort("held").unwrap();
    drop(reader);
    manager.revert("c", true).unwrap();
}

#[test]
fn a_disk_with_too_many_overlays_loses_its_oldest_snapshots() {
    let mut bench = Bench::new(&["vda"]);
    bench.disks[0].max_overlays = Some(3);
    let manager = bench.open();
    let events = bench::events(&manager);
    for turn in 0..7 {
        stamp(&manager, "vda", turn * 4096, turn as u8 + 1);
        snapshot(&manager, &format!("s{turn}"));
    }
    let before = content(&manager);
    let deadline = Instant::now() + PATIENCE;
    while nodes(&manager).len() > 4 || !manager.jobs().is_empty() {
        assert!(Instant::now() < deadline, "{:?} {:?}", nodes(&manager), manager.jobs());
        std::thread::sleep(Duration::from_millis(10));
    }
    let names: Vec<_> = manager.list().into_iter().map(|one| one.name).collect();
    assert_eq!(names, ["s4", "s5", "s6"]);
    assert!(content(&manager) == before);
    let expired: Vec<_> = events
        .try_iter()
        .filter_map(|event| match event {
            Event::Expired { name, .. } => Some(name),
            _ => None,
        })
        .collect();
    assert_eq!(expired, ["s0", "s1", "s2", "s3"]);
}

/// The overlay of a cut that was then undone counted, and the oldest snapshot went for it.
#[test]
fn a_cut_that_is_undone_costs_no_snapshot() {
    let mut bench = Bench::new(&["vda"]);
    bench.disks[0].max_overlays = Some(1);
    let manager = bench.open();
    snapshot(&manager, "a");
    manager.prepare(bench::request("b"), Duration::from_secs(20)).unwrap();
    // Longer than it takes until it is looked what is to be done.
    std::thread::sleep(Duration::from_millis(1300));
    manager.abort("b").unwrap();
    std::thread::sleep(Duration::from_millis(1300));
    assert!(manager.jobs().is_empty(), "{:?}", manager.jobs());
    assert!(manager.show("a").is_ok());
}

/// Takes snapshots until the disk has more overlays than it may, and waits until it has no more than that.
fn overflow(manager: &Manager, most: usize) {
    for name in ["s1", "s2", "s3"] {
        stamp(manager, "vda", 0, name.as_bytes()[1]);
        snapshot(manager, name);
    }
    let deadline = Instant::now() + PATIENCE;
    while nodes(manager).len() > most + 1 || !manager.jobs().is_empty() {
        assert!(Instant::now() < deadline, "{:?} {:?}", nodes(manager), manager.jobs());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn names(manager: &Manager) -> Vec<String> {
    manager.list().into_iter().map(|one| one.name).collect()
}

/// One that a backup reads went first, and its layer stayed for the backup: the next one went too, for nothing.
#[test]
fn what_expires_for_too_many_overlays_is_what_nobody_reads() {
    let mut bench = Bench::new(&["vda"]);
    bench.disks[0].max_overlays = Some(2);
    let manager = bench.open();
    stamp(&manager, "vda", 0, b'0');
    let request =
        CutRequest { snapshot: Some("s0".to_owned()), disks: None, freeze: Some(FreezePolicy::Never) };
    let taken = manager.cut_with(request, &[]).unwrap();
    overflow(&manager, 2);
    assert_eq!(names(&manager), ["s0", "s3"]);
    let mut byte = [0];
    read_disk(&*taken.pins[0].disk(), 0, &mut byte).unwrap();
    assert_eq!(byte, *b"0");
}

/// A job that deletes what is being exported waits for that, or fails; either way nothing else was merged meanwhile.
#[test]
fn what_is_exported_does_not_keep_a_disk_from_its_limit() {
    let mut bench = Bench::new(&["vda"]);
    bench.disks[0].max_overlays = Some(2);
    let manager = bench.open();
    stamp(&manager, "vda", 0, b'0');
    snapshot(&manager, "s0");
    let (out, mut is_full) = (bench.path("out"), false);
    let mut progress = |_, _| {
        if !std::mem::replace(&mut is_full, true) {
            overflow(&manager, 2);
        }
        ControlFlow::Continue(())
    };
    manager.export("s0", "vda", &out, ImageFormat::Raw, &mut progress).unwrap();
    assert_eq!(names(&manager), ["s0", "s3"]);
    assert_eq!(std::fs::read(&out).unwrap()[0], b'0');
}
