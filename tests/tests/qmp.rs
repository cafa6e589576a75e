//! The control server against the clients that people use: the package `qemu.qmp` of PyPI and its `qmp-shell`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::Server;
use control::client::Client;
use control::testing::Fake;
use frazil_tests::{python_programs, run_tool};
use serde_json::json;

/// The programs of the Python environment.
fn python() -> PathBuf {
    python_programs(Path::new(env!("CARGO_TARGET_TMPDIR")))
}

/// A server of a fake disk.
fn serve(folder: &Path) -> (Server, Arc<Fake>, PathBuf) {
    let path = folder.join("qmp");
    let service = Arc::new(Fake::new());
    let listener = hostio::Listener::bind(&path).unwrap();
    let server = Server::start(listener, Arc::clone(&service) as _, service.announcer().clone()).unwrap();
    (server, service, path)
}

#[test]
fn the_python_client_gets_along_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (_server, service, path) = serve(folder.path());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/qmp_client.py");
    run_tool(Command::new(python().join("python")).arg(script).arg(path), "see what Python says");
    assert!(service.has_quit());
}

/// Types `lines` into a `qmp-shell` that is connected to `socket`; what it says.
fn type_into_shell(socket: &Path, home: &Path, lines: &str) -> String {
    let mut shell = Command::new(python().join("qmp-shell"))
        .arg(socket)
        // It keeps its history there.
        .env("HOME", home)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    shell.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = shell.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn qmp_shell_gets_along_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (_server, service, path) = serve(folder.path());
    let lines = "query-status\n\
        snapshot-create name=typed disks=[\"vda\"] freeze=never\n\
        snapshot-prepare name=held lease=1500\n\
        snapshot-delete name=missing\n\
        snapshot-revert name=typed discard-newer=true\n";
    let text = type_into_shell(&path, folder.path(), lines);
    for expected in [
        "Connected to QEMU 10.",
        r#"{"return": {"running": true, "#,
        r#""status": "running"}}"#,
        r#""grade": "filesystem""#,
        r#"{"error": {"class": "DeviceNotFound", "desc": "no snapshot is named missing"}}"#,
    ] {
        assert!(text.contains(expected), "{expected} is not in {text}");
    }
    assert_eq!(text.matches(r#"{"return": {}}"#).count(), 2, "{text}");
    assert_eq!(service.names(), ["typed"]);
    assert_eq!(service.lease(), Some(std::time::Duration::from_millis(1500)));
}

/// A process that does not outlive its test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already, as it should.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The daemon itself, by the same shell: a snapshot is taken, found and deleted, and the daemon ends.
#[test]
fn qmp_shell_drives_the_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, socket) = (folder.path().join("disk.raw"), folder.path().join("qmp"));
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(Path::parent).unwrap().join("frazil");
    let words =
        format!("id=vda,path={},format=raw,socket={}", disk.display(), folder.path().join("vda").display());
    let started = Command::new(program)
        .args(["serve", "--disk", &words, "--state"])
        .arg(folder.path().join("state"))
        .arg("--control")
        .arg(&socket)
        .spawn()
        .expect("frazil is not built: run `make test`, or `cargo build` before");
    let mut daemon = Daemon(started);
    let deadline = Instant::now() + Duration::from_secs(30);
    while UnixStream::connect(&socket).is_err() {
        assert_eq!(daemon.0.try_wait().unwrap(), None, "frazil serve has ended");
        assert!(Instant::now() < deadline, "frazil serve does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    let lines = "query-status\n\
        query-block\n\
        snapshot-create name=typed disks=[\"vda\"] freeze=never\n\
        query-snapshot name=typed probe=true\n\
        snapshot-delete name=typed\n\
        query-jobs\n";
    let text = type_into_shell(&socket, folder.path(), lines);
    Client::connect(&socket).unwrap().execute("quit", json!({}), |_, _| {}).unwrap();
    let ended = daemon.0.wait().unwrap();
    assert!(ended.success(), "{ended}: {text}");
    for expected in [
        r#"{"return": {"running": false, "#,
        r#""status": "prelaunch"}}"#,
        r#""device": "vda""#,
        r#""grade": "crash""#,
        r#""probe": [{"id": "vda""#,
        r#"{"return": {"job-id": "delete-typed"}}"#,
    ] {
        assert!(text.contains(expected), "{expected} is not in {text}");
    }
    assert!(!text.contains(r#""error""#), "{text}");
    assert!(!socket.exists());
}
