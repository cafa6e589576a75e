//! Random lives: a guest, cuts and merges at random places, at once.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::testing::Random;
use block::{ByteRange, Disk, blocking, write_disk};
use snapshot::{Chain, CommitRequest, DeleteRequest, Manager, StreamRequest};

use super::bench::{Bench, SIZE, chain, check, delete, finish, snapshot};
use super::{content, forget_some, kept, nodes};

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
            let request = CommitRequest {
                device,
                base_node,
                top_node,
                auto_complete: true,
                options: kept(),
                ..CommitRequest::default()
            };
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
