//! The commands without a guest, against the daemon and against its state directory.

use std::process::Output;
use std::time::{Duration, Instant};

use frazil_tests::{Driver, Request};
use serde_json::Value;

use crate::images::{check_clean, same};
use crate::served::{Served, Wanted};

const WANTED: Wanted = Wanted { format: "qcow2", cache: "writeback", disks: 2, queues: 1, bytes: 1 << 20 };

/// `frazil WORDS… --control`, and what it ends with.
fn run(served: &Served, words: &[&str]) -> Output {
    served.command(&[words, &["--control", "control"]].concat())
}

/// The same of the state directory.
fn run_offline(served: &Served, words: &[&str]) -> Output {
    served.command(&[words, &["--state", "state"]].concat())
}

fn succeeds(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn fails(output: &Output, code: i32, reason: &str) {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(reason), "{said}");
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&succeeds(output)).unwrap()
}

/// Fills the first 64 KiB of both disks, as a guest that comes and goes.
fn write(served: &Served, byte: u8) {
    for socket in &served.sockets {
        let mut driver = Driver::connect(socket, 1, 1, 64 << 10).unwrap();
        driver.queues[0].fill(0, &[byte; 64 << 10]);
        assert_eq!(driver.queues[0].ask(Request::Write(0)), 0);
    }
    wait_for_nobody(served);
}

/// That a guest is gone is noticed a little later.
fn wait_for_nobody(served: &Served) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while json(&run(served, &["status", "--json"]))["disks"].as_array().unwrap().iter().any(is_connected) {
        assert!(Instant::now() < deadline, "a guest that is gone is still told to be connected");
    }
}

fn is_connected(disk: &Value) -> bool {
    disk["connected"].as_bool().unwrap()
}

/// The byte that fills both disks.
fn content(served: &Served) -> u8 {
    let disks: Vec<_> = (0..2).map(|disk| served.read(disk)).collect();
    wait_for_nobody(served);
    assert!(disks.iter().all(|disk| disk[..64 << 10] == [disks[0][0]; 64 << 10]));
    disks[0][0]
}

#[test]
fn a_guest_is_in_the_way_of_a_revert_and_not_of_a_delete() {
    let mut served = Served::start(WANTED);
    for (byte, name) in [(1, "one"), (2, "two"), (3, "three"), (4, "four")] {
        write(&served, byte);
        let made = json(&run(&served, &["snapshot", "create", name, "--json"]));
        assert_eq!((&made["name"], &made["grade"]), (&name.into(), &"crash".into()));
    }
    write(&served, 5);
    let guest = Driver::connect(&served.sockets[1], 1, 1, 512).unwrap();
    let status = json(&run(&served, &["status", "--json"]));
    assert_eq!(status["snapshots"], 4);
    assert_eq!(
        status["disks"].as_array().unwrap().iter().map(is_connected).collect::<Vec<_>>(),
        [false, true]
    );
    fails(&run(&served, &["snapshot", "revert", "four"]), 1, "a guest is connected to disk vd1");
    fails(&run_offline(&served, &["snapshot", "delete", "four"]), 1, "in use by a running frazil");
    assert_eq!(succeeds(&run(&served, &["snapshot", "delete", "two"])), "deleted two\n");
    assert_eq!(succeeds(&run(&served, &["snapshot", "delete", "four"])), "deleted four\n");
    fails(&run(&served, &["snapshot", "delete", "four"]), 1, "'four'");
    assert_eq!(succeeds(&run(&served, &["job", "list"])), "no jobs\n");
    drop(guest);
    assert_eq!(content(&served), 5);

    fails(&run(&served, &["snapshot", "revert", "one"]), 1, "three");
    succeeds(&run(&served, &["snapshot", "revert", "three"]));
    assert_eq!(content(&served), 3);
    succeeds(&run(&served, &["snapshot", "revert", "one", "--discard-newer"]));
    assert_eq!(content(&served), 1);
    assert_eq!(json(&run(&served, &["snapshot", "list", "--json"])).as_array().unwrap().len(), 1);
    write(&served, 6);

    served.stop();
    fails(&run(&served, &["snapshot", "list"]), 3, "connect to");
    for (path, _) in served.ids().iter().flat_map(|id| served.layers(id)) {
        check_clean(&path);
    }
    succeeds(&run_offline(&served, &["snapshot", "delete", "one"]));
    served.restart();
    assert_eq!(content(&served), 6);
    assert!(served.names().is_empty());
}

#[test]
fn an_export_is_the_same_with_the_daemon_and_without() {
    let mut served = Served::start(WANTED);
    write(&served, 1);
    succeeds(&run(&served, &["snapshot", "create", "one"]));
    write(&served, 2);
    for format in ["raw", "qcow2"] {
        let words = |out| ["snapshot", "export", "one", "--disk", "vd0", "--format", format, out];
        let (online, offline) = (format!("online.{format}"), format!("offline.{format}"));
        succeeds(&run(&served, &words(&online)));
        fails(&run(&served, &words(&online)), 1, "exist");
        served.stop();
        succeeds(&run_offline(&served, &words(&offline)));
        let [first, second] = [online, offline].map(|name| served.path(&name));
        assert!(std::fs::read(&first).unwrap() == std::fs::read(second).unwrap());
        if format == "raw" {
            assert!(std::fs::read(&first).unwrap()[..64 << 10] == [1; 64 << 10]);
        } else {
            same(&served.path("online.raw"), &first, "qcow2");
        }
        served.restart();
    }
    fails(&run(&served, &["snapshot", "export", "two", "--disk", "vd0", "--format", "raw", "x"]), 1, "'two'");
    fails(&run(&served, &["snapshot", "export", "one", "--disk", "vd9", "--format", "raw", "x"]), 1, "vd9");
}
