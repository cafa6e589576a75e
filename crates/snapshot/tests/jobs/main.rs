//! Jobs over real files: whatever they merge, and whenever, the disk and every snapshot read as they did.
//!
//! `FRAZIL_MERGE_SEEDS=N` lives N random lives in place of the usual few.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step of a test ends it")]

mod bench;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::testing::Random;
use block::{ByteRange, Disk, ErrorKind, blocking, read_disk, write_disk};
use snapshot::{
    Chain, CommitRequest, DeleteRequest, Event, JobOptions, JobStatus, JobVerb, Manager, StreamRequest,
};

use bench::{Bench, SIZE, byte, chain, check, delete, finish, snapshot, stamp};

fn kept() -> JobOptions {
    JobOptions { auto_dismiss: false, ..JobOptions::default() }
}

fn content(manager: &Manager) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    read_disk(&**chain(manager, "vda"), 0, &mut bytes).unwrap();
    bytes
}

/// A change of the disk, and of the bytes that it should have: a write or zeroes, of sectors. It goes through the gate as a
/// guest's requests do.
fn change(chain: &Arc<Chain>, oracle: &mut [u8], dice: &mut Random) {
    let lane = chain.gate().lane(std::task::Waker::noop().clone());
    while !lane.enter() {
        std::thread::sleep(Duration::from_micros(100));
    }
    apply(&**chain, oracle, dice);
    lane.leave(1);
}

fn apply(disk: &dyn Disk, oracle: &mut [u8], dice: &mut Random) {
    let start = dice.below(SIZE / 512) * 512;
    let longest = [512, 4096, 65536, 1 << 20][dice.below(4) as usize];
    let len = (512 * (1 + dice.below(longest / 512))).min(SIZE - start);
    let place = start as usize..(start + len) as usize;
    let range = ByteRange { offset: start, len };
    match dice.below(6) {
        0 => blocking(|waker| disk.write_zeroes(range, dice.below(2) == 0, waker))
            .map(|()| oracle[place].fill(0)),
        _ => {
            let bytes = vec![1 + dice.below(255) as u8; len as usize];
            write_disk(disk, start, &bytes).map(|()| oracle[place].copy_from_slice(&bytes))
        }
    }
    .unwrap();
}

/// The names of a disk's layers, the base first.
fn nodes(manager: &Manager) -> Vec<String> {
    manager.disks()[0].layers.iter().map(|layer| layer.node_name.clone()).collect()
}

/// Merges that were done: commits, streams and deletes.
type Counts = [usize; 3];

/// Some merge, somewhere: which of the counts it is, the job's id, and the snapshot that it deletes. `None` if it is refused,
/// which changes nothing.
fn merge(manager: &Manager, names: &[String], dice: &mut Random) -> Option<(usize, String, Option<String>)> {
    let nodes = nodes(manager);
    let low = dice.below(nodes.len() as u64) as usize;
    let high = (low + 1 + dice.below(2) as usize).min(nodes.len() - 1);
    let kind = dice.below(4) as usize;
    match kind {
        0 => {
            let [base_node, top_node] = [low, high].map(|at| Some(nodes[at].clone()));
            let device = "vda".to_owned();
            let request =
                CommitRequest { device, base_node, top_node, options: kept(), ..CommitRequest::default() };
            manager.commit(request).ok().map(|id| (kind, id, None))
        }
        1 => {
            let base_node = low.checked_sub(1).map(|at| nodes[at].clone());
            let device = nodes[high].clone();
            let request = StreamRequest { device, base_node, options: kept(), ..StreamRequest::default() };
            manager.stream(request).ok().map(|id| (kind, id, None))
        }
        _ => {
            let name = names.get(dice.below(names.len().max(1) as u64) as usize)?.clone();
            let request = DeleteRequest { name: name.clone(), options: kept() };
            manager.delete(request).ok().map(|id| (2, id, Some(name)))
        }
    }
}

/// Has the manifest forget some snapshots, as nothing that Frazil does would: their layers hold nothing that keeps them
/// from being merged.
fn forget_some(bench: &Bench, snapshots: &mut BTreeMap<String, Vec<u8>>, dice: &mut Random) {
    let path = bench.path("state/manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    snapshots.retain(|_, _| dice.below(2) == 0);
    let kept = |one: &serde_json::Value| snapshots.contains_key(one["name"].as_str().unwrap());
    manifest["snapshots"].as_array_mut().unwrap().retain(kept);
    std::fs::write(path, manifest.to_string()).unwrap();
}

fn check_snapshots(bench: &Bench, manager: &Manager, snapshots: &BTreeMap<String, Vec<u8>>, when: &str) {
    assert_eq!(manager.list().len(), snapshots.len());
    for (name, bytes) in snapshots {
        assert!(bench.export(manager, name, "vda") == *bytes, "{when}: {name} has changed");
    }
}

/// Everything at once, for some time: writes under way while jobs and cuts go on, and after each round the disk and all
/// snapshots byte by byte.
fn rounds(seed: u64, count: usize, counts: &mut Counts) {
    let bench = Bench::new(&["vda"]);
    let mut manager = bench.open();
    let mut dice = Random(seed);
    let mut oracle = vec![0; SIZE as usize];
    let mut snapshots: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for round in 0..count {
        chain(&manager, "vda").set_connected(dice.below(3) > 0);
        for _ in 0..dice.below(12) {
            change(chain(&manager, "vda"), &mut oracle, &mut dice);
        }
        if dice.below(3) > 0 {
            let name = format!("s{round}");
            snapshot(&manager, &name);
            snapshots.insert(name, oracle.clone());
        }
        let names: Vec<_> = snapshots.keys().cloned().collect();
        let job = (0..dice.below(8)).find_map(|_| merge(&manager, &names, &mut dice));
        // While the job copies, the guest goes on, and so do cuts.
        for turn in 0..dice.below(20) {
            change(chain(&manager, "vda"), &mut oracle, &mut dice);
            if turn == 7 {
                let name = format!("s{round}-mid");
                snapshot(&manager, &name);
                snapshots.insert(name, oracle.clone());
            }
        }
        if let Some((kind, id, deleted)) = job {
            match finish(&manager, &id) {
                Ok(()) => counts[kind] += 1,
                // A merge that nobody asked for was quicker, or a snapshot was.
                Err(why) => {
                    let stories = ["not there any more", "nothing to merge", "would be lost"];
                    assert!(kind < 2 && stories.iter().any(|story| why.contains(story)), "{why}");
                }
            }
            deleted.map(|name| snapshots.remove(&name));
        }
        assert!(content(&manager) == oracle, "seed {seed}, round {round}: the disk has changed");
        if round % 3 == 2 {
            check_snapshots(&bench, &manager, &snapshots, &format!("seed {seed}, round {round}"));
        }
        if dice.below(3) == 0 {
            drop(manager);
            forget_some(&bench, &mut snapshots, &mut dice);
            manager = bench.open();
            assert!(content(&manager) == oracle, "seed {seed}, round {round}: lost by a restart");
        }
    }
    // Jobs have ended by then, those that nobody asked for included.
    manager.shut_down().unwrap();
    let layers = manager.disks()[0].layers.clone();
    drop(manager);
    for layer in layers.iter().filter(|layer| layer.path.extension().is_some_and(|end| end == "qcow2")) {
        check(&layer.path);
    }
    let files = std::fs::read_dir(bench.folder.path()).unwrap().count();
    // The folder of the state, and the base, which stays when it is not used any more.
    assert!(files <= layers.len() + 2, "{files} files for {} layers", layers.len());
}

#[test]
fn random_merges_at_random_places_change_nothing_that_is_read() {
    let mut counts = Counts::default();
    let seeds = std::env::var("FRAZIL_MERGE_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(4);
    for seed in 0..seeds {
        rounds(seed, 12, &mut counts);
    }
    assert!(counts[2] >= 10 && counts[0] + counts[1] > 0, "hardly anything was merged: {counts:?}");
}

/// What a guest writes while layers are merged beneath it, from another thread, all the time.
#[test]
fn a_guest_that_writes_all_the_time_does_not_notice_deletes() {
    let bench = Bench::new(&["vda"]);
    let manager = Arc::new(bench.open());
    chain(&manager, "vda").set_connected(true);
    let oracle = Arc::new(Mutex::new(vec![0; SIZE as usize]));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (manager, oracle, stop) = (Arc::clone(&manager), Arc::clone(&oracle), Arc::clone(&stop));
        move || {
            let mut dice = Random(99);
            while !stop.load(Ordering::Relaxed) {
                change(chain(&manager, "vda"), &mut oracle.lock().unwrap(), &mut dice);
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    });
    for round in 0..15 {
        for name in ["a", "b"] {
            snapshot(&manager, &format!("{name}{round}"));
        }
        delete(&manager, &format!("{}{round}", if round % 2 == 0 { "a" } else { "b" })).unwrap();
        if round > 4 {
            let oldest = manager.list()[0].name.clone();
            delete(&manager, &oldest).unwrap();
        }
        let oracle = oracle.lock().unwrap();
        assert!(content(&manager) == *oracle, "round {round}");
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    assert!(content(&manager) == *oracle.lock().unwrap());
}

/// A disk with `count` snapshots, `s0` and on, of which each changed the first bytes of each mebibyte.
fn chain_of(count: u8) -> (Bench, Manager) {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    for turn in 0..count {
        (0..8).for_each(|place| stamp(&manager, "vda", (place << 20) + u64::from(turn) * 4096, turn + 1));
        snapshot(&manager, &format!("s{turn}"));
    }
    (bench, manager)
}

fn begin_delete(manager: &Manager, name: &str, speed: u64) -> String {
    let options = JobOptions { speed, ..kept() };
    manager.delete(DeleteRequest { name: name.to_owned(), options }).unwrap()
}

fn wait_for(manager: &Manager, id: &str, status: JobStatus) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !manager.jobs().iter().any(|job| job.id == id && job.status == status) {
        assert!(std::time::Instant::now() < deadline, "{:?}", manager.jobs());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_job_can_be_paused_slowed_resumed_and_told_of() {
    let (_bench, manager) = chain_of(3);
    let events = manager.subscribe();
    // Slow enough not to end before it is told to.
    let id = begin_delete(&manager, "s1", 4096);
    wait_for(&manager, &id, JobStatus::Running);
    manager.ask_job(&id, JobVerb::Pause).unwrap();
    wait_for(&manager, &id, JobStatus::Paused);
    assert!(manager.ask_job(&id, JobVerb::Pause).unwrap_err().to_string().contains("already paused"));
    let at_rest = manager.jobs();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(manager.jobs(), at_rest);
    assert_eq!(manager.ask_job(&id, JobVerb::Dismiss).unwrap_err().kind(), ErrorKind::Busy);
    manager.set_job_speed(&id, 0).unwrap();
    manager.ask_job(&id, JobVerb::Resume).unwrap();
    finish(&manager, &id).unwrap();
    assert!(manager.jobs().is_empty());
    let told: Vec<_> = events
        .try_iter()
        .filter_map(|event| match event {
            Event::Job { status, .. } => Some(status),
            _ => None,
        })
        .collect();
    use JobStatus::{Concluded, Created, Null, Paused, Pending, Running, Waiting};
    assert_eq!(told, [Created, Running, Paused, Running, Waiting, Pending, Concluded, Null]);
}

#[test]
fn a_job_that_is_called_off_leaves_a_disk_that_reads_the_same() {
    let (bench, manager) = chain_of(3);
    let before = content(&manager);
    let id = begin_delete(&manager, "s1", 4096);
    wait_for(&manager, &id, JobStatus::Running);
    std::thread::sleep(Duration::from_millis(20));
    manager.ask_job(&id, JobVerb::Cancel).unwrap();
    assert_eq!(finish(&manager, &id).unwrap_err(), "it was cancelled");
    assert!(content(&manager) == before);
    assert_eq!(bench.export(&manager, "s0", "vda")[4096], 0);
    assert_eq!(bench.export(&manager, "s2", "vda")[4096], 2);
    delete(&manager, "s1").unwrap();
    assert!(content(&manager) == before);
    assert_eq!(nodes(&manager).len(), 3);
}

#[test]
fn a_job_goes_on_after_a_restart_as_it_was_told() {
    let (bench, manager) = chain_of(3);
    let before = content(&manager);
    let id = begin_delete(&manager, "s1", 4096);
    wait_for(&manager, &id, JobStatus::Running);
    manager.ask_job(&id, JobVerb::Pause).unwrap();
    drop(manager);
    let manager = bench.open();
    assert!(content(&manager) == before);
    wait_for(&manager, &id, JobStatus::Paused);
    manager.set_job_speed(&id, 0).unwrap();
    manager.ask_job(&id, JobVerb::Resume).unwrap();
    finish(&manager, &id).unwrap();
    assert!(content(&manager) == before);
    assert_eq!(manager.show("s1").unwrap_err().kind(), ErrorKind::NotFound);
    drop(manager);
    assert!(content(&bench.open()) == before);
}

#[test]
fn jobs_of_one_disk_take_turns() {
    let (_bench, manager) = chain_of(4);
    let first = begin_delete(&manager, "s1", 4096);
    let second = begin_delete(&manager, "s2", 0);
    wait_for(&manager, &first, JobStatus::Running);
    std::thread::sleep(Duration::from_millis(20));
    wait_for(&manager, &second, JobStatus::Created);
    assert_eq!(manager.revert("s0", true).unwrap_err().kind(), ErrorKind::Busy);
    // What waits can be called off as well, and then leaves no trace.
    let third = begin_delete(&manager, "s3", 0);
    manager.ask_job(&third, JobVerb::Cancel).unwrap();
    assert!(finish(&manager, &third).is_err());
    manager.set_job_speed(&first, 0).unwrap();
    finish(&manager, &first).unwrap();
    finish(&manager, &second).unwrap();
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
    let start = std::time::Instant::now();
    let error = manager.revert("c", true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(start.elapsed() < Duration::from_secs(5), "it has waited for the lease");
    assert!(second.exists());
    manager.abort("held").unwrap();
    drop(reader);
    manager.revert("c", true).unwrap();
}

#[test]
fn layers_that_hold_snapshots_are_not_merged_away() {
    let (_bench, manager) = chain_of(3);
    let commit = |base: &str, top: &str| {
        let [base_node, top_node] = [base, top].map(|node| Some(node.to_owned()));
        let device = "vda".to_owned();
        manager.commit(CommitRequest { device, base_node, top_node, ..CommitRequest::default() })
    };
    let error = commit("vda.0", "vda.2").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("s0"), "{error}");
    assert_eq!(commit("vda.1", "vda.1").unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(commit("vda.1", "vda.9").unwrap_err().kind(), ErrorKind::NotFound);
    let device = "vdz".to_owned();
    let stream = manager.stream(StreamRequest { device, ..StreamRequest::default() });
    assert_eq!(stream.unwrap_err().kind(), ErrorKind::NotFound);
    let device = "vda".to_owned();
    let stream = manager.stream(StreamRequest { device, ..StreamRequest::default() });
    assert!(stream.unwrap_err().to_string().contains("would be lost"));
}

/// The base was pulled up: it is not used any more, is not removed, and the disk is still known by it.
#[test]
fn a_disk_can_be_made_independent_of_its_base() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    (0..8).for_each(|place| stamp(&manager, "vda", place << 20, 1));
    snapshot(&manager, "one");
    stamp(&manager, "vda", 4096, 2);
    snapshot(&manager, "two");
    delete(&manager, "one").unwrap();
    let before = content(&manager);
    // What holds no snapshot is streamed: nothing but the base is beneath the layer of "two" now.
    stamp(&manager, "vda", 8192, 3);
    snapshot(&manager, "three");
    delete(&manager, "two").unwrap();
    delete(&manager, "three").unwrap();
    chain(&manager, "vda").set_connected(true);
    let base = std::fs::read(bench.path("base-vda.raw")).unwrap();
    let id =
        manager.stream(StreamRequest { device: "vda".into(), options: kept(), ..StreamRequest::default() });
    let refused =
        id.and_then(|id| finish(&manager, &id).map_err(|why| block::Error::new(ErrorKind::Io, why)));
    if nodes(&manager).len() > 1 {
        refused.unwrap();
    }
    assert_eq!(byte(&manager, "vda", 4096), 2);
    assert_eq!(byte(&manager, "vda", 8192), 3);
    assert_eq!(content(&manager)[..4096], before[..4096]);
    assert_eq!(std::fs::read(bench.path("base-vda.raw")).unwrap().len(), base.len());
    manager.shut_down().unwrap();
    drop(manager);
    let manager = bench.open();
    assert_eq!(byte(&manager, "vda", 8192), 3);
    snapshot(&manager, "four");
    stamp(&manager, "vda", 8192, 4);
    assert_eq!(bench.export(&manager, "four", "vda")[8192], 3);
}

#[test]
fn a_snapshot_that_is_being_read_is_not_spoiled() {
    let (bench, manager) = chain_of(2);
    let out = bench.path("out");
    let mut refused = None;
    manager
        .export("s0", "vda", &out, snapshot::ImageFormat::Raw, &mut |_, _| {
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
    let (out, mut id) = (bench.path("out"), None);
    manager
        .export("s1", "vda", &out, snapshot::ImageFormat::Raw, &mut |_, _| {
            if id.is_none() {
                let id = id.insert(begin_delete(&manager, "s1", 0));
                let begun = std::time::Instant::now();
                let is_over = || manager.jobs().iter().all(|job| job.status == JobStatus::Concluded);
                while !is_over() && begun.elapsed() < Duration::from_millis(300) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                if is_over() {
                    finish(&manager, id).unwrap();
                    delete(&manager, "s0").unwrap();
                }
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(std::fs::read(&out).unwrap()[last as usize], b'0');
    finish(&manager, &id.unwrap()).unwrap();
    assert_eq!(manager.list().len(), 2);
}

#[test]
fn a_disk_with_too_many_overlays_loses_its_oldest_snapshots() {
    let mut bench = Bench::new(&["vda"]);
    bench.disks[0].max_overlays = Some(3);
    let manager = bench.open();
    let events = manager.subscribe();
    for turn in 0..7 {
        stamp(&manager, "vda", turn * 4096, turn as u8 + 1);
        snapshot(&manager, &format!("s{turn}"));
    }
    let before = content(&manager);
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while nodes(&manager).len() > 4 || !manager.jobs().is_empty() {
        assert!(std::time::Instant::now() < deadline, "{:?} {:?}", nodes(&manager), manager.jobs());
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

/// The disk has grown since the snapshot: the layer that takes in what came after it grows as well.
#[test]
fn layers_of_before_a_resize_take_in_those_of_after_it() {
    for (connected, name) in [(true, "guest"), (false, "none")] {
        let bench = Bench::new(&["vda"]);
        let manager = bench.open();
        chain(&manager, "vda").set_connected(connected);
        stamp(&manager, "vda", 0, 1);
        snapshot(&manager, "one");
        stamp(&manager, "vda", 4096, 2);
        snapshot(&manager, "two");
        manager.resize("vda", SIZE + (1 << 20)).unwrap();
        stamp(&manager, "vda", SIZE + 8192, 3);
        snapshot(&manager, "three");
        let look = || [0, 4096, SIZE, SIZE + 8192].map(|at| byte(&manager, "vda", at));
        for deleted in ["two", "one", "three"] {
            delete(&manager, deleted).unwrap();
            assert_eq!(look(), [1, 2, 0, 3], "{name}: {deleted}");
        }
        manager.shut_down().unwrap();
        drop(manager);
        let manager = bench.open();
        assert_eq!(chain(&manager, "vda").capacity(), SIZE + (1 << 20));
        assert_eq!(byte(&manager, "vda", SIZE + 8192), 3);
    }
}

/// A job is called off after it had its target grow, past the layer above that. The layers can be merged all the same.
#[test]
fn a_layer_that_grew_for_a_job_that_was_called_off_is_merged_later() {
    let larger = SIZE + (4 << 20);
    for restarted in [false, true] {
        let bench = Bench::new(&["vda"]);
        let mut manager = bench.open();
        chain(&manager, "vda").set_connected(true);
        stamp(&manager, "vda", 0, 1);
        let commit = |manager: &Manager, speed| {
            let (device, options) = ("vda".to_owned(), JobOptions { speed, ..kept() });
            manager.commit(CommitRequest { device, options, ..CommitRequest::default() }).unwrap()
        };
        (0..8).for_each(|place| stamp(&manager, "vda", place << 20, 2));
        snapshot(&manager, "one");
        (0..8).for_each(|place| stamp(&manager, "vda", (place << 20) + 4096, 3));
        snapshot(&manager, "two");
        manager.resize("vda", larger).unwrap();
        (0..4).for_each(|place| stamp(&manager, "vda", SIZE + (place << 20), 4));
        manager.shut_down().unwrap();
        drop(manager);
        forget_some(&bench, &mut BTreeMap::new(), &mut Random(1));
        manager = bench.open();
        chain(&manager, "vda").set_connected(true);
        let before = (0..larger >> 12).map(|page| byte(&manager, "vda", page << 12)).collect::<Vec<_>>();
        let mut id = commit(&manager, 4096);
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while std::fs::metadata(bench.path("base-vda.raw")).unwrap().len() < larger {
            assert!(std::time::Instant::now() < deadline, "{:?}", manager.jobs());
            std::thread::sleep(Duration::from_millis(1));
        }
        if restarted {
            manager.shut_down().unwrap();
            drop(manager);
            manager = bench.open();
            chain(&manager, "vda").set_connected(true);
            manager.set_job_speed(&id, 0).unwrap();
        } else {
            manager.ask_job(&id, JobVerb::Cancel).unwrap();
            finish(&manager, &id).unwrap_err();
            id = commit(&manager, 0);
        }
        finish(&manager, &id).unwrap();
        let after = (0..larger >> 12).map(|page| byte(&manager, "vda", page << 12)).collect::<Vec<_>>();
        assert!(before == after, "the disk has changed");
    }
}

/// The base image had a backing file of its own: what was only in that would be gone with the base.
#[test]
fn a_disk_made_independent_of_its_base_is_so_of_what_is_beneath_that() {
    let mut bench = Bench::new(&["vda"]);
    let (beneath, base) = (bench.path("base-vda.raw"), bench.path("base.qcow2"));
    let file = std::fs::File::options().write(true).open(&beneath).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[5; 4096], 8192).unwrap();
    let mut create = std::process::Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base-vda.raw"]).arg(&base);
    assert!(create.status().expect("qemu-img is needed: run `make deps`").success());
    (bench.disks[0].path, bench.disks[0].format) = (base, snapshot::ImageFormat::Qcow2);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    chain(&manager, "vda").set_connected(true);
    let request = StreamRequest { device: "vda".to_owned(), options: kept(), ..StreamRequest::default() };
    // The base itself is the active layer: one that can be streamed into is put on it.
    snapshot(&manager, "one");
    delete(&manager, "one").unwrap();
    let id = manager.stream(request).unwrap();
    finish(&manager, &id).unwrap();
    assert!(manager.disks()[0].layers.iter().all(|layer| !layer.path.ends_with("base.qcow2")));
    assert_eq!([0, 8192].map(|at| byte(&manager, "vda", at)), [1, 5]);
    manager.shut_down().unwrap();
    drop(manager);
    std::fs::remove_file(beneath).unwrap();
    assert_eq!([0, 8192].map(|at| byte(&bench.open(), "vda", at)), [1, 5]);
}
