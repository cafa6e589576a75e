use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::process::output_of;
use crate::{Builder, Context, Error, Guest, Process, Qmp, Result, Scratch, eventually, program};

/// What `snapshot create --json` prints, as a script would read it.
#[derive(Clone, Debug, Deserialize)]
pub struct Snapshot {
    /// The snapshot's name.
    pub name: String,
    /// `filesystem` or `crash`.
    pub grade: String,
    /// Why it has that grade.
    pub reason: String,
    /// Milliseconds by step.
    pub timing: BTreeMap<String, f64>,
    /// The images that hold the frozen state.
    pub disks: Vec<SnapshotDisk>,
}

/// One disk's share of a [`Snapshot`].
#[derive(Clone, Debug, Deserialize)]
pub struct SnapshotDisk {
    /// The disk's id.
    pub id: String,
    /// The image.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
}

/// A disk of a snapshot that is served over NBD until this is dropped.
#[derive(Debug)]
pub struct Served {
    /// For clients.
    pub uri: String,
    _command: Process,
}

/// `frazil serve`, with raw disks in a scratch folder. It is killed when it is dropped.
#[derive(Debug)]
pub struct Daemon {
    arguments: Vec<String>,
    control: PathBuf,
    log: PathBuf,
    /// Where the guest connects, a disk each.
    sockets: Vec<PathBuf>,
    folder: PathBuf,
    process: Process,
}

impl Daemon {
    /// The size of each disk: mkfs.xfs wants 300 MiB.
    pub const DISK_BYTES: u64 = 384 << 20;
    /// For one command of `frazil`.
    const COMMAND: &str = "120";

    /// Serves one new disk for each of `ids`, freezing the guest of that name (see [`Guest::builder`]).
    pub fn start(scratch: &Scratch, guest: &str, ids: &[&str]) -> Result<Self> {
        Self::start_with(scratch, guest, ids, &[])
    }

    /// As [`Daemon::start`], with more words on the command line.
    pub fn start_with(scratch: &Scratch, guest: &str, ids: &[&str], words: &[&str]) -> Result<Self> {
        let (state, control, log) =
            (scratch.path("state"), scratch.path("frazil.control"), scratch.path("frazil.log"));
        let mut arguments: Vec<String> = vec!["serve".into()];
        arguments.extend(words.iter().map(ToString::to_string));
        let agent = Guest::agent_socket(scratch, guest);
        for (option, path) in [("--state", &state), ("--control", &control), ("--agent", &agent)] {
            arguments.extend([option.to_owned(), path.display().to_string()]);
        }
        let mut sockets = Vec::new();
        for id in ids {
            let image = scratch.sparse_file(&format!("{id}.raw"), Self::DISK_BYTES)?;
            let socket = scratch.path(&format!("{id}.sock"));
            let queues = Guest::QUEUES;
            let (path, at) = (image.display(), socket.display());
            arguments.push("--disk".into());
            arguments.push(format!("id={id},path={path},format=raw,socket={at},queues={queues},serial={id}"));
            sockets.push(socket);
        }
        let process = Self::spawn(&arguments, &control, &log)?;
        Ok(Self { arguments, control, log, sockets, folder: scratch.path(""), process })
    }

    fn spawn(arguments: &[String], control: &Path, log: &Path) -> Result<Process> {
        let mut process = Process::spawn(&program("frazil")?, arguments, log.to_path_buf())?;
        eventually("the daemon's control socket", Duration::from_secs(20), || {
            process.check_alive()?;
            Ok(UnixStream::connect(control).ok())
        })?;
        Ok(process)
    }

    /// Gives a guest all disks of this daemon, in the order of their ids here.
    pub fn attach<'a>(&self, guest: Builder<'a>) -> Builder<'a> {
        self.sockets.iter().fold(guest, |guest, socket| guest.vhost_user_disk(socket))
    }

    /// Where the front-ends of its disks connect, in the order of their ids.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// `kill -9`, as when the kernel runs out of memory.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it again with the same command line, after [`Daemon::kill`].
    pub fn restart(&mut self) -> Result<()> {
        self.process = Self::spawn(&self.arguments, &self.control, &self.log)?;
        Ok(())
    }

    /// Asks it to end, and waits until it has, with success.
    pub fn stop(&mut self) -> Result<()> {
        self.process.terminate()?;
        let status = self.process.wait_for_exit(Duration::from_secs(30))?;
        if status.success() {
            Ok(())
        } else {
            Err(Error::new(format!("frazil serve: {status}")).with("log", &self.log_tail()))
        }
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }

    /// `frazil WORDS… --control SOCK`, to its end; gives what it prints.
    pub fn command(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new("timeout");
        command.arg(Self::COMMAND).arg(program("frazil")?).args(words).arg("--control").arg(&self.control);
        let output = output_of(&mut command).map_err(|error| error.with("daemon", &self.log_tail()))?;
        String::from_utf8(output).context("output of frazil")
    }

    /// Takes a snapshot of all disks; `freeze` is `require`, `prefer` or `never`.
    pub fn snapshot(&self, name: &str, freeze: &str) -> Result<Snapshot> {
        let text = self.command(&["snapshot", "create", name, "--freeze", freeze, "--json"])?;
        serde_json::from_str(&text).context(format!("snapshot create --json: {text}"))
    }

    /// Freezes the guest and holds its requests; undone by itself after `lease` seconds.
    pub fn prepare(&self, name: &str, lease: u32) -> Result<()> {
        let lease = lease.to_string();
        self.command(&["snapshot", "prepare", name, "--freeze", "require", "--lease", &lease]).map(drop)
    }

    /// Makes the cut that was prepared.
    pub fn release(&self, name: &str) -> Result<Snapshot> {
        let text = self.command(&["snapshot", "release", name, "--json"])?;
        serde_json::from_str(&text).context(format!("snapshot release --json: {text}"))
    }

    /// `snapshot show NAME --json`.
    pub fn show(&self, name: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.command(&["snapshot", "show", name, "--json"])?)?)
    }

    /// Exports a disk of a snapshot to a raw file of its own.
    pub fn export(&self, name: &str, disk: &str) -> Result<PathBuf> {
        let out = self.folder.join(format!("{name}-{disk}.export"));
        let path = out.display().to_string();
        self.command(&["snapshot", "export", name, "--disk", disk, "--format", "raw", &path])?;
        Ok(out)
    }

    /// Serves a disk of a snapshot over NBD, as `snapshot export --nbd` does; `since` is for the bitmap of that name.
    pub fn serve(&self, name: &str, disk: &str, since: Option<&str>) -> Result<Served> {
        let socket = self.folder.join(format!("{name}-{disk}.nbd"));
        let (at, control) = (socket.display().to_string(), self.control.display().to_string());
        let mut words = vec!["snapshot", "export", name, "--disk", disk, "--nbd", &at, "--control", &control];
        words.extend(since.iter().flat_map(|since| ["--since", since]));
        let log = self.folder.join(format!("{name}-{disk}.log"));
        let mut command = Process::spawn(&program("frazil")?, words, log)?;
        eventually("the NBD socket", Duration::from_secs(20), || {
            command.check_alive()?;
            Ok(UnixStream::connect(&socket).ok())
        })?;
        Ok(Served { uri: format!("nbd+unix:///?socket={at}"), _command: command })
    }

    /// A new connection to its control socket.
    pub fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.control)
    }
}
