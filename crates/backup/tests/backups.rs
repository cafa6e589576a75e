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
use snapshot::{
    AllowedFolders, DiskConfig, FreezeDefaults, Halt, HostedJob, ImageFormat, Job, JobStatus, JobType,
    JobVerb, Labor, Manager,
};
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;

/// What serves the disks.
struct Daemon {
    manager: Arc<Manager>,
    backups: Backups,
}

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

    fn open(&self) -> Daemon {
        let folders = AllowedFolders::default();
        let defaults = FreezeDefaults::default();
        let manager = Manager::open(&self.path("state"), &self.disks, folders, defaults, None).unwrap();
        let manager = Arc::new(manager);
        Daemon { backups: Backups::new(Arc::clone(&manager)), manager }
    }

    /// A new file for a backup, as large as a disk, and a node on it.
    fn target(&self, daemon: &Daemon, name: &str) -> PathBuf {
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

fn add(daemon: &Daemon, options: Value) -> block::Result<()> {
    daemon.backups.add_node(serde_json::from_value::<NodeOptions>(options).unwrap())
}

fn transaction(daemon: &Daemon, actions: Value) -> block::Result<()> {
    daemon.backups.transaction(serde_json::from_value::<Vec<Action>>(actions).unwrap(), None)
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

fn write(daemon: &Daemon, disk: &str, at: u64, byte: u8) {
    let chain = daemon.manager.chain(disk).unwrap();
    // As a guest's requests do, it goes through the gate.
    let lane = chain.gate().lane(Waker::noop().clone());
    while !lane.enter() {
        std::thread::yield_now();
    }
    write_disk(&**chain, at, &[byte; 512]).unwrap();
    lane.leave(1);
}

fn content(daemon: &Daemon, disk: &str) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    read_disk(&**daemon.manager.chain(disk).unwrap(), 0, &mut bytes).unwrap();
    bytes
}

/// Waits for a job; the error that it ended with.
fn finish(daemon: &Daemon, id: &str) -> Option<String> {
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

fn dirty(daemon: &Daemon, disk: &str, name: &str) -> u64 {
    daemon.manager.bitmaps(disk).unwrap().into_iter().find(|bitmap| bitmap.name == name).unwrap().count
}

#[test]
fn a_full_backup_of_two_disks_and_an_incremental_are_the_disks_at_their_cuts() {
    let bench = Bench::new();
    let daemon = bench.open();
    let fulls = [bench.target(&daemon, "full-a"), bench.target(&daemon, "full-b")];
    write(&daemon, "vda", 4096, 1);
    write(&daemon, "vdb", 8192, 2);
    let at_full = [content(&daemon, "vda"), content(&daemon, "vdb")];
    let actions = json!([
        bitmap("add", "vda", "b"),
        bitmap("add", "vdb", "b"),
        full("vda", "full-a"),
        full("vdb", "full-b"),
    ]);
    transaction(&daemon, actions).unwrap();
    write(&daemon, "vda", 4096, 3);
    write(&daemon, "vda", 1 << 20, 4);
    for id in ["full-a", "full-b"] {
        assert_eq!(finish(&daemon, id), None);
    }
    for (path, bytes) in fulls.iter().zip(&at_full) {
        assert!(std::fs::read(path).unwrap() == *bytes);
    }
    assert_eq!((dirty(&daemon, "vda", "b"), dirty(&daemon, "vdb", "b")), (2 << 16, 0));

    // What has changed goes on top of a copy of the full one.
    let path = bench.path("next");
    std::fs::copy(&fulls[0], &path).unwrap();
    add(&daemon, json!({"driver": "raw", "node-name": "next", "file": {"driver": "file", "filename": path}}))
        .unwrap();
    let at_next = content(&daemon, "vda");
    transaction(&daemon, json!([incremental("vda", "next", "b")])).unwrap();
    write(&daemon, "vda", 2 << 20, 5);
    assert_eq!(finish(&daemon, "next"), None);
    assert!(std::fs::read(&path).unwrap() == at_next);
    assert_eq!(dirty(&daemon, "vda", "b"), 1 << 16);
    for node in ["next", "full-a", "full-b"] {
        daemon.backups.remove_node(node).unwrap();
    }
    assert!(daemon.backups.nodes().is_empty());
}

#[test]
fn a_transaction_of_which_one_action_fails_does_nothing() {
    let bench = Bench::new();
    let daemon = bench.open();
    bench.target(&daemon, "t");
    let layers = daemon.manager.disks()[0].layers.len();
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
        let error = transaction(&daemon, actions).unwrap_err();
        assert!(!twice || error.kind() == ErrorKind::Busy, "{error}");
        assert!(daemon.manager.jobs().is_empty());
        assert!(daemon.manager.bitmaps("vda").unwrap().is_empty());
        assert_eq!(daemon.manager.disks()[0].layers.len(), layers);
    }
    transaction(&daemon, json!([full("vda", "t")])).unwrap();
    assert_eq!(finish(&daemon, "t"), None);
}

/// The way of programs that know QEMU's filters: the backup is of the instant of the transaction, its bitmap too.
#[test]
fn a_backup_through_a_filter_is_of_the_instant_of_its_transaction() {
    let bench = Bench::new();
    let daemon = bench.open();
    let out = bench.target(&daemon, "out");
    bench.target(&daemon, "fleece");
    add(
        &daemon,
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "vda", "target": "fleece"}),
    )
    .unwrap();
    add(&daemon, json!({"driver": "snapshot-access", "node-name": "access", "file": "cbw"})).unwrap();
    daemon.backups.set_drive("/machine/peripheral/vda/virtio-backend", "cbw").unwrap();
    write(&daemon, "vda", 0, 1);
    let at_cut = content(&daemon, "vda");
    transaction(&daemon, json!([bitmap("add", "vda", "b"), full("access", "out")])).unwrap();
    write(&daemon, "vda", 0, 2);
    write(&daemon, "vda", 1 << 20, 3);
    assert_eq!(finish(&daemon, "out"), None);
    assert!(std::fs::read(&out).unwrap() == at_cut);
    assert_eq!(daemon.backups.remove_node("cbw").unwrap_err().kind(), ErrorKind::Busy);
    daemon.backups.set_drive("vda", "vda").unwrap();
    for node in ["access", "cbw", "fleece"] {
        daemon.backups.remove_node(node).unwrap();
    }

    // The next one: the bitmap is merged into one of the filter's node, and cleaned, in one transaction.
    bench.target(&daemon, "fleece2");
    add(
        &daemon,
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "vda", "target": "fleece2"}),
    )
    .unwrap();
    add(&daemon, json!({"driver": "snapshot-access", "node-name": "access", "file": "cbw"})).unwrap();
    daemon.backups.set_drive("vda", "cbw").unwrap();
    write(&daemon, "vda", 4 << 20, 4);
    let at_cut = content(&daemon, "vda");
    let merge = json!({"type": "block-dirty-bitmap-merge", "data": {"node": "access", "target": "tmp",
        "bitmaps": [{"node": "vda", "name": "b"}]}});
    let actions = json!([
        bitmap("add", "access", "tmp"),
        merge,
        incremental("access", "out", "tmp"),
        bitmap("clear", "vda", "b"),
    ]);
    transaction(&daemon, actions).unwrap();
    write(&daemon, "vda", 5 << 20, 5);
    assert_eq!(finish(&daemon, "out"), None);
    assert!(std::fs::read(&out).unwrap() == at_cut);
    assert_eq!(dirty(&daemon, "vda", "b"), 1 << 16);
}

#[test]
fn a_backup_that_is_called_off_or_dies_leaves_its_bitmap_as_it_was() {
    let bench = Bench::new();
    let daemon = bench.open();
    bench.target(&daemon, "t");
    let add_persistent =
        json!([{"type": "block-dirty-bitmap-add", "data": {"node": "vda", "name": "b", "persistent": true}}]);
    transaction(&daemon, add_persistent).unwrap();
    for at in 0..64 {
        write(&daemon, "vda", at << 16, 1);
    }
    let mut slow = incremental("vda", "t", "b");
    slow["data"]["speed"] = json!(65536);
    transaction(&daemon, json!([slow])).unwrap();
    let busy = transaction(&daemon, json!([bitmap("clear", "vda", "b")])).unwrap_err();
    assert_eq!(busy.to_string(), "Bitmap 'b' is currently in use by another operation and cannot be used");
    daemon.manager.ask_job("t", JobVerb::Cancel).unwrap();
    assert_eq!(finish(&daemon, "t").as_deref(), Some("it was cancelled"));
    assert_eq!(dirty(&daemon, "vda", "b"), 4 << 20);
    transaction(&daemon, json!([slow])).unwrap();
    daemon.manager.shut_down().unwrap();
    drop(daemon);
    let daemon = bench.open();
    assert_eq!(dirty(&daemon, "vda", "b"), 4 << 20);
    bench.target(&daemon, "u");
    transaction(&daemon, json!([incremental("vda", "u", "b")])).unwrap();
    assert_eq!(finish(&daemon, "u"), None);
    assert_eq!(dirty(&daemon, "vda", "b"), 0);
}

/// An incremental goes to an overlay over the last backup: whole clusters are written, zeroes as such.
#[test]
fn an_incremental_to_a_qcow2_overlay_is_judged_by_qemu() {
    let bench = Bench::new();
    let daemon = bench.open();
    write(&daemon, "vda", 0, 1);
    write(&daemon, "vda", 1 << 20, 1);
    let base = bench.target(&daemon, "base");
    transaction(&daemon, json!([bitmap("add", "vda", "b"), full("vda", "base")])).unwrap();
    assert_eq!(finish(&daemon, "base"), None);
    daemon.backups.remove_node("base").unwrap();
    let overlay = bench.path("overlay.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&base), text(&overlay)]);
    let qcow2 = json!({"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": overlay}});
    add(&daemon, qcow2).unwrap();
    write(&daemon, "vda", 512, 2);
    write(&daemon, "vda", 1 << 20, 0);
    transaction(&daemon, json!([incremental("vda", "o", "b")])).unwrap();
    assert_eq!(finish(&daemon, "o"), None);
    daemon.backups.remove_node("o").unwrap();
    qemu_img(&["check", "-q", text(&overlay)]);
    let expected = bench.path("expected");
    std::fs::write(&expected, content(&daemon, "vda")).unwrap();
    qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", text(&overlay), text(&expected)]);
}

#[test]
fn what_makes_no_sense_is_refused_in_qemus_words() {
    let bench = Bench::new();
    let daemon = bench.open();
    bench.target(&daemon, "t");
    let backup = |more: Value| {
        let mut action = full("vda", "t");
        action["data"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        transaction(&daemon, json!([action])).unwrap_err().to_string()
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
        assert_eq!(add(&daemon, options).unwrap_err().to_string(), story);
    }
    let again =
        json!({"driver": "raw", "node-name": "u", "file": {"driver": "file", "filename": bench.path("t")}});
    assert_eq!(add(&daemon, again).unwrap_err().kind(), ErrorKind::Busy, "a file has one writer");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
}

#[test]
fn nothing_but_a_targets_own_job_writes_to_it() {
    let bench = Bench::new();
    let daemon = bench.open();
    let file = |name: &str, path: &Path| json!({"driver": "file", "node-name": name, "filename": path});
    let error = add(&daemon, file("f", &bench.path("vda.raw"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "a disk's own file: {error}");
    transaction(&daemon, json!([bitmap("add", "vda", "b")])).unwrap();
    let overlay = daemon.manager.disks()[0].layers.last().unwrap().path.clone();
    assert_eq!(add(&daemon, file("f", &overlay)).unwrap_err().kind(), ErrorKind::Busy);

    let path = bench.path("shared");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    add(&daemon, file("f", &path)).unwrap();
    add(&daemon, json!({"driver": "raw", "node-name": "one", "file": "f"})).unwrap();
    let two = json!({"driver": "raw", "node-name": "two", "file": "f"});
    assert_eq!(add(&daemon, two.clone()).unwrap_err().kind(), ErrorKind::Busy);
    daemon.backups.remove_node("one").unwrap();
    add(&daemon, two).unwrap();

    let read_only = json!({"driver": "raw", "node-name": "r", "read-only": true,
        "file": {"driver": "file", "filename": bench.target(&daemon, "t")}});
    assert_eq!(add(&daemon, read_only.clone()).unwrap_err().kind(), ErrorKind::Busy);
    daemon.backups.remove_node("t").unwrap();
    add(&daemon, read_only).unwrap();
    let error = transaction(&daemon, json!([full("vda", "r")])).unwrap_err();
    assert_eq!((error.kind(), &*error.to_string()), (ErrorKind::ReadOnly, "Block node is read-only: 'r'"));
}

/// A program cleaned the bitmap in the transaction that began its increment, and the daemon died before the increment was
/// whole: it would have been lost for all later ones.
#[test]
fn a_bitmap_that_is_cleaned_beside_a_backup_is_clean_when_that_has_succeeded() {
    let bench = Bench::new();
    let daemon = bench.open();
    bench.target(&daemon, "t");
    let persistent =
        json!([{"type": "block-dirty-bitmap-add", "data": {"node": "vda", "name": "b", "persistent": true}}]);
    transaction(&daemon, persistent).unwrap();
    (0..16).for_each(|at| write(&daemon, "vda", at << 16, 1));
    let mut slow = full("vda", "t");
    slow["data"]["speed"] = json!(65536);
    slow["data"]["auto-finalize"] = json!(false);
    transaction(&daemon, json!([slow, bitmap("clear", "vda", "b")])).unwrap();
    write(&daemon, "vda", 100 << 16, 2);
    assert_eq!(dirty(&daemon, "vda", "b"), 17 << 16);
    daemon.manager.shut_down().unwrap();
    drop(daemon);
    let daemon = bench.open();
    assert_eq!(dirty(&daemon, "vda", "b"), 17 << 16);
    bench.target(&daemon, "u");
    transaction(&daemon, json!([bitmap("clear", "vda", "b"), full("vda", "u")])).unwrap();
    write(&daemon, "vda", 3 << 16, 3);
    assert_eq!(finish(&daemon, "u"), None);
    assert_eq!(dirty(&daemon, "vda", "b"), 1 << 16);
}

#[test]
fn a_node_that_a_job_reads_or_writes_is_in_use() {
    let bench = Bench::new();
    let daemon = bench.open();
    bench.target(&daemon, "out");
    bench.target(&daemon, "fleece");
    let filter =
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "vda", "target": "fleece"});
    add(&daemon, filter).unwrap();
    add(&daemon, json!({"driver": "snapshot-access", "node-name": "access", "file": "cbw"})).unwrap();
    let mut waits = full("access", "out");
    waits["data"]["auto-finalize"] = json!(false);
    transaction(&daemon, json!([waits])).unwrap();
    daemon.backups.set_drive("vda", "vda").unwrap();
    for node in ["out", "access", "cbw", "fleece"] {
        assert_eq!(daemon.backups.remove_node(node).unwrap_err().kind(), ErrorKind::Busy, "{node}");
    }
    daemon.manager.ask_job("out", JobVerb::Cancel).unwrap();
    finish(&daemon, "out");
    for node in ["out", "access", "cbw", "fleece"] {
        daemon.backups.remove_node(node).unwrap();
    }
}

/// What a defect would do.
struct Defective;

impl Labor for Defective {
    fn run(self: Box<Self>, _job: &Job) -> Result<(), Halt> {
        panic!("as asked")
    }
}

#[test]
fn a_job_that_panics_fails_and_does_not_stay() {
    let bench = Bench::new();
    let daemon = bench.open();
    for _ in 0..2 {
        let asked = HostedJob {
            id: "j".to_owned(),
            kind: JobType::Backup,
            speed: 0,
            auto_finalize: true,
            auto_dismiss: false,
            client: None,
        };
        daemon.manager.enter_job(asked).unwrap().start(Box::new(Defective)).unwrap();
        assert!(finish(&daemon, "j").unwrap().contains("internal error"));
    }
    assert!(daemon.manager.jobs().is_empty());
}
