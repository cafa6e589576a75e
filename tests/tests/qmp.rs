//! The control server against the clients that people use: the package `qemu.qmp` of PyPI and its `qmp-shell`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, OnceLock};

use control::Server;
use control::testing::Fake;

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

#[test]
fn qmp_shell_gets_along_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (_server, service, path) = serve(folder.path());
    let mut shell = Command::new(environment().join("bin/qmp-shell"))
        .arg(path)
        // It keeps its history there.
        .env("HOME", folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = "query-status\n\
        snapshot-create name=typed disks=[\"vda\"] freeze=never\n\
        snapshot-prepare name=held lease=1500\n\
        snapshot-delete name=missing\n\
        snapshot-revert name=typed discard-newer=true\n";
    shell.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = shell.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
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
