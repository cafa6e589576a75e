//! Jobs over real files: whatever they merge, and whenever, the disk and every snapshot read as they did.
//!
//! `FRAZIL_MERGE_SEEDS=N` lives N random lives in place of the usual few.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step of a test ends it")]

#[path = "../bench/mod.rs"]
mod bench;
mod chains;
mod control;
mod lives;
mod readers;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use block::read_disk;
use block::testing::Random;
use snapshot::{DeleteRequest, JobOptions, JobStatus, Manager};

use bench::{Bench, SIZE, chain, snapshot, stamp};

pub(crate) fn kept() -> JobOptions {
    JobOptions { auto_dismiss: false, ..JobOptions::default() }
}

pub(crate) fn content(manager: &Manager) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    read_disk(&**chain(manager, "vda"), 0, &mut bytes).unwrap();
    bytes
}

/// The names of a disk's layers, the base first.
pub(crate) fn nodes(manager: &Manager) -> Vec<String> {
    manager.disks()[0].layers.iter().map(|layer| layer.node_name.clone()).collect()
}

/// Has the manifest forget some snapshots, as nothing that Frazil does would: their layers hold nothing that keeps them
/// from being merged.
pub(crate) fn forget_some(bench: &Bench, snapshots: &mut BTreeMap<String, Vec<u8>>, dice: &mut Random) {
    let path = bench.path("state/manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    snapshots.retain(|_, _| dice.below(2) == 0);
    let kept = |one: &serde_json::Value| snapshots.contains_key(one["name"].as_str().unwrap());
    manifest["snapshots"].as_array_mut().unwrap().retain(kept);
    std::fs::write(path, manifest.to_string()).unwrap();
}

/// A disk with `count` snapshots, `s0` and on, of which each changed the first bytes of each mebibyte.
pub(crate) fn chain_of(count: u8) -> (Bench, Manager) {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    for turn in 0..count {
        (0..8).for_each(|place| stamp(&manager, "vda", (place << 20) + u64::from(turn) * 4096, turn + 1));
        snapshot(&manager, &format!("s{turn}"));
    }
    (bench, manager)
}

pub(crate) fn begin_delete(manager: &Manager, name: &str, speed: u64) -> String {
    let options = JobOptions { speed, ..kept() };
    manager.delete(DeleteRequest { name: name.to_owned(), options }).unwrap()
}

pub(crate) fn wait_for(manager: &Manager, id: &str, status: JobStatus) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !manager.jobs().iter().any(|job| job.id == id && job.status == status) {
        assert!(Instant::now() < deadline, "{:?}", manager.jobs());
        std::thread::sleep(Duration::from_millis(1));
    }
}
