//! The daemon's sandbox: in force, and told of.

use std::fs;

use serde_json::{Value, json};

use crate::served::{Served, Wanted};

const WANTED: Wanted = Wanted { format: "raw", cache: "writeback", disks: 1, queues: 1, bytes: 1 << 20 };

/// A line of `/proc/PID/status`.
fn status(served: &Served, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/status", served.pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap().trim().to_owned()
}

fn sandbox(served: &Served) -> Value {
    served.ask("query-frazil", json!({}))["sandbox"].clone()
}

/// On each of its threads, for those inherit it.
#[test]
fn the_daemon_is_confined_unless_it_is_told_not_to_be() {
    let mut served = Served::start(WANTED);
    assert_eq!((status(&served, "Seccomp"), status(&served, "NoNewPrivs")), ("2".into(), "1".into()));
    assert_eq!(status(&served, "Seccomp_filters"), "3");
    let mut confined = 0;
    for task in fs::read_dir(format!("/proc/{}/task", served.pid())).unwrap() {
        // A client's thread may end between the two looks.
        let Ok(text) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        assert!(text.contains("Seccomp:\t2"), "{text}");
        confined += 1;
    }
    // The main thread, and a worker, sessions and the control socket's at least.
    assert!(confined > 4, "{confined}");
    let limits = fs::read_to_string(format!("/proc/{}/limits", served.pid())).unwrap();
    let cores = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(cores.split_whitespace().nth(4), Some("0"), "{cores}");
    assert_eq!(sandbox(&served)["seccomp"], "full");
    let told = sandbox(&served);
    assert!(["full", "partial"].contains(&told["landlock"].as_str().unwrap()));
    assert_eq!(told["landlock"] == "full", told["missing"] == json!([]), "{told}");
    served.restart_with(&["--sandbox", "landlock"]);
    assert_eq!((status(&served, "Seccomp"), status(&served, "NoNewPrivs")), ("0".into(), "1".into()));
    assert_eq!(sandbox(&served)["seccomp"], "off");
}

#[test]
fn without_a_sandbox_nothing_is_confined() {
    let mut served = Served::start(WANTED);
    served.restart_with(&["--sandbox", "off"]);
    assert_eq!((status(&served, "Seccomp"), status(&served, "NoNewPrivs")), ("0".into(), "0".into()));
    assert_eq!(sandbox(&served), json!({ "landlock": "off", "seccomp": "off", "missing": [] }));
    let outside = tempfile::tempdir().unwrap();
    served.ask("snapshot-create", json!({ "name": "one" }));
    let target = outside.path().join("copy");
    let export = json!({ "name": "one", "disk": "vd0", "target": target, "format": "raw" });
    served.ask("snapshot-export", export);
    assert!(target.exists());
}

/// Every command that names a file.
#[test]
fn clients_reach_nothing_outside_of_its_folders() {
    let (mut served, outside) = (Served::start(WANTED), tempfile::tempdir().unwrap());
    served.ask("snapshot-create", json!({ "name": "one" }));
    let secret = outside.path().join("secret.raw");
    fs::write(&secret, [7; 4096]).unwrap();
    let socket = json!({ "type": "unix", "data": { "path": outside.path().join("nbd") } });
    let inline =
        json!({ "driver": "raw", "node-name": "b", "file": { "driver": "file", "filename": "/etc/passwd" } });
    let calls = [
        (
            "snapshot-export",
            json!({ "name": "one", "disk": "vd0", "target": outside.path().join("x"), "format": "raw" }),
        ),
        ("blockdev-add", json!({ "driver": "file", "node-name": "a", "filename": secret })),
        ("blockdev-add", inline),
        ("drive-backup", json!({ "device": "vd0", "target": outside.path().join("y"), "sync": "full" })),
        (
            "blockdev-create",
            json!({ "job-id": "c", "options": { "driver": "file", "filename": outside.path().join("z"), "size": 512 } }),
        ),
        ("nbd-server-start", json!({ "addr": socket })),
        ("snapshot-serve", json!({ "name": "one", "disk": "vd0", "addr": socket })),
        (
            "object-add",
            json!({ "qom-type": "tls-creds-x509", "id": "t", "dir": outside.path(), "endpoint": "server" }),
        ),
    ];
    for (command, arguments) in &calls {
        let refusal = served.refusal(command, arguments.clone());
        let flag = if *command == "object-add" { "--tls-folder" } else { "--target-folder" };
        assert!(refusal.contains(flag), "{command}: {refusal}");
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    served.restart_with(&["--target-folder", outside.path().to_str().unwrap()]);
    served.ask("snapshot-export", calls[0].1.clone());
    served.ask("blockdev-add", calls[1].1.clone());
    served.ask("nbd-server-start", calls[5].1.clone());
    assert!(outside.path().join("x").exists() && outside.path().join("nbd").exists());
}
