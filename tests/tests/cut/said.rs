//! What was under way when the daemon was killed is finished or undone, and the next one says which.

use std::fs;
use std::time::{Duration, Instant};

use frazil_tests::{Driver, Request};
use serde_json::{Value, json};

use crate::agent::FakeAgent;
use crate::served::{Served, Wanted};

const WANTED: Wanted = Wanted { format: "raw", cache: "writeback", disks: 1, queues: 1, bytes: 8 << 20 };
const CHUNK: usize = 64 << 10;

/// Kills the daemon, and returns what the next one says until it serves.
fn killed(served: &mut Served) -> String {
    let log = served.path("log");
    let before = fs::read_to_string(&log).unwrap().len();
    served.kill();
    served.restart();
    fs::read_to_string(&log).unwrap()[before..].to_owned()
}

/// The line that tells of `what`.
fn line<'a>(said: &'a str, what: &str) -> &'a str {
    said.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("{what} is not told of:\n{said}"))
}

fn jobs(served: &Served) -> Value {
    served.ask("query-jobs", json!({}))
}

fn fill(served: &Served) {
    let mut driver = Driver::connect(&served.sockets[0], 1, 1, CHUNK).unwrap();
    driver.queues[0].fill(0, &[7; CHUNK]);
    for at in (0..WANTED.bytes).step_by(CHUNK) {
        assert_eq!(driver.queues[0].ask(Request::Write(at)), 0);
    }
}

#[test]
fn a_cut_is_undone() {
    let mut served = Served::start(WANTED);
    let socket = served.path("agent");
    let agent = FakeAgent::start(&socket);
    served.restart_with(&["--agent", socket.to_str().unwrap()]);
    agent.hang(true);
    let arguments = json!({ "name": "cut-short", "freeze": "require" });
    let mut client = served.qmp();
    let asked = std::thread::spawn(move || client.execute("snapshot-create", arguments, |_, _| {}).is_err());
    let deadline = Instant::now() + Duration::from_secs(20);
    while !agent.is_asked() {
        assert!(Instant::now() < deadline, "no freeze is sent");
        std::thread::sleep(Duration::from_millis(2));
    }
    let said = killed(&mut served);
    assert!(asked.join().unwrap());
    assert!(line(&said, "was not taken").contains("cut-short"), "{said}");
    assert!(served.names().is_empty());
    // The freeze comes late, and is taken back.
    agent.hang(false);
    let owed = |served: &Served| served.ask("query-frazil", json!({}))["thaw-owed"] == true;
    while owed(&served) {
        assert!(Instant::now() < deadline, "the guest is not thawed");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!agent.is_frozen());
    assert!(!killed(&mut served).contains("cut-short"), "it is told once");
}

/// A kill between the record of a snapshot and its sync: no more than a few milliseconds, so the record is put back there.
#[test]
fn a_snapshot_that_was_recorded_stands() {
    let mut served = Served::start(WANTED);
    served.ask("snapshot-create", json!({ "name": "stands" }));
    assert!(!killed(&mut served).contains("stands"));
    served.kill();
    let path = served.path("state/manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    let mut manifest: Value = serde_json::from_str(&text).unwrap();
    manifest["snapshots"][0]["sealed"] = json!(false);
    fs::write(&path, manifest.to_string()).unwrap();
    let said = killed(&mut served);
    assert!(line(&said, "it stands").contains("snapshot=\"stands\""), "{said}");
    assert_eq!(served.ask("query-snapshots", json!({}))[0]["sealed"], true);
    assert!(!killed(&mut served).contains("snapshot=\"stands\""), "it is told once");
}

#[test]
fn a_job_is_gone_on_with() {
    let mut served = Served::start(WANTED);
    fill(&served);
    served.ask("snapshot-create", json!({ "name": "old" }));
    fill(&served);
    served.ask("snapshot-create", json!({ "name": "new" }));
    served.ask("snapshot-delete", json!({ "name": "old", "job-id": "merges", "speed": 65536 }));
    let said = killed(&mut served);
    assert!(line(&said, "goes on").contains("merges"), "{said}");
    served.ask("block-job-set-speed", json!({ "device": "merges", "speed": 0 }));
    let deadline = Instant::now() + Duration::from_secs(20);
    while jobs(&served) != json!([]) {
        assert!(Instant::now() < deadline, "{}", jobs(&served));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(served.names(), ["new"]);
    assert!(!killed(&mut served).contains("merges"), "it is told once");
}

/// Its target looks like one that is whole.
#[test]
fn a_backup_is_not_gone_on_with() {
    let mut served = Served::start(WANTED);
    fill(&served);
    for job in ["first", "second"] {
        let target = served.path(job);
        fs::File::create(&target).unwrap().set_len(WANTED.bytes).unwrap();
        let file = json!({ "driver": "file", "filename": target });
        served.ask("blockdev-add", json!({ "driver": "raw", "node-name": job, "file": file }));
    }
    // One that has ended is not told of, nor one that a daemon ends with.
    let backup = |speed: u64, job: &str| json!({ "device": "vd0", "target": job, "sync": "full", "job-id": job, "speed": speed });
    served.ask("blockdev-backup", backup(0, "first"));
    let deadline = Instant::now() + Duration::from_secs(20);
    while jobs(&served) != json!([]) {
        assert!(Instant::now() < deadline, "{}", jobs(&served));
        std::thread::sleep(Duration::from_millis(10));
    }
    served.ask("blockdev-backup", backup(65536, "second"));
    let said = killed(&mut served);
    let told = line(&said, "not gone on with");
    let target = served.path("second");
    assert!(told.contains("vd0") && told.contains(target.to_str().unwrap()), "{told}");
    assert!(!said.contains("first"), "{said}");
    assert_eq!(jobs(&served), json!([]));
    assert_eq!(fs::read_dir(served.path("state/jobs")).unwrap().count(), 0);
    assert!(!killed(&mut served).contains("not gone on with"), "it is told once");
}
