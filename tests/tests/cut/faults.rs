//! Backups whose target has no room, and whose source can not be read: each policy does as in QEMU, and the next increment has
//! all that this one has not.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use block::testing::Random;
use control::client::Client;
use frazil_tests::{Driver, Request};
use serde_json::{Value, json};

use crate::full::{in_memory, limit};
use crate::images::qemu_img;
use crate::served::{Served, Wanted};

pub(crate) const BYTES: u64 = 8 << 20;
pub(crate) const CHUNK: usize = 64 << 10;
/// Files may not be longer: enough for a new overlay, and not for a backup.
const LIMIT: u64 = 3 << 20;

pub(crate) fn wanted(disks: usize, format: &'static str) -> Wanted {
    Wanted { format, cache: "writeback", disks, queues: 1, bytes: BYTES }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Writes chunks of a disk with what does not compress.
pub(crate) fn write(served: &Served, disk: usize, chunks: std::ops::Range<u64>, seed: u64) {
    let mut driver = Driver::connect(&served.sockets[disk], 1, 1, CHUNK).unwrap();
    let mut random = Random(seed);
    for chunk in chunks {
        let bytes: Vec<u8> = (0..CHUNK).map(|_| random.number() as u8).collect();
        driver.queues[0].fill(0, &bytes);
        assert_eq!(driver.queues[0].ask(Request::Write(chunk * CHUNK as u64)), 0);
    }
    assert_eq!(driver.queues[0].ask(Request::Flush), 0);
}

/// A client that keeps the events that come to it.
pub(crate) struct Listener {
    client: Client,
    events: Vec<(String, Value)>,
}

impl Listener {
    pub(crate) fn new(served: &Served) -> Self {
        Self { client: served.qmp(), events: Vec::new() }
    }

    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let Self { client, events } = self;
        let mut keep = |name: &str, data: &Value| events.push((name.to_owned(), data.clone()));
        client.execute(command, arguments, |name, data| keep(name, data)).unwrap()
    }

    /// Waits until a job is in one of these states; how it is then.
    pub(crate) fn await_job(&mut self, id: &str, statuses: &[&str]) -> Value {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let jobs = self.ask("query-jobs", json!({}));
            let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == id).unwrap().clone();
            if statuses.contains(&job["status"].as_str().unwrap()) {
                return job;
            }
            assert!(Instant::now() < deadline, "{job}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Dismisses a job that is over; its error.
    pub(crate) fn finish(&mut self, id: &str) -> Option<String> {
        let job = self.await_job(id, &["concluded"]);
        self.ask("job-dismiss", json!({ "id": id }));
        job["error"].as_str().map(str::to_owned)
    }

    /// Waits until an error of a job is told.
    fn await_job_error(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.events.iter().any(|(name, _)| name == "BLOCK_JOB_ERROR") {
            assert!(Instant::now() < deadline, "no error is told");
            thread::sleep(Duration::from_millis(5));
            self.ask("query-version", json!({}));
        }
    }

    /// The errors of jobs that were told since this was last asked: before an answer could know of them, and never as the
    /// guest's.
    fn job_errors(&mut self) -> BTreeSet<String> {
        let events = std::mem::take(&mut self.events);
        assert!(events.iter().all(|(name, _)| name != "BLOCK_IO_ERROR"), "{events:?}");
        let errors = events.into_iter().filter(|(name, _)| name == "BLOCK_JOB_ERROR");
        errors.map(|(_, data)| data.to_string()).collect()
    }
}

fn told(device: &str, operation: &str, action: &str) -> BTreeSet<String> {
    BTreeSet::from([json!({ "device": device, "operation": operation, "action": action }).to_string()])
}

/// A new image, and a node on it.
pub(crate) fn target(served: &Served, name: &str, format: &str) -> PathBuf {
    let path = served.path(name);
    assert!(qemu_img(&["create", "-q", "-f", format, text(&path), &BYTES.to_string()]).status.success());
    let file = json!({ "driver": "file", "filename": path });
    served.ask("blockdev-add", json!({ "driver": format, "node-name": name, "file": file }));
    path
}

pub(crate) fn dirty(served: &Served, disk: usize) -> u64 {
    served.ask("query-block", json!({}))[disk]["inserted"]["dirty-bitmaps"][0]["count"].as_u64().unwrap()
}

fn increment(disk: &str, target: &str, more: Value) -> Value {
    let mut backup = json!({ "device": disk, "target": target, "sync": "incremental", "bitmap": "b",
        "auto-dismiss": false });
    backup.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    backup
}

/// The image is what the guest reads.
pub(crate) fn assert_same(served: &Served, image: &Path, format: &str) {
    let raw = served.path("expected");
    std::fs::write(&raw, served.read(0)).unwrap();
    if format == "qcow2" {
        let checked = qemu_img(&["check", "-f", "qcow2", text(image)]);
        assert!(checked.status.success(), "{checked:?}");
    }
    let compared = qemu_img(&["compare", "-f", format, "-F", "raw", text(image), text(&raw)]);
    assert!(compared.status.success(), "{compared:?}");
}

fn full_target(format: &'static str, policy: &str, action: &str) {
    let mut served = Served::start_in(in_memory(), wanted(1, "raw"), "");
    served.ask("block-dirty-bitmap-add", json!({ "node": "vd0", "name": "b", "persistent": true }));
    write(&served, 0, 0..BYTES / CHUNK as u64, 1);
    let path = target(&served, "t", format);
    let mut listener = Listener::new(&served);
    limit(&served, Some(LIMIT));
    let more = json!({ "on-target-error": policy, "compress": format == "qcow2" });
    listener.ask("blockdev-backup", increment("vd0", "t", more));
    let stops = action == "stop";
    listener.await_job("vd0", if stops { &["paused"] } else { &["concluded"] });
    assert_eq!(listener.job_errors(), told("vd0", "write", action));
    if stops {
        // Still no room: it stops again.
        listener.ask("job-resume", json!({ "id": "vd0" }));
        listener.await_job_error();
        listener.await_job("vd0", &["paused"]);
        assert_eq!(listener.job_errors(), told("vd0", "write", action));
        limit(&served, None);
        listener.ask("job-resume", json!({ "id": "vd0" }));
        assert_eq!(listener.finish("vd0"), None);
        assert_eq!(listener.job_errors(), BTreeSet::new());
    } else {
        let error = listener.finish("vd0");
        assert_eq!(error.is_some(), policy == "report", "{error:?}");
        assert_eq!(dirty(&served, 0), BYTES);
        limit(&served, None);
        write(&served, 0, 3..5, 2);
        let again = json!({ "compress": format == "qcow2" });
        listener.ask("blockdev-backup", increment("vd0", "t", again));
        assert_eq!(listener.finish("vd0"), None);
    }
    assert_eq!(dirty(&served, 0), 0);
    served.ask("blockdev-del", json!({ "node-name": "t" }));
    assert_same(&served, &path, format);
    served.stop();
}

#[test]
fn a_backup_whose_target_is_full_does_as_its_policy_says() {
    for (policy, action) in [("report", "report"), ("enospc", "stop"), ("stop", "stop"), ("ignore", "ignore")]
    {
        full_target("raw", policy, action);
    }
}

#[test]
fn a_compressed_backup_whose_target_is_full_does_as_its_policy_says() {
    full_target("qcow2", "enospc", "stop");
    full_target("qcow2", "report", "report");
}

#[test]
fn a_target_without_room_calls_off_the_backups_of_its_group() {
    let mut served = Served::start_in(in_memory(), wanted(2, "raw"), "");
    for disk in ["vd0", "vd1"] {
        served.ask("block-dirty-bitmap-add", json!({ "node": disk, "name": "b" }));
    }
    write(&served, 0, 0..BYTES / CHUNK as u64, 1);
    write(&served, 1, 0..1, 2);
    target(&served, "t0", "raw");
    target(&served, "t1", "raw");
    let mut listener = Listener::new(&served);
    limit(&served, Some(LIMIT));
    let action =
        |disk, target| json!({ "type": "blockdev-backup", "data": increment(disk, target, json!({})) });
    let actions = json!([action("vd0", "t0"), action("vd1", "t1")]);
    let grouped = json!({ "completion-mode": "grouped" });
    listener.ask("transaction", json!({ "actions": actions, "properties": grouped }));
    assert_ne!(listener.finish("vd0").as_deref(), Some("Operation canceled"));
    assert_eq!(listener.finish("vd1").as_deref(), Some("Operation canceled"));
    let ended = listener.events.iter().filter(|(name, _)| name.starts_with("BLOCK_JOB_C"));
    let ended: Vec<_> = ended.map(|(name, data)| (name.as_str(), data["device"].as_str().unwrap())).collect();
    assert!(ended.contains(&("BLOCK_JOB_COMPLETED", "vd0")), "{ended:?}");
    assert!(ended.contains(&("BLOCK_JOB_CANCELLED", "vd1")), "{ended:?}");
    assert_eq!((dirty(&served, 0), dirty(&served, 1)), (BYTES, CHUNK as u64));
    limit(&served, None);
    listener.ask("transaction", json!({ "actions": actions, "properties": grouped }));
    for disk in ["vd0", "vd1"] {
        assert_eq!(listener.finish(disk), None);
    }
    assert_eq!((dirty(&served, 0), dirty(&served, 1)), (0, 0));
    served.stop();
}

/// A base with compressed clusters, of which one is none.
#[test]
fn a_source_that_can_not_be_read_does_as_its_policy_says() {
    let folder = in_memory();
    let (raw, base) = (folder.path().join("raw"), folder.path().join("vd0.qcow2"));
    let mut random = Random(1);
    let bytes: Vec<u8> = (0..BYTES).map(|at| if at % 2 == 0 { 0 } else { random.number() as u8 }).collect();
    std::fs::write(&raw, &bytes).unwrap();
    let made = qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", text(&raw), text(&base)]);
    assert!(made.status.success(), "{made:?}");
    let file = std::fs::OpenOptions::new().write(true).open(&base).unwrap();
    let len = file.metadata().unwrap().len();
    file.write_all_at(&[0xff; 64 << 10], len / 2).unwrap();
    let mut served = Served::over(folder, std::slice::from_ref(&base), wanted(1, "qcow2"), "");
    let path = target(&served, "t", "raw");
    let mut listener = Listener::new(&served);
    for policy in ["report", "enospc", "stop", "ignore"] {
        let backup = json!({ "device": "vd0", "target": "t", "sync": "full", "auto-dismiss": false,
            "on-source-error": policy });
        listener.ask("blockdev-backup", backup);
        listener.await_job("vd0", if policy == "stop" { &["paused"] } else { &["concluded"] });
        let action = if policy == "enospc" { "report" } else { policy };
        assert_eq!(listener.job_errors(), told("vd0", "read", action), "{policy}");
        if policy == "stop" {
            listener.ask("job-cancel", json!({ "id": "vd0" }));
        }
        let error = listener.finish("vd0");
        assert_eq!(error.is_none(), policy == "ignore", "{error:?}");
    }
    // All that could be read is there.
    let found = std::fs::read(path).unwrap();
    let same = found.chunks(CHUNK).zip(bytes.chunks(CHUNK)).filter(|(found, bytes)| found == bytes).count();
    assert!((100..BYTES as usize / CHUNK).contains(&same), "{same}");
    served.stop();
}
