//! `frazil serve`, started, killed, asked.

use std::fs::{File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use control::client::Client;
use frazil_tests::{Driver, Request, kilobytes};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::images::qemu_img;
use crate::ledger::{Clock, Cut};

/// Whatever is asked of the daemon is done within it.
const PATIENCE: Duration = Duration::from_secs(30);

/// How a test wants its disks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// `raw` or `qcow2`.
    pub(crate) format: &'static str,
    /// `writeback` or `none`.
    pub(crate) cache: &'static str,
    pub(crate) disks: usize,
    pub(crate) queues: usize,
    pub(crate) bytes: u64,
}

/// A daemon with new disks in a folder of its own. It is killed when it is dropped.
pub(crate) struct Served {
    wanted: Wanted,
    arguments: Vec<String>,
    child: Option<Child>,
    /// Where front-ends connect, by disk.
    pub(crate) sockets: Vec<PathBuf>,
    folder: tempfile::TempDir,
}

impl Served {
    pub(crate) fn start(wanted: Wanted) -> Self {
        // On a disk where the page cache is passed by. In memory else: much is synced, and disks are slow.
        let memory = Path::new("/dev/shm");
        let on_disk = wanted.cache == "none" || !memory.is_dir();
        let place = if on_disk { Path::new(env!("CARGO_TARGET_TMPDIR")) } else { memory };
        Self::start_in(tempfile::tempdir_in(place).unwrap(), wanted, "")
    }

    /// In this folder, its disks with more `keys`: `,key=value…`.
    pub(crate) fn start_in(folder: tempfile::TempDir, wanted: Wanted, keys: &str) -> Self {
        let bases: Vec<_> =
            (0..wanted.disks).map(|disk| folder.path().join(format!("vd{disk}.{}", wanted.format))).collect();
        for base in &bases {
            let size = wanted.bytes.to_string();
            let made = qemu_img(&["create", "-q", "-f", wanted.format, text(base), &size]);
            assert!(made.status.success(), "{made:?}");
        }
        Self::over(folder, &bases, wanted, keys)
    }

    /// Serves images that are there already, one a disk.
    pub(crate) fn over(folder: tempfile::TempDir, bases: &[PathBuf], wanted: Wanted, keys: &str) -> Self {
        let mut served = Self { wanted, arguments: Vec::new(), child: None, sockets: Vec::new(), folder };
        let (state, control) = (served.path("state"), served.path("control"));
        let words = ["serve", "--state", text(&state), "--control", text(&control), "--freeze", "never"];
        served.arguments.extend(words.map(str::to_owned));
        for (disk, base) in bases.iter().enumerate() {
            let socket = served.path(&format!("vd{disk}.sock"));
            let Wanted { format, cache, queues, .. } = wanted;
            let (path, at) = (base.display(), socket.display());
            let words = format!(
                "id=vd{disk},path={path},format={format},cache={cache},socket={at},queues={queues}{keys}"
            );
            served.arguments.extend(["--disk".to_owned(), words]);
            served.sockets.push(socket);
        }
        served.restart();
        served
    }

    /// A path in its folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The disks' ids.
    pub(crate) fn ids(&self) -> Vec<String> {
        (0..self.wanted.disks).map(|disk| format!("vd{disk}")).collect()
    }

    /// Starts it, with the same command line each time, and waits until it answers.
    pub(crate) fn restart(&mut self) {
        let log = OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        // A limit on the length of files is a failed write to it, not its end: see `full`.
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; exec \"$@\"", "sh"]).arg(program());
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut child = command.spawn().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(self.path("control")).is_err() {
            assert_eq!(child.try_wait().unwrap(), None, "frazil serve has ended");
            assert!(Instant::now() < deadline, "frazil serve does not listen");
            thread::sleep(Duration::from_millis(2));
        }
        self.child = Some(child);
    }

    /// Ends it and starts it with these flags in addition.
    pub(crate) fn restart_with(&mut self, words: &[&str]) {
        self.stop();
        self.arguments.extend(words.iter().map(|word| (*word).to_owned()));
        self.restart();
    }

    /// The process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// The descriptors and threads that it has.
    pub(crate) fn held(&self) -> (usize, usize) {
        let count = |what| std::fs::read_dir(format!("/proc/{}/{what}", self.pid())).unwrap().count();
        (count("fd"), count("task"))
    }

    /// Kilobytes of memory that it has.
    pub(crate) fn memory(&self) -> u64 {
        kilobytes(self.pid(), "VmRSS").unwrap()
    }

    /// Waits until it has no more descriptors and threads than it had: those of clients that are gone go soon after.
    pub(crate) fn lets_go(&self, had: (usize, usize)) {
        let deadline = Instant::now() + PATIENCE;
        while self.held().0 > had.0 || self.held().1 > had.1 {
            assert!(Instant::now() < deadline, "{:?}, and it had {had:?}", self.held());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Asks it to end, and waits until it has, with success.
    pub(crate) fn stop(&mut self) {
        self.qmp().execute("quit", json!({}), |_, _| {}).unwrap();
        self.wait_for_end();
    }

    /// The same by SIGTERM.
    pub(crate) fn terminate(&mut self) {
        kill_process(Pid::from_child(self.child.as_ref().unwrap()), Signal::TERM).unwrap();
        self.wait_for_end();
    }

    fn wait_for_end(&mut self) {
        let mut child = self.child.take().unwrap();
        let status = bounded("the daemon's end", move || child.wait().unwrap());
        assert!(status.success(), "{status}");
    }

    /// A new connection to its control socket.
    pub(crate) fn qmp(&self) -> Client {
        Client::connect(&self.path("control")).unwrap()
    }

    /// One command, which must succeed in bounded time.
    pub(crate) fn ask(&self, command: &str, arguments: Value) -> Value {
        let (mut client, words) = (self.qmp(), command.to_owned());
        let answer = bounded(command, move || client.execute(&words, arguments, |_, _| {}));
        answer.unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// One command, which must be refused; the reason.
    pub(crate) fn refusal(&self, command: &str, arguments: Value) -> String {
        let (mut client, words) = (self.qmp(), command.to_owned());
        let answer = bounded(command, move || client.execute(&words, arguments, |_, _| {}));
        answer.err().unwrap_or_else(|| panic!("{command} was not refused")).to_string()
    }

    /// Takes a snapshot of all disks.
    pub(crate) fn snapshot(&self, name: &str, clock: &Clock) -> Cut {
        let asked = clock.now();
        self.ask("snapshot-create", json!({ "name": name }));
        Cut { name: name.to_owned(), asked, answered: clock.now() }
    }

    /// The names of its snapshots.
    pub(crate) fn names(&self) -> Vec<String> {
        let list = self.ask("query-snapshots", json!({}));
        list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    }

    /// A disk of a snapshot, exported by the daemon: the file.
    pub(crate) fn export_file(&self, name: &str, id: &str) -> PathBuf {
        let target = self.path(&format!("{name}.{id}.export"));
        let arguments = json!({ "name": name, "disk": id, "target": target, "format": "raw" });
        self.ask("snapshot-export", arguments);
        target
    }

    /// The same, its bytes; the file is removed.
    pub(crate) fn export(&self, name: &str, id: &str) -> Vec<u8> {
        let file = self.export_file(name, id);
        let bytes = std::fs::read(&file).unwrap();
        std::fs::remove_file(file).unwrap();
        bytes
    }

    /// All disks of a snapshot.
    pub(crate) fn export_all(&self, name: &str) -> Vec<Vec<u8>> {
        self.ids().iter().map(|id| self.export(name, id)).collect()
    }

    /// What the guest would read of disk `disk` now.
    pub(crate) fn read(&self, disk: usize) -> Vec<u8> {
        const CHUNK: usize = 64 << 10;
        let mut driver = Driver::connect(&self.sockets[disk], 1, 1, CHUNK).unwrap();
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < self.wanted.bytes {
            assert_eq!(driver.queues[0].ask(Request::Read(bytes.len() as u64)), 0);
            bytes.extend(driver.queues[0].bytes(0));
        }
        bytes
    }

    /// The images of a disk as the manifest has them, the base first, each with its format; asks no daemon.
    pub(crate) fn layers(&self, id: &str) -> Vec<(PathBuf, String)> {
        let manifest: Value =
            serde_json::from_reader(File::open(self.path("state/manifest.json")).unwrap()).unwrap();
        let layers = manifest["disks"][id]["layers"].as_array().unwrap().iter();
        let word = |layer: &Value, key: &str| layer[key].as_str().unwrap().to_owned();
        layers.map(|layer| (word(layer, "path").into(), word(layer, "format"))).collect()
    }

    /// `frazil WORDS…`, which goes on.
    pub(crate) fn spawn(&self, words: &[&str]) -> Child {
        let mut command = Command::new(program());
        command.args(words).current_dir(self.folder.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// `frazil WORDS…`, to its end.
    pub(crate) fn command(&self, words: &[&str]) -> Output {
        self.spawn(words).wait_with_output().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            eprintln!(
                "frazil serve, its last words:\n{}",
                lines[lines.len().saturating_sub(30)..].join("\n")
            );
        }
    }
}

/// The program of this build.
pub(crate) fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    // Test programs lie one deeper than programs.
    let path = test.parent().and_then(Path::parent).unwrap().join("frazil");
    assert!(path.is_file(), "{} is not built: run `make test`, or `cargo build` before", path.display());
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs `work` in a thread of its own; fails the test if it does not end.
pub(crate) fn bounded<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, ended) = channel();
    let thread = thread::spawn(move || drop(done.send(work())));
    let result = ended.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{what} does not end"));
    thread.join().unwrap();
    result
}
