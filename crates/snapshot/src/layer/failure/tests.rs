#![allow(clippy::unwrap_used, reason = "a failed step of a test ends it")]

use crate::bench::{Bench, snapshot, stamp};

/// Where the note of the layer is that holds the second snapshot.
const NOTE: &str = "state/journal/vda-000001.failed";

/// A disk with two snapshots, and its daemon gone.
fn two_snapshots() -> Bench {
    let bench = Bench::new();
    let manager = bench.open();
    for name in ["one", "two"] {
        stamp(&manager, 0, 1);
        snapshot(&manager, name);
    }
    manager.shut_down().unwrap();
    bench
}

/// What the next two daemons find: their snapshots, and which are sealed. Neither leaves the note.
fn check_found(bench: &Bench, expected: &[(&str, bool)]) {
    for _ in 0..2 {
        let list = bench.open().list();
        let found: Vec<_> = list.iter().map(|one| (&*one.name, one.sealed)).collect();
        assert_eq!(found, expected);
        assert!(!bench.path(NOTE).exists());
    }
}

/// A snapshot could not be synced, the daemon was started again in the same boot, and its sync succeeded, for the kernel had
/// given the lost pages up: the snapshot was told as sealed.
#[test]
fn a_snapshot_whose_sync_had_failed_is_forgotten_by_the_next_process() {
    let boot = hostio::boot_id().unwrap();
    let other = "0".repeat(boot.len());
    for (note, left) in [(&boot[..], 1), (&boot[..9], 1), (&other, 2)] {
        let bench = two_snapshots();
        // As a process leaves it that could not sync the layer of the second.
        let manifest = std::fs::read_to_string(bench.path("state/manifest.json")).unwrap();
        let unsealed = manifest.replace("\"sealed\": true", "\"sealed\": false");
        assert_ne!(manifest, unsealed);
        std::fs::write(bench.path("state/manifest.json"), unsealed).unwrap();
        std::fs::write(bench.path(NOTE), note).unwrap();
        check_found(&bench, &[("one", true), ("two", true)][..left]);
    }
}

/// One is opened to be written, which may end with a failed sync, before the manifest says that it is not sealed any more.
#[test]
fn a_layer_that_counts_as_sealed_is_taken_as_it_is_on_the_disk_too() {
    let bench = two_snapshots();
    std::fs::write(bench.path(NOTE), hostio::boot_id().unwrap()).unwrap();
    check_found(&bench, &[("one", true), ("two", true)]);
}
