//! Two disks on real files, and what a program asks about them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use backup::{Action, Backups, CompletionMode, NodeOptions};
use block::{WriteErrors, read_disk, write_disk};
use hostio::Cache;
use serde_json::{Value, json};
use snapshot::{AllowedFolders, DiskConfig, FreezeDefaults, ImageFormat, JobStatus, JobVerb, Manager};
use tempfile::TempDir;

pub(crate) const SIZE: u64 = 8 << 20;

/// What serves the disks.
pub(crate) struct Daemon {
    pub(crate) manager: Arc<Manager>,
    pub(crate) backups: Backups,
}

/// Two disks, and what is done with them.
pub(crate) struct Bench {
    pub(crate) folder: TempDir,
    pub(crate) disks: Vec<DiskConfig>,
}

impl Bench {
    /// Of which the second disk is read-only, and holds something.
    pub(crate) fn with_read_only() -> Self {
        let mut bench = Self::new();
        let disk = &mut bench.disks[1];
        std::fs::write(&disk.path, vec![7; SIZE as usize]).unwrap();
        disk.read_only = true;
        bench
    }

    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk = |id: &str| {
            let path = folder.path().join(format!("{id}.raw"));
            File::create(&path).unwrap().set_len(SIZE).unwrap();
            DiskConfig {
                id: id.to_owned(),
                path,
                format: ImageFormat::Raw,
                read_only: false,
                cache: Cache::Writeback,
                metadata_cache: snapshot::DEFAULT_METADATA_CACHE,
                write_errors: WriteErrors::Report,
                max_overlays: None,
            }
        };
        let disks = vec![disk("vda"), disk("vdb")];
        Self { folder, disks }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn open(&self) -> Daemon {
        let folders = AllowedFolders::default();
        let defaults = FreezeDefaults::default();
        let manager = Manager::open(&self.path("state"), &self.disks, folders, defaults, None).unwrap();
        let manager = Arc::new(manager);
        Daemon { backups: Backups::new(Arc::clone(&manager), BTreeMap::new()), manager }
    }

    /// A new file for a backup, as large as a disk, and a node on it.
    pub(crate) fn target(&self, daemon: &Daemon, name: &str) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        add(
            daemon,
            json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": path}}),
        )
        .unwrap();
        path
    }
}

pub(crate) fn add(daemon: &Daemon, options: Value) -> block::Result<()> {
    daemon.backups.add_node(serde_json::from_value::<NodeOptions>(options).unwrap())
}

pub(crate) fn transaction(daemon: &Daemon, actions: Value) -> block::Result<()> {
    of_mode(daemon, actions, CompletionMode::Individual)
}

/// A transaction whose jobs end together.
pub(crate) fn grouped(daemon: &Daemon, actions: Value) -> block::Result<()> {
    of_mode(daemon, actions, CompletionMode::Grouped)
}

fn of_mode(daemon: &Daemon, actions: Value, mode: CompletionMode) -> block::Result<()> {
    daemon.backups.transaction(serde_json::from_value::<Vec<Action>>(actions).unwrap(), mode, None)
}

pub(crate) fn full(device: &str, target: &str) -> Value {
    json!({"type": "blockdev-backup", "data": {"device": device, "target": target, "sync": "full", "job-id": target,
        "auto-dismiss": false}})
}

pub(crate) fn incremental(device: &str, target: &str, bitmap: &str) -> Value {
    json!({"type": "blockdev-backup", "data": {"device": device, "target": target, "sync": "incremental",
        "bitmap": bitmap, "job-id": target, "auto-dismiss": false}})
}

pub(crate) fn bitmap(what: &str, node: &str, name: &str) -> Value {
    json!({"type": format!("block-dirty-bitmap-{what}"), "data": {"node": node, "name": name}})
}

pub(crate) fn write(daemon: &Daemon, disk: &str, at: u64, byte: u8) {
    let chain = daemon.manager.chain(disk).unwrap();
    // As a guest's requests do, it goes through the gate.
    let lane = chain.gate().lane(Waker::noop().clone());
    while !lane.enter() {
        std::thread::yield_now();
    }
    write_disk(&**chain, at, &[byte; 512]).unwrap();
    lane.leave(1);
}

pub(crate) fn content(daemon: &Daemon, disk: &str) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    read_disk(&**daemon.manager.chain(disk).unwrap(), 0, &mut bytes).unwrap();
    bytes
}

/// Waits for a job; the error that it ended with.
pub(crate) fn finish(daemon: &Daemon, id: &str) -> Option<String> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let job = daemon.manager.jobs().into_iter().find(|job| job.id == id).unwrap();
        if job.status == JobStatus::Concluded {
            daemon.manager.ask_job(id, JobVerb::Dismiss).unwrap();
            return job.error;
        }
        assert!(Instant::now() < deadline, "{job:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn dirty(daemon: &Daemon, disk: &str, name: &str) -> u64 {
    daemon.manager.bitmaps(disk).unwrap().into_iter().find(|bitmap| bitmap.name == name).unwrap().count
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
}
