//! Jobs of the daemon, killed in their midst under load: they go on, and neither the disk nor any other snapshot changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};

use crate::images::{check_clean, check_sound, same};
use crate::ledger::{Clock, Ledger};
use crate::load::{Load, Mix};
use crate::served::{Served, Wanted};

const SIZE: usize = 4096;
const PLACES: usize = 256;
const QUEUES: usize = 2;

/// Bytes a second: slow enough to be killed in the midst.
const SLOW: u64 = 2 << 20;

struct Drill {
    served: Served,
    clock: Arc<Clock>,
    ledgers: Vec<Vec<Ledger>>,
    /// What each snapshot holds.
    snapshots: BTreeMap<String, Vec<u8>>,
    mix: Mix,
}

impl Drill {
    fn start(format: &'static str, cache: &'static str, mix: Mix) -> Self {
        let bytes = (SIZE * PLACES * QUEUES) as u64;
        let served = Served::start(Wanted { format, cache, disks: 1, queues: QUEUES, bytes });
        let ledgers = vec![(0..QUEUES).map(|queue| Ledger::new(SIZE, queue, QUEUES, PLACES)).collect()];
        let (clock, snapshots) = (Arc::new(Clock::new()), BTreeMap::new());
        Self { served, clock, ledgers, snapshots, mix }
    }

    fn load(&mut self) -> Load {
        let ledgers = std::mem::take(&mut self.ledgers);
        Load::connect(&self.served.sockets, ledgers, self.mix, &self.clock)
    }

    /// Takes a snapshot under load.
    fn snapshot(&mut self, name: &str) {
        let load = self.load();
        thread::sleep(Duration::from_millis(30));
        self.served.snapshot(name, &self.clock);
        thread::sleep(Duration::from_millis(10));
        self.ledgers = load.finish();
        self.snapshots.insert(name.to_owned(), self.served.export(name, "vd0"));
    }

    fn jobs(&self) -> Vec<Value> {
        self.served.ask("query-jobs", json!({})).as_array().unwrap().clone()
    }

    /// Begins to delete a snapshot, kills the daemon after `pause`, and has the next one end it. Tells whether there was
    /// something left for it to do.
    fn kill_in_delete(&mut self, name: &str, pause: Duration) -> bool {
        self.snapshots.remove(name);
        let went_on = self.kill_in("snapshot-delete", json!({ "name": name }), pause);
        assert!(!self.served.names().contains(&name.to_owned()));
        went_on
    }

    /// The same with any job.
    fn kill_in(&mut self, command: &str, mut arguments: Value, pause: Duration) -> bool {
        let load = self.load();
        // There is something to be merged in the active layer.
        thread::sleep(Duration::from_millis(30));
        let id = json!("killed");
        for (key, value) in [("job-id", id.clone()), ("speed", json!(SLOW)), ("auto-dismiss", json!(false))] {
            arguments[key] = value;
        }
        self.served.ask(command, arguments);
        thread::sleep(pause);
        self.served.kill();
        self.ledgers = load.leave();
        for (path, _) in self.served.layers("vd0").iter().filter(|(_, format)| format == "qcow2") {
            check_sound(path);
        }
        self.served.restart();
        let went_on = self.jobs().iter().any(|job| job["id"] == id);
        self.settle();
        self.check_snapshots();
        // Meanwhile the guest is back.
        let load = self.load();
        self.end(&id);
        self.ledgers = load.finish();
        self.settle();
        self.check_snapshots();
        went_on
    }

    /// Waits until a job is over, as fast as it can. It is one that goes by itself: after a kill each does, for who began it has
    /// lost the connection.
    fn end(&self, id: &Value) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Some(job) = self.jobs().into_iter().find(|job| job["id"] == *id) {
            if job["status"] == "concluded" {
                assert_eq!(job["error"], Value::Null);
            }
            assert!(Instant::now() < deadline, "{job}");
            // It may just have become too late for that.
            let speed = json!({ "device": id, "speed": 0 });
            let _ = self.served.qmp().execute("block-job-set-speed", speed, |_, _| {});
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn settle(&mut self) {
        let image = self.served.read(0);
        for ledger in &mut self.ledgers[0] {
            ledger.settle(&image, self.clock.now());
        }
    }

    fn check_snapshots(&self) {
        for (name, bytes) in &self.snapshots {
            assert!(self.served.export(name, "vd0") == *bytes, "{name} has changed");
        }
    }

    /// After a clean end QEMU reads what the guest did.
    fn finish(mut self) {
        let disk = self.served.read(0);
        self.served.stop();
        let layers = self.served.layers("vd0");
        let (top, format) = layers.last().unwrap();
        check_sound(top);
        let raw = self.served.path("last.raw");
        std::fs::write(&raw, disk).unwrap();
        same(&raw, top, format);
    }
}

fn drill(format: &'static str, cache: &'static str, mix: Mix) {
    let mut drill = Drill::start(format, cache, mix);
    (0..5).for_each(|turn| drill.snapshot(&format!("s{turn}")));
    // The oldest goes into the base, one in the middle either way, the newest needs a pivot.
    let mut went_on = 0;
    for (turn, name) in ["s0", "s2", "s4", "s1", "s3"].into_iter().enumerate() {
        went_on += usize::from(drill.kill_in_delete(name, Duration::from_millis(40 + 60 * turn as u64)));
    }
    assert!(went_on > 0, "no job was killed in its midst");
    drill.finish();
}

#[test]
fn deletes_killed_on_a_raw_base_go_on() {
    drill("raw", "writeback", Mix::Discards);
}

#[test]
fn deletes_killed_on_a_qcow2_base_go_on() {
    drill("qcow2", "writeback", Mix::Zeroes);
}

#[test]
fn deletes_killed_past_the_page_cache_go_on() {
    drill("qcow2", "none", Mix::Stamps);
}

/// All above the lowest layer into one, down and up in turn, a kill in each: also before its first byte, and at its end.
#[test]
fn commits_and_streams_killed_go_on() {
    let mut drill = Drill::start("qcow2", "writeback", Mix::Discards);
    // What lies lowest holds a snapshot, what lies on it none.
    ["kept", "gone"].iter().for_each(|name| drill.snapshot(name));
    let load = drill.load();
    let id = drill.served.ask("snapshot-delete", json!({ "name": "gone" }))["job-id"].clone();
    drill.end(&id);
    drill.ledgers = load.finish();
    drill.snapshots.remove("gone");
    let mut went_on = 0;
    for (turn, pause) in [0, 30, 80, 130, 200, 300].into_iter().enumerate() {
        let nodes = drill.served.ask("query-named-block-nodes", json!({}));
        let lowest = |height: usize| nodes[nodes.as_array().unwrap().len() - 1 - height]["node-name"].clone();
        let (command, arguments) = match turn % 2 {
            0 => ("block-commit", json!({ "device": "vd0", "base-node": lowest(1), "auto-complete": true })),
            _ => ("block-stream", json!({ "device": "vd0", "base-node": lowest(0) })),
        };
        went_on += usize::from(drill.kill_in(command, arguments, Duration::from_millis(pause)));
    }
    assert!(went_on > 2, "hardly a job was killed in its midst");
    drill.finish();
}

/// The whole chain in one image, by hand, and QEMU's tools find nothing wrong with it.
#[test]
fn commands_merge_layers_under_a_guest() {
    let mut drill = Drill::start("raw", "writeback", Mix::Stamps);
    ["one", "two"].iter().for_each(|name| drill.snapshot(name));
    let load = drill.load();
    let said = |words: &[&str]| {
        let output = drill.served.command(&[words, &["--control", "control"]].concat());
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let id = said(&["snapshot", "delete", "one", "--speed", "4K", "--no-wait", "--job-id", "slow"]);
    assert_eq!(id, "slow\n");
    said(&["job", "pause", "slow"]);
    assert!(said(&["job", "list"]).contains("slow"));
    said(&["job", "resume", "slow"]);
    said(&["job", "speed", "slow", "0"]);
    let gone = drill.served.command(&["job", "wait", "slow", "--control", "control"]);
    assert!(
        gone.status.success() || String::from_utf8_lossy(&gone.stderr).contains("no such job"),
        "{gone:?}"
    );
    assert_eq!(said(&["snapshot", "delete", "two"]), "deleted two\n");
    let nodes: Value = serde_json::from_str(&said(&["chain", "list", "--json"])).unwrap();
    let names: Vec<_> =
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["vd0.3", "vd0.0"]);
    assert_eq!(said(&["chain", "commit", "vd0", "--top", "vd0.3", "--job-id", "all"]), "committed\n");
    assert_eq!(said(&["chain", "stream", "vd0"]), "streamed\n");
    while !drill.jobs().is_empty() {
        thread::sleep(Duration::from_millis(5));
    }
    drill.ledgers = load.finish();
    drill.settle();
    let layers = drill.served.layers("vd0");
    assert!(layers.iter().all(|(_, format)| format == "qcow2"), "the base is still used: {layers:?}");
    assert!(drill.served.path("vd0.raw").exists(), "the base is not Frazil's to remove");
    drill.served.stop();
    layers.iter().for_each(|(path, _)| check_clean(path));
    drill.served.restart();
    drill.settle();
    drill.finish();
}

/// A host without room ends a job, with its reason, and nothing else: once there is room the delete is done.
#[test]
fn a_full_host_fails_a_job_and_changes_nothing() {
    let mut drill = Drill::start("qcow2", "writeback", Mix::Stamps);
    ["one", "two", "three"].iter().for_each(|name| drill.snapshot(name));
    let pid = Pid::from_raw(i32::try_from(drill.served.pid()).unwrap());
    let set = |most| {
        let _ = prlimit(pid, Resource::Fsize, Rlimit { current: most, maximum: None }).unwrap();
    };
    set(Some(64 << 10));
    // The oldest: what came after it is copied into the base.
    let arguments = json!({ "name": "one", "auto-dismiss": false });
    let failed = drill.served.qmp().execute("snapshot-delete", arguments.clone(), |_, _| {});
    if let Ok(begun) = failed {
        let id = &begun["job-id"];
        let ended = loop {
            let job = drill.jobs().into_iter().find(|job| job["id"] == *id).unwrap();
            if job["status"] == "concluded" {
                break job;
            }
            thread::sleep(Duration::from_millis(5));
        };
        assert!(ended["error"].is_string(), "there was room after all: {ended}");
        drill.served.ask("job-dismiss", json!({ "id": id }));
    }
    set(None);
    drill.settle();
    drill.snapshots.remove("one");
    drill.check_snapshots();
    let id = drill.served.ask("snapshot-delete", json!({ "name": "one" }))["job-id"].clone();
    drill.end(&id);
    assert_eq!(drill.served.names(), ["two", "three"]);
    drill.settle();
    drill.check_snapshots();
    drill.finish();
}

/// A command that is ended while it waits leaves its job to the daemon, and its name to others; one that waits hears of the end.
#[test]
fn a_command_that_waits_leaves_nothing_on_the_list() {
    let mut drill = Drill::start("raw", "writeback", Mix::Stamps);
    ["one", "two"].iter().for_each(|name| drill.snapshot(name));
    let begin = |name: &str| {
        let words = ["snapshot", "delete", name, "--speed", "4K", "--control", "control"];
        let command = drill.served.spawn(&words);
        while drill.jobs().is_empty() {
            thread::sleep(Duration::from_millis(5));
        }
        command
    };
    let mut killed = begin("one");
    killed.kill().unwrap();
    killed.wait().unwrap();
    drill.end(&json!("delete-one"));
    assert_eq!(drill.served.names(), ["two"]);
    let waits = begin("two");
    drill.served.ask("job-cancel", json!({ "id": "delete-two" }));
    let output = waits.wait_with_output().unwrap();
    let story = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && story.contains("it was cancelled"), "{output:?}");
    assert!(drill.jobs().is_empty());
    drill.finish();
}
