//! The daemon as an ordinary user, and who may speak to it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use control::client::Client;
use frazil_tests::{Driver, Request};
use serde_json::json;

use crate::served::program;

/// Nobody.
const USER: u32 = 65534;

/// A folder of nobody's, with a copy of the program that nobody may run, and an image.
struct Place(tempfile::TempDir);

impl Place {
    /// `None` where this is no root, and so can not become somebody else.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let place = Self(tempfile::tempdir_in(std::env::temp_dir()).unwrap());
        fs::copy(program(), place.path("frazil")).unwrap();
        fs::File::create(place.path("vda.raw")).unwrap().set_len(1 << 20).unwrap();
        for name in ["", "vda.raw"] {
            chown(place.path(name), Some(USER), Some(USER)).unwrap();
        }
        Some(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `frazil WORDS…` as nobody.
    fn as_nobody(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.path("frazil"));
        command.args(words).current_dir(self.0.path()).uid(USER).gid(USER);
        command
    }

    /// What one of these sockets says to a process of that user which asks for metrics.
    fn heard(&self, socket: &str, user: u32) -> String {
        const ASK: &str = "import socket, sys\n\
            s = socket.socket(socket.AF_UNIX)\n\
            s.connect(sys.argv[1])\n\
            try:\n s.sendall(b'GET /metrics HTTP/1.1\\r\\n\\r\\n')\n print(s.recv(16))\n\
            except OSError: pass\n";
        // Nothing is said to who is turned away, not even an empty answer.
        let mut ask = Command::new("python3");
        ask.args(["-c", ASK, socket]).current_dir(self.0.path()).uid(user).gid(user);
        let output = ask.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().replace("b''\n", "")
    }

    fn serve(&self, more: &[&str]) -> Daemon {
        let disk = "id=vda,path=vda.raw,format=raw,socket=vda.sock";
        let words = ["serve", "--state", "state", "--control", "control", "--disk", disk];
        let started = self.as_nobody(&[&words[..], more].concat()).stderr(Stdio::null()).spawn().unwrap();
        let mut daemon = Daemon(started);
        let deadline = Instant::now() + Duration::from_secs(30);
        while UnixStream::connect(self.path("control")).is_err() {
            assert_eq!(daemon.0.try_wait().unwrap(), None, "frazil serve has ended");
            assert!(Instant::now() < deadline, "frazil serve does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon
    }
}

/// A process that does not outlive its test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_private(path: &Path, mode: u32) {
    let found = fs::metadata(path).unwrap();
    assert_eq!((found.uid(), found.permissions().mode() & 0o777), (USER, mode), "{}", path.display());
}

fn failed(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
}

#[test]
fn an_ordinary_user_serves_a_disk_and_takes_and_exports_snapshots() {
    let Some(place) = Place::new() else { return };
    let mut daemon = place.serve(&[]);
    is_private(&place.path("control"), 0o600);
    is_private(&place.path("vda.sock"), 0o600);
    is_private(&place.path("state"), 0o700);
    // A process that may not be dumped, nor traced by its own user, is root's there: proc(5).
    let memory = fs::metadata(format!("/proc/{}/mem", daemon.0.id())).unwrap();
    assert_eq!(memory.uid(), 0, "a core of it would have the guest's memory");
    let mut driver = Driver::connect(&place.path("vda.sock"), 1, 1, 4096).unwrap();
    driver.queues[0].fill(0, &[7; 4096]);
    assert_eq!(driver.queues[0].ask(Request::Write(0)), 0);
    for words in [
        &["snapshot", "create", "one"][..],
        &["snapshot", "export", "one", "--disk", "vda", "--format", "raw", "one.raw"],
        &["status"],
    ] {
        let output = place.as_nobody(&[words, &["--control", "control"]].concat()).output().unwrap();
        failed(&output, 0);
    }
    assert_eq!(fs::read(place.path("one.raw")).unwrap()[..4096], [7; 4096]);
    let mut client = Client::connect(&place.path("control")).unwrap();
    let status = client.execute("query-frazil", json!({}), |_, _| {}).unwrap();
    assert_eq!(status["sandbox"]["seccomp"], "full");
    drop(driver);
    client.execute("quit", json!({}), |_, _| {}).unwrap();
    assert!(daemon.0.wait().unwrap().success());
}

/// The sockets' modes let root and nobody in; the list has only root.
#[test]
fn who_is_not_on_the_list_of_users_is_turned_away() {
    let Some(place) = Place::new() else { return };
    let _daemon = place.serve(&["--user", "0", "--metrics", "unix:metrics"]);
    let mut client = Client::connect(&place.path("control")).unwrap();
    client.execute("query-status", json!({}), |_, _| {}).unwrap();
    let nbd = json!({ "addr": { "type": "unix", "data": { "path": place.path("nbd") } } });
    client.execute("nbd-server-start", nbd, |_, _| {}).unwrap();
    for socket in ["nbd", "metrics", "control"] {
        assert!(!place.heard(socket, 0).is_empty(), "root is on the list");
        assert_eq!(place.heard(socket, USER), "", "{socket}");
    }
    Driver::connect(&place.path("vda.sock"), 1, 1, 4096).unwrap();
    let output = place.as_nobody(&["status", "--control", "control"]).output().unwrap();
    failed(&output, 3);
    // At a disk's socket, too, and whoever comes after them waits for none: each took a second.
    let begun = Instant::now();
    for _ in 0..10 {
        failed(&place.as_nobody(&["status", "--control", "vda.sock"]).output().unwrap(), 3);
    }
    let mut driver = Driver::connect(&place.path("vda.sock"), 1, 1, 4096).unwrap();
    assert_eq!(driver.queues[0].ask(Request::Read(0)), 0);
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
}
