//! Backups of what the guest overwrites while they run: `sync: none`.

use std::path::Path;
use std::time::{Duration, Instant};

use backup::{Backups, ExportOptions};
use serde_json::{Value, json};
use snapshot::{JobStatus, JobVerb};

use crate::bench::*;

/// A backup with `sync: none` to the node of that name.
fn fleece(device: &str, target: &str) -> Value {
    let mut action = full(device, target);
    action["data"]["sync"] = json!("none");
    action
}

fn status(daemon: &Daemon, id: &str) -> JobStatus {
    daemon.manager.jobs().into_iter().find(|job| job.id == id).unwrap().status
}

fn await_running(daemon: &Daemon, id: &str) {
    let until = Instant::now() + Duration::from_secs(30);
    while status(daemon, id) != JobStatus::Running {
        assert!(Instant::now() < until);
        std::thread::yield_now();
    }
}

/// The node that an export of the target shows, as its clients do.
fn add_fleece(bench: &Bench, daemon: &Daemon, name: &str) -> std::path::PathBuf {
    let path = bench.path(name);
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), &SIZE.to_string()]);
    let file = json!({"driver": "file", "filename": path});
    add(daemon, json!({"driver": "qcow2", "node-name": name, "file": file, "backing": "vda"})).unwrap();
    path
}

fn offer(backups: &Backups, socket: &Path) {
    let addr = json!({"type": "unix", "data": {"path": socket}});
    backups.start_server(serde_json::from_value(json!({"addr": addr})).unwrap()).unwrap();
    let export = json!({"id": "e", "node-name": "t"});
    backups.add_export(serde_json::from_value::<ExportOptions>(export).unwrap()).unwrap();
}

/// What clients read.
fn read(bench: &Bench, socket: &Path) -> Vec<u8> {
    let copy = bench.path("copy");
    let uri = format!("nbd+unix:///t?socket={}", text(socket));
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &uri, text(&copy)]);
    std::fs::read(copy).unwrap()
}

#[test]
fn what_is_overwritten_goes_to_the_target_when_the_job_is_called_off() {
    let bench = Bench::new();
    let daemon = bench.open();
    (0..16).for_each(|at| write(&daemon, "vda", at << 18, 1));
    let (path, socket) = (add_fleece(&bench, &daemon, "t"), bench.path("nbd"));
    let before = content(&daemon, "vda");
    transaction(&daemon, json!([bitmap("add", "vda", "b"), fleece("vda", "t")])).unwrap();
    await_running(&daemon, "t");
    (3..6).for_each(|at| write(&daemon, "vda", at << 18, 2));
    write(&daemon, "vda", (7 << 18) + (1 << 16), 2);
    offer(&daemon.backups, &socket);
    assert!(read(&bench, &socket) == before);
    write(&daemon, "vda", 9 << 18, 3);
    assert!(read(&bench, &socket) == before);
    // It goes on until somebody calls it off, paused as well.
    daemon.manager.ask_job("t", JobVerb::Complete).unwrap_err();
    daemon.manager.ask_job("t", JobVerb::Pause).unwrap();
    daemon.manager.ask_job("t", JobVerb::Cancel).unwrap();
    assert_eq!(finish(&daemon, "t").as_deref(), Some("Operation canceled"));
    assert!(read(&bench, &socket) == before, "as long as it is exported");
    daemon.backups.stop_server().unwrap();
    daemon.backups.remove_node("t").unwrap();
    assert_eq!(
        dirty(&daemon, "vda", "b"),
        5 << 16,
        "the bitmap is of the same instant, and none of the job's"
    );

    // Over the disk as it is now, the image shows what was; it has nothing else.
    let raw = bench.path("now");
    std::fs::write(&raw, content(&daemon, "vda")).unwrap();
    qemu_img(&["check", "-q", text(&path)]);
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", text(&raw), text(&path)]);
    let shown = bench.path("shown");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&shown)]);
    assert!(std::fs::read(shown).unwrap() == before);
    let output =
        std::process::Command::new("qemu-img").args(["map", "--output=json", text(&path)]).output().unwrap();
    let map: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let own = map.iter().filter(|part| part["depth"] == 0).map(|part| part["length"].as_u64().unwrap());
    assert_eq!(own.sum::<u64>(), 5 << 16);
}

/// Its clients got errors once the job had ended.
#[test]
fn an_export_from_before_the_job_shows_what_the_job_shows_for_good() {
    let bench = Bench::new();
    let daemon = bench.open();
    let socket = bench.path("nbd");
    add_fleece(&bench, &daemon, "t");
    offer(&daemon.backups, &socket);
    write(&daemon, "vda", 0, 1);
    let before = content(&daemon, "vda");
    transaction(&daemon, json!([fleece("vda", "t")])).unwrap();
    await_running(&daemon, "t");
    write(&daemon, "vda", 0, 2);
    write(&daemon, "vda", 1 << 20, 2);
    assert!(read(&bench, &socket) == before);
    daemon.manager.ask_job("t", JobVerb::Cancel).unwrap();
    assert_eq!(finish(&daemon, "t").as_deref(), Some("Operation canceled"));
    write(&daemon, "vda", 2 << 20, 3);
    assert!(read(&bench, &socket) == before);
    daemon.backups.stop_server().unwrap();
}

#[test]
fn who_insists_does_not_wait_for_what_is_copied() {
    let bench = Bench::new();
    let daemon = bench.open();
    let path = bench.target(&daemon, "t");
    let mut action = fleece("vda", "t");
    action["data"]["speed"] = json!(4096);
    transaction(&daemon, json!([action])).unwrap();
    (0..128).for_each(|at| write(&daemon, "vda", at << 16, 2));
    daemon.manager.ask_job("t", JobVerb::Cancel).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(status(&daemon, "t"), JobStatus::Running, "there is much to copy, slowly");
    daemon.manager.ask_job("t", JobVerb::Cancel).unwrap();
    assert_eq!(finish(&daemon, "t").as_deref(), Some("Operation canceled"));
    assert!(std::fs::read(path).unwrap().iter().all(|byte| *byte == 0));
    // The end of the daemon ends it too.
    transaction(&daemon, json!([action])).unwrap();
    daemon.manager.shut_down().unwrap();
}

/// A read-only disk never changes; and before a job, an image over a disk shows the disk at the instant of its export.
#[test]
fn a_read_only_disk_is_fleeced_too_and_what_makes_no_sense_is_refused() {
    let bench = Bench::with_read_only();
    let daemon = bench.open();
    bench.target(&daemon, "r");
    transaction(&daemon, json!([fleece("vdb", "r")])).unwrap();
    daemon.manager.ask_job("r", JobVerb::Cancel).unwrap();
    assert_eq!(finish(&daemon, "r").as_deref(), Some("Operation canceled"));

    add_fleece(&bench, &daemon, "t");
    write(&daemon, "vda", 0, 1);
    let (socket, before) = (bench.path("nbd"), content(&daemon, "vda"));
    offer(&daemon.backups, &socket);
    write(&daemon, "vda", 0, 2);
    assert!(read(&bench, &socket) == before);
    daemon.backups.stop_server().unwrap();

    let filter = json!({"driver": "copy-before-write", "node-name": "cbw", "file": "vda", "target": "r"});
    add(&daemon, filter).unwrap();
    add(&daemon, json!({"driver": "snapshot-access", "node-name": "access", "file": "cbw"})).unwrap();
    let with = |more: Value| {
        let mut action = fleece("vda", "t");
        action["data"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        transaction(&daemon, json!([action])).unwrap_err().to_string()
    };
    for (more, story) in [
        (json!({"bitmap": "b"}), "Bitmap sync mode must be given when providing a bitmap"),
        (
            json!({"bitmap": "b", "bitmap-mode": "always"}),
            "sync mode 'none' does not produce meaningful bitmap outputs",
        ),
        (json!({"bitmap-mode": "always"}), "Cannot specify bitmap sync mode without a bitmap"),
        (
            json!({"device": "access"}),
            "what a snapshot-access node shows does not change: sync 'none' would copy nothing",
        ),
    ] {
        assert_eq!(with(more), story);
    }
}
