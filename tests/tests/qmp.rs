//! The control server against the clients that people use: the package `qemu.qmp` of PyPI and its `qmp-shell`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use control::Server;
use control::client::Client;
use control::testing::Fake;
use serde_json::json;

/// The release that the test is written for.
const PACKAGE: &str = "qemu.qmp==0.0.6";

/// A Python environment with the package, made once and kept for the next run.
fn environment() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("qmp-venv");
        // One test process makes it, the other waits.
        let lock = std::fs::File::create(folder.with_extension("lock")).unwrap();
        lock.lock().unwrap();
        let stamp = folder.join(PACKAGE);
        if stamp.exists() {
            return folder;
        }
        let missing = "install python3 with its venv module (Debian: apt-get install python3-venv)";
        run(Command::new("python3").args(["-m", "venv"]).arg(&folder), missing);
        let missing = "the package index cannot be reached";
        run(Command::new(folder.join("bin/pip")).args(["install", "--quiet", PACKAGE]), missing);
        std::fs::write(stamp, "").unwrap();
        folder
    })
}

fn run(command: &mut Command, advice: &str) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; {advice}"));
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} failed; {advice}\n{text}");
    output
}

/// A server of a fake disk.
fn serve(folder: &Path) -> (Server, Arc<Fake>, PathBuf) {
    let path = folder.join("qmp");
    let (fake, events) = Fake::new();
    let service = Arc::new(fake);
    let server = Server::start(&path, Arc::clone(&service) as _, events).unwrap();
    (server, service, path)
}

#[test]
fn the_python_client_gets_along_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (_server, service, path) = serve(folder.path());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/qmp_client.py");
    run(Command::new(environment().join("bin/python")).arg(script).arg(path), "see what Python says");
    assert!(service.has_quit());
}

/// Types `lines` into a `qmp-shell` that is connected to `socket`; what it says.
fn type_into_shell(socket: &Path, home: &Path, lines: &str) -> String {
    let mut shell = Command::new(environment().join("bin/qmp-shell"))
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
        "Connected to QEMU 0.",
        r#"{"return": {"running": true, "status": "running"}}"#,
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
        r#"{"return": {"running": false, "status": "prelaunch"}}"#,
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
