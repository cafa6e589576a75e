#![allow(clippy::unwrap_used, reason = "a failed step of a test ends it")]

use std::path::Path;

use block::{WriteErrors, write_disk};
use hostio::Cache;

use crate::model::CreateRequest;
use crate::{AllowedFolders, DiskConfig, FreezeDefaults, FreezePolicy, ImageFormat, Manager};

fn open(folder: &Path) -> Manager {
    let disk = DiskConfig {
        id: "vda".to_owned(),
        path: folder.join("base.raw"),
        format: ImageFormat::Raw,
        read_only: false,
        cache: Cache::Writeback,
        metadata_cache: crate::DEFAULT_METADATA_CACHE,
        write_errors: WriteErrors::default(),
        max_overlays: None,
    };
    let (state, folders) = (folder.join("state"), AllowedFolders::default());
    Manager::open(&state, &[disk], folders, FreezeDefaults::default(), None).unwrap()
}

/// A snapshot could not be synced, the daemon was started again in the same boot, and its sync succeeded, for the kernel had
/// given the lost pages up: the snapshot was told as sealed.
#[test]
fn a_snapshot_whose_sync_had_failed_is_forgotten_by_the_next_process() {
    let boot = hostio::boot_id().unwrap();
    let other = "0".repeat(boot.len());
    for (note, left) in [(&boot[..], 1), (&boot[..9], 1), (&other, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::File::create(path("base.raw")).unwrap().set_len(1 << 20).unwrap();
        let manager = open(folder.path());
        for name in ["one", "two"] {
            write_disk(&**manager.chain("vda").unwrap(), 0, &[1; 4096]).unwrap();
            let freeze = Some(FreezePolicy::Never);
            manager.create(CreateRequest { name: name.to_owned(), disks: None, freeze }).unwrap();
        }
        manager.shut_down().unwrap();
        drop(manager);
        // As a process leaves it that could not sync the layer of the second.
        let manifest = std::fs::read_to_string(path("state/manifest.json")).unwrap();
        let unsealed = manifest.replace("\"sealed\": true", "\"sealed\": false");
        assert_ne!(manifest, unsealed);
        std::fs::write(path("state/manifest.json"), unsealed).unwrap();
        std::fs::write(path("state/journal/vda-000001.failed"), note).unwrap();
        for _ in 0..2 {
            let found: Vec<_> =
                open(folder.path()).list().into_iter().map(|one| (one.name, one.sealed)).collect();
            assert_eq!(found, [("one".to_owned(), true), ("two".to_owned(), true)][..left]);
            assert!(!path("state/journal/vda-000001.failed").exists());
        }
    }
}
