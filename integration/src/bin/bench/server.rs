//! A disk that is served by either program and steered by QMP: the same commands, so that both do the same work.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use frazil_integration::{Context, Error, Process, Qmp, Result, Scratch, eventually, program};
use serde_json::{Value, json};

/// The node of the disk.
pub(crate) const DISK: &str = "vda";

/// For a job.
const PATIENCE: Duration = Duration::from_secs(300);

/// Frazil or qemu-storage-daemon with one disk, which is served over vhost-user-blk too. It is killed when it is dropped.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    process: Process,
    qmp: Qmp,
    /// Where a guest connects.
    pub(crate) socket: PathBuf,
    /// Where clients of NBD connect.
    nbd: PathBuf,
}

/// What something took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) seconds: f64,
    /// Of the processor, by all threads of the server.
    pub(crate) cpu: f64,
    /// MiB of memory at its peak beyond what was taken before.
    pub(crate) mib: f64,
}

/// The paths of a server, which begin with its name.
struct Paths<'a> {
    scratch: &'a Scratch,
    name: &'a str,
}

impl Paths<'_> {
    fn of(&self, what: &str) -> PathBuf {
        self.scratch.path(&format!("{}.{what}", self.name))
    }
}

impl Server {
    /// Frazil; `name` is that of its files.
    pub(crate) fn frazil(scratch: &Scratch, name: &str, image: &Path) -> Result<Self> {
        let paths = Paths { scratch, name };
        let (state, control, socket) = (paths.of("state"), paths.of("control"), paths.of("sock"));
        let format = if image.extension().is_some_and(|end| end == "raw") { "raw" } else { "qcow2" };
        let disk = format!("id={DISK},path={},format={format},socket={}", image.display(), socket.display());
        let [state, control_at] = [&state, &control].map(|path| path.display().to_string());
        let words = ["serve", "--freeze", "never", "--freeze-owner", "none", "--disk", &disk];
        let words = words.into_iter().chain(["--state", &state, "--control", &control_at]);
        let process = Process::spawn(&program("frazil")?, words, paths.of("log"))?;
        Self::connect("frazil", process, &paths, &control)
    }

    /// qemu-storage-daemon over these images, the raw base first, each over the one before it. Through the page cache, as
    /// Frazil. Without an iothread, for with one 10.0.2 ends at the beginning of a backup (`bdrv_insert_node: Assertion`). A
    /// chain is not written.
    pub(crate) fn peer(scratch: &Scratch, name: &str, images: &[PathBuf]) -> Result<Self> {
        let paths = Paths { scratch, name };
        let (control, socket) = (paths.of("control"), paths.of("sock"));
        let mut words: Vec<String> = Vec::new();
        let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
        let writable = images.len() == 1;
        let more = if writable { "" } else { ",read-only=on,locking=off" };
        for (index, path) in images.iter().enumerate() {
            let node = if index + 1 == images.len() { DISK.to_owned() } else { format!("node-{index}") };
            let how = match index.checked_sub(1) {
                None => "driver=raw".to_owned(),
                Some(beneath) => format!("driver=qcow2,backing=node-{beneath}"),
            };
            let (path, file) = (path.display(), format!("file-{index}"));
            add("--blockdev", format!("driver=file,node-name={file},filename={path},aio=io_uring{more}"));
            let read_only = if writable { "" } else { ",read-only=on" };
            add("--blockdev", format!("{how},node-name={node},file={file}{read_only}"));
        }
        let (at, on) = (socket.display(), if writable { "on" } else { "off" });
        let kind = format!("type=vhost-user-blk,id=guest,node-name={DISK},writable={on}");
        add("--export", format!("{kind},addr.type=unix,addr.path={at}"));
        add("--chardev", format!("socket,id=control,path={},server=on,wait=off", control.display()));
        add("--monitor", "chardev=control".to_owned());
        let process = Process::spawn(Path::new("qemu-storage-daemon"), words, paths.of("log"))?;
        Self::connect("qemu-storage-daemon", process, &paths, &control)
    }

    fn connect(name: &'static str, mut process: Process, paths: &Paths<'_>, control: &Path) -> Result<Self> {
        let qmp = eventually(name, Duration::from_secs(60), || {
            process.check_alive()?;
            Ok(Qmp::connect(control).ok())
        })?;
        Ok(Self { name, process, qmp, socket: paths.of("sock"), nbd: paths.of("nbd") })
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp.execute(command, arguments).context(self.name)
    }

    /// Opens an image to be written by a backup.
    pub(crate) fn add_target(&mut self, path: &Path, format: &str) -> Result<()> {
        let file = json!({ "driver": "file", "filename": path, "aio": "io_uring" });
        self.execute("blockdev-add", json!({ "driver": format, "node-name": "target", "file": file }))
            .map(drop)
    }

    pub(crate) fn remove_target(&mut self) -> Result<()> {
        self.execute("blockdev-del", json!({ "node-name": "target" })).map(drop)
    }

    /// Begins a backup of the disk to the target; `more` are members of `blockdev-backup`.
    pub(crate) fn begin_backup(&mut self, more: &Value) -> Result<()> {
        let mut asked = json!({ "job-id": "backup", "device": DISK, "target": "target" });
        if let (Some(asked), Some(more)) = (asked.as_object_mut(), more.as_object()) {
            asked.extend(more.clone());
        }
        self.execute("blockdev-backup", asked).map(drop)
    }

    /// Backs the disk up, and measures it from the command to the event that tells the end.
    pub(crate) fn back_up(&mut self, more: &Value) -> Result<Taken> {
        let before = self.usage()?;
        self.begin_backup(more)?;
        let event = self.qmp.wait_for_event("BLOCK_JOB_COMPLETED", PATIENCE).context(self.name)?;
        let taken = self.taken(&before)?;
        match event.pointer("/data/error") {
            None => Ok(taken),
            Some(error) => Err(Error::new(format!("{}: {error}", self.name))),
        }
    }

    /// Calls the backup off.
    pub(crate) fn cancel_backup(&mut self) -> Result<()> {
        self.execute("block-job-cancel", json!({ "device": "backup", "force": true }))?;
        self.qmp.wait_for_event("BLOCK_JOB_CANCELLED", PATIENCE).context(self.name).map(drop)
    }

    /// Offers the disk over NBD to whoever `body` runs, who is given the address; what that took.
    pub(crate) fn export(&mut self, body: impl FnOnce(&str) -> Result<()>) -> Result<Taken> {
        let addr = json!({ "type": "unix", "data": { "path": self.nbd } });
        self.execute("nbd-server-start", json!({ "addr": addr }))?;
        let export = json!({ "type": "nbd", "id": "copy", "node-name": DISK, "name": DISK });
        self.execute("block-export-add", export)?;
        let before = self.usage()?;
        body(&format!("nbd+unix:///{DISK}?socket={}", self.nbd.display()))?;
        let taken = self.taken(&before)?;
        self.execute("nbd-server-stop", json!({}))?;
        Ok(taken)
    }

    fn usage(&self) -> Result<Usage> {
        // "5" makes what is taken now the peak: proc_pid_clear_refs(5).
        std::fs::write(format!("/proc/{}/clear_refs", self.id()), "5").context("the peak of memory")?;
        Ok(Usage { at: Instant::now(), cpu: self.cpu()?, mib: self.peak()? })
    }

    fn taken(&self, before: &Usage) -> Result<Taken> {
        let seconds = before.at.elapsed().as_secs_f64();
        Ok(Taken { seconds, cpu: self.cpu()? - before.cpu, mib: self.peak()? - before.mib })
    }

    /// Seconds of the processor so far: of threads that have ended too, which `schedstat` does not tell.
    fn cpu(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        // Behind the name, which may hold anything, come `utime` and `stime` as the twelfth and the next.
        let words = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
        let ticks: u64 = words.filter_map(|word| word.parse::<u64>().ok()).sum();
        Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    fn peak(&self) -> Result<f64> {
        crate::chains::memory(&self.process, "VmHWM:")
    }
}

struct Usage {
    at: Instant,
    cpu: f64,
    mib: f64,
}
