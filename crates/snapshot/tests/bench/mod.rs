//! Disks in a folder of their own, and a manager over them.

#![allow(dead_code, reason = "each test binary uses its part of it")]
#![allow(unreachable_pub, reason = "a module of several test binaries")]

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use block::{WriteErrors, read_disk, write_disk};
use hostio::Cache;
use snapshot::{
    AllowedFolders, Chain, CreateRequest, DeleteRequest, DiskConfig, Event, FreezeDefaults, FreezePolicy,
    ImageFormat, JobOptions, JobStatus, JobVerb, Manager, SnapshotRecord,
};
use tempfile::TempDir;

pub const SIZE: u64 = 8 << 20;

pub struct Bench {
    pub folder: TempDir,
    pub disks: Vec<DiskConfig>,
}

impl Bench {
    pub fn new(ids: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let raw = |id: &&str| {
            let path = folder.path().join(format!("base-{id}.raw"));
            File::create(&path).unwrap().set_len(SIZE).unwrap();
            disk(id, path, ImageFormat::Raw)
        };
        let disks = ids.iter().map(raw).collect();
        Self { folder, disks }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn open(&self) -> Manager {
        Manager::open(
            &self.path("state"),
            &self.disks,
            AllowedFolders::default(),
            FreezeDefaults::default(),
            None,
        )
        .unwrap()
    }

    pub fn export(&self, manager: &Manager, name: &str, disk: &str) -> Vec<u8> {
        let out = self.path(&format!("{name}-{disk}.out"));
        manager.export(name, disk, &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(())).unwrap();
        let bytes = std::fs::read(&out).unwrap();
        std::fs::remove_file(out).unwrap();
        bytes
    }
}

/// A disk like most.
pub fn disk(id: &str, path: PathBuf, format: ImageFormat) -> DiskConfig {
    let cache = Cache::Writeback;
    DiskConfig {
        id: id.to_owned(),
        path,
        format,
        read_only: false,
        cache,
        metadata_cache: snapshot::DEFAULT_METADATA_CACHE,
        write_errors: WriteErrors::default(),
        max_overlays: None,
    }
}

pub fn request(name: &str) -> CreateRequest {
    CreateRequest { name: name.to_owned(), disks: None, freeze: Some(FreezePolicy::Never) }
}

pub fn snapshot(manager: &Manager, name: &str) -> SnapshotRecord {
    manager.create(request(name)).unwrap()
}

pub fn chain<'a>(manager: &'a Manager, id: &str) -> &'a Arc<Chain> {
    manager.chain(id).unwrap()
}

/// Writes the byte `stamp` over the 4 KiB at `offset`.
pub fn stamp(manager: &Manager, id: &str, offset: u64, stamp: u8) {
    write_disk(&**chain(manager, id), offset, &[stamp; 4096]).unwrap();
}

pub fn byte(manager: &Manager, id: &str, offset: u64) -> u8 {
    let mut found = [0];
    read_disk(&**chain(manager, id), offset, &mut found).unwrap();
    found[0]
}

pub fn check(path: &Path) {
    let output = Command::new("qemu-img").args(["check", "-q"]).arg(path).output();
    let output = output.expect("qemu-img is needed: run `make deps`");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&said));
}

/// Deletes a snapshot, and waits for it; the job's error if it fails.
pub fn delete(manager: &Manager, name: &str) -> Result<(), String> {
    let options = JobOptions { auto_dismiss: false, ..JobOptions::default() };
    let request = DeleteRequest { name: name.to_owned(), options };
    let id = manager.delete(request).map_err(|error| error.to_string())?;
    finish(manager, &id)
}

/// All events from now on.
pub fn events(manager: &Manager) -> Receiver<Event> {
    let (sender, events) = channel();
    manager.subscribe(move |event| {
        // The test may have heard enough.
        let _ = sender.send(event.clone());
    });
    events
}

/// Waits for a job, and dismisses it if it does not do so itself, as one does that an earlier run has left; its error if it
/// has one.
pub fn finish(manager: &Manager, id: &str) -> Result<(), String> {
    let (events, deadline) = (events(manager), Instant::now() + Duration::from_secs(60));
    let mut ended = Ok(());
    while let Some(job) = manager.jobs().into_iter().find(|job| job.id == id) {
        if job.status == JobStatus::Concluded {
            let _ = manager.ask_job(id, JobVerb::Dismiss);
            ended = job.error.map_or(Ok(()), Err);
        }
        assert!(Instant::now() < deadline, "{id} does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    let told = events.try_iter().find_map(|event| match event {
        Event::JobCompleted { end, .. } if end.device == id => end.error,
        _ => None,
    });
    told.map_or(ended, Err)
}
