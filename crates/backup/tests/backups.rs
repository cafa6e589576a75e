//! Backups as a program asks for them, over real files.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step of a test ends it")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use backup::{Action, Backups, NodeOptions};
use block::{ErrorKind, WriteErrors, read_disk, write_disk};
use hostio::Cache;
use serde_json::{Value, json};
use snapshot::{AllowedFolders, DiskConfig, FreezeDefaults, ImageFormat, JobStatus, JobVerb, Manager};
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;

/// Two disks, and what is done with them.
struct Bench {
    folder: TempDir,
    disks: Vec<DiskConfig>,
}

impl Bench {
    fn new() -> Self {
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

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self) -> Backups {
        let folders = AllowedFolders::default();
        let defaults = FreezeDefaults::default();
        let manager = Manager::open(&self.path("state"), &self.disks, folders, defaults, None).unwrap();
        Backups::new(Arc::new(manager))
    }

    /// A new file for a backup, as large as a disk, and a node on it.
    fn target(&self, backups: &Backups, name: &str) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        add(
            backups,
            json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": path}}),
        )
        .unwrap();
        path
    }
}

fn add(backups: &Backups, options: Value) -> block::Result<()> {
    backups.add_node(serde_json::from_value::<NodeOptions>(options).unwrap())
}

fn transaction(backups: &Backups, actions: Value) -> block::Result<()> {
    backups.transaction(serde_json::from_value::<Vec<Action>>(actions).unwrap(), None)
}

fn full(device: &str, target: &str) -> Value {
    json!({"type": "blockdev-backup", "data": {"device": device, "target": target, "sync": "full", "job-id": target,
        "auto-dismiss": false}})
}

fn incremental(device: &str, target: &str, bitmap: &str) -> Value {
    json!({"type": "blockdev-backup", "data": {"device": device, "target": target, "sync": "incremental",
        "bitmap": bitmap, "job-id": target, "auto-dismiss": false}})
}

fn bitmap(what: &str, node: &str, name: &str) -> Value {
    json!({"type": format!("block-dirty-bitmap-{what}"), "data": {"node": node, "name": name}})
}

fn write(backups: &Backups, disk: &str, at: u64, byte: u8) {
    let chain = backups.manager().chain(disk).unwrap();
    // As a guest's requests do, it goes through the gate.
    let lane = chain.gate().lane(Waker::noop().clone());
    while !lane.enter() {
        std::thread::yield_now();
    }
    write_disk(&**chain, at, &[byte; 512]).unwrap();
    lane.leave(1);
}

fn content(backups: &Backups, disk: &str) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    read_disk(&**backups.manager().chain(disk).unwrap(), 0, &mut bytes).unwrap();
    bytes
}

/// Waits for a job; the error that it ended with.
fn finish(backups: &Backups, id: &str) -> Option<String> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let job = backups.manager().jobs().into_iter().find(|job| job.id == id).unwrap();
        if job.status == JobStatus::Concluded {
            backups.manager().ask_job(id, JobVerb::Dismiss).unwrap();
            return job.error;
        }
        assert!(Instant::now() < deadline, "{job:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn dirty(backups: &Backups, disk: &str, name: &str) -> u64 {
    backups.bitmaps(disk).unwrap().into_iter().find(|bitmap| bitmap.name == name).unwrap().count
}

#[test]
fn a_full_backup_of_two_disks_and_an_incremental_are_the_disks_at_their_cuts() {
    let bench = Bench::new();
    let backups = bench.open();
    let fulls = [bench.target(&backups, "full-a"), bench.target(&backups, "full-b")];
    write(&backups, "vda", 4096, 1);
    write(&backups, "vdb", 8192, 2);
    let at_full = [content(&backups, "vda"), content(&backups, "vdb")];
    let actions = json!([
        bitmap("add", "vda", "b"),
        bitmap("add", "vdb", "b"),
        full("vda", "full-a"),
        full("vdb", "full-b"),
    ]);
    transaction(&backups, actions).unwrap();
    write(&backups, "vda", 4096, 3);
    write(&backups, "vda", 1 << 20, 4);
    for id in ["full-a", "full-b"] {
        assert_eq!(finish(&backups, id), None);
    }
    for (path, bytes) in fulls.iter().zip(&at_full) {
        assert!(std::fs::read(path).unwrap() == *bytes);
    }
    assert_eq!((dirty(&backups, "vda", "b"), dirty(&backups, "vdb", "b")), (2 << 16, 0));

    // What has changed goes on top of a copy of the full one.
    let path = bench.path("next");
    std::fs::copy(&fulls[0], &path).unwrap();
    add(
        &backups,
        json!({"driver": "raw", "node-name": "next", "file": {"driver": "file", "filename": path}}),
    )
    .unwrap();
    let at_next = content(&backups, "vda");
    transaction(&backups, json!([incremental("vda", "next", "b")])).unwrap();
    write(&backups, "vda", 2 << 20, 5);
    assert_eq!(finish(&backups, "next"), None);
    assert!(std::fs::read(&path).unwrap() == at_next);
    assert_eq!(dirty(&backups, "vda", "b"), 1 << 16);
    for node in ["next", "full-a", "full-b"] {
        backups.remove_node(node).unwrap();
    }
    assert!(backups.nodes().is_empty());
}

#[test]
fn a_transaction_of_which_one_action_fails_does_nothing() {
    let bench = Bench::new();
    let backups = bench.open();
    bench.target(&backups, "t");
    let layers = backups.manager().disks()[0].layers.len();
    for bad in [
        json!({"type": "abort", "data": {}}),
        full("vdx", "t"),
        full("vda", "no-such-node"),
        full("vda", "t"),
        bitmap("clear", "vda", "missing"),
        incremental("vda", "t", "missing"),
    ] {
        let twice = bad == full("vda", "t");
        let actions = json!([bitmap("add", "vda", "b"), full("vda", "t"), bad]);
        let error = transaction(&backups, actions).unwrap_err();
        assert!(!twice || error.kind() == ErrorKind::Busy, "{error}");
        assert!(backups.manager().jobs().is_empty());
        assert!(backups.bitmaps("vda").unwrap().is_empty());
        assert_eq!(backups.manager().disks()[0].layers.len(), layers);
    }
    transaction(&backups, json!([full("vda", "t")])).unwrap();
    assert_eq!(finish(&backups, "t"), None);
}

/// The way of programs that know QEMU's filters: the backup is of the instant of the transaction, its bitmap too.
#[test]
fn a_backup_through_a_filter_is_of_the_instant_of_its_transaction() {
    let bench = Bench::new();
    let backups = bench.open();
    let out = bench.target(&backups, "out");
    bench.target(&backups, "fleece");
    add(
        &backups,
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "vda", "target": "fleece"}),
    )
    .unwrap();
    add(&backups, json!({"driver": "snapshot-access", "node-name": "access", "file": "cbw"})).unwrap();
    backups.set_drive("/machine/peripheral/vda/virtio-backend", "cbw").unwrap();
    write(&backups, "vda", 0, 1);
    let at_cut = content(&backups, "vda");
    transaction(&backups, json!([bitmap("add", "vda", "b"), full("access", "out")])).unwrap();
    write(&backups, "vda", 0, 2);
    write(&backups, "vda", 1 << 20, 3);
    assert_eq!(finish(&backups, "out"), None);
    assert!(std::fs::read(&out).unwrap() == at_cut);
    assert_eq!(backups.remove_node("cbw").unwrap_err().kind(), ErrorKind::Busy);
    backups.set_drive("vda", "vda").unwrap();
    for node in ["access", "cbw", "fleece"] {
        backups.remove_node(node).unwrap();
    }

    // The next one: the bitmap is merged into one of the filter's node, and cleaned, in one transaction.
    bench.target(&backups, "fleece2");
    add(
        &backups,
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "vda", "target": "fleece2"}),
    )
    .unwrap();
    add(&backups, json!({"driver": "snapshot-access", "node-name": "access", "file": "cbw"})).unwrap();
    backups.set_drive("vda", "cbw").unwrap();
    write(&backups, "vda", 4 << 20, 4);
    let at_cut = content(&backups, "vda");
    let merge = json!({"type": "block-dirty-bitmap-merge", "data": {"node": "access", "target": "tmp",
        "bitmaps": [{"node": "vda", "name": "b"}]}});
    let actions = json!([
        bitmap("add", "access", "tmp"),
        merge,
        incremental("access", "out", "tmp"),
        bitmap("clear", "vda", "b"),
    ]);
    transaction(&backups, actions).unwrap();
    write(&backups, "vda", 5 << 20, 5);
    assert_eq!(finish(&backups, "out"), None);
    assert!(std::fs::read(&out).unwrap() == at_cut);
    assert_eq!(dirty(&backups, "vda", "b"), 1 << 16);
}

#[test]
fn a_backup_that_is_called_off_or_dies_leaves_its_bitmap_as_it_was() {
    let bench = Bench::new();
    let backups = bench.open();
    bench.target(&backups, "t");
    let add_persistent =
        json!([{"type": "block-dirty-bitmap-add", "data": {"node": "vda", "name": "b", "persistent": true}}]);
    transaction(&backups, add_persistent).unwrap();
    for at in 0..64 {
        write(&backups, "vda", at << 16, 1);
    }
    let mut slow = incremental("vda", "t", "b");
    slow["data"]["speed"] = json!(65536);
    transaction(&backups, json!([slow])).unwrap();
    let busy = transaction(&backups, json!([bitmap("clear", "vda", "b")])).unwrap_err();
    assert_eq!(busy.to_string(), "Bitmap 'b' is currently in use by another operation and cannot be used");
    backups.manager().ask_job("t", JobVerb::Cancel).unwrap();
    assert_eq!(finish(&backups, "t").as_deref(), Some("it was cancelled"));
    assert_eq!(dirty(&backups, "vda", "b"), 4 << 20);
    transaction(&backups, json!([slow])).unwrap();
    backups.manager().shut_down().unwrap();
    drop(backups);
    let backups = bench.open();
    assert_eq!(dirty(&backups, "vda", "b"), 4 << 20);
    bench.target(&backups, "u");
    transaction(&backups, json!([incremental("vda", "u", "b")])).unwrap();
    assert_eq!(finish(&backups, "u"), None);
    assert_eq!(dirty(&backups, "vda", "b"), 0);
}

/// An incremental goes to an overlay over the last backup: whole clusters are written, zeroes as such.
#[test]
fn an_incremental_to_a_qcow2_overlay_is_judged_by_qemu() {
    let bench = Bench::new();
    let backups = bench.open();
    write(&backups, "vda", 0, 1);
    write(&backups, "vda", 1 << 20, 1);
    let base = bench.target(&backups, "base");
    transaction(&backups, json!([bitmap("add", "vda", "b"), full("vda", "base")])).unwrap();
    assert_eq!(finish(&backups, "base"), None);
    backups.remove_node("base").unwrap();
    let overlay = bench.path("overlay.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&base), text(&overlay)]);
    let qcow2 = json!({"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": overlay}});
    add(&backups, qcow2).unwrap();
    write(&backups, "vda", 512, 2);
    write(&backups, "vda", 1 << 20, 0);
    transaction(&backups, json!([incremental("vda", "o", "b")])).unwrap();
    assert_eq!(finish(&backups, "o"), None);
    backups.remove_node("o").unwrap();
    qemu_img(&["check", "-q", text(&overlay)]);
    let expected = bench.path("expected");
    std::fs::write(&expected, content(&backups, "vda")).unwrap();
    qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", text(&overlay), text(&expected)]);
}

#[test]
fn what_makes_no_sense_is_refused_in_qemus_words() {
    let bench = Bench::new();
    let backups = bench.open();
    bench.target(&backups, "t");
    let backup = |more: Value| {
        let mut action = full("vda", "t");
        action["data"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        transaction(&backups, json!([action])).unwrap_err().to_string()
    };
    for (more, story) in [
        (json!({"sync": "incremental"}), "must provide a valid bitmap name for 'incremental' sync mode"),
        (json!({"bitmap-mode": "never"}), "Cannot specify bitmap sync mode without a bitmap"),
        (json!({"bitmap": "b"}), "Bitmap sync mode must be given when providing a bitmap"),
        (json!({"target": "x"}), "Cannot find device='x' nor node-name='x'"),
        (json!({"device": "x"}), "Cannot find device='x' nor node-name='x'"),
    ] {
        assert_eq!(backup(more), story);
    }
    for (options, story) in [
        (json!({"driver": "file", "filename": "/none"}), "'node-name' must be specified for the root node"),
        (json!({"driver": "raw", "node-name": "t", "file": "t"}), "Duplicate nodes with node-name='t'"),
        (json!({"driver": "raw", "node-name": "vda", "file": "t"}), "Duplicate nodes with node-name='vda'"),
        (json!({"driver": "raw", "node-name": "1", "file": "t"}), "Invalid node-name: '1'"),
    ] {
        assert_eq!(add(&backups, options).unwrap_err().to_string(), story);
    }
    let again =
        json!({"driver": "raw", "node-name": "u", "file": {"driver": "file", "filename": bench.path("t")}});
    assert_eq!(add(&backups, again).unwrap_err().kind(), ErrorKind::Busy, "a file has one writer");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
}
