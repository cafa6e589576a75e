use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::process::tail;
use crate::{Error, Image, Process, Qmp, Result, Scratch, eventually};
use control::Control;

mod control;
mod hardware;
mod work;

pub use hardware::{Driver, Hardware};
pub use work::{FileSystem, Kind, Progress};

/// An emulated machine on a busy host is slow, so waits are long; they matter only when something is wrong.
const BOOT: Duration = Duration::from_secs(90);
/// The limit of [`Guest::move_to`].
const MOVE: Duration = Duration::from_secs(180);
/// The limit of [`Guest::run`].
const COMMAND: Duration = Duration::from_secs(60);

/// A disk of a guest; the first is `vda`.
#[derive(Clone, Debug)]
enum Disk {
    /// Served by a vhost-user-blk back-end.
    VhostUser { socket: PathBuf },
    /// An image that QEMU opens itself.
    Image { path: PathBuf, format: &'static str },
}

/// What a guest is made of, before it boots.
#[derive(Debug)]
pub struct Builder<'a> {
    scratch: &'a Scratch,
    name: &'a str,
    disks: Vec<Disk>,
    hardware: Hardware,
    incoming: Option<PathBuf>,
}

impl Builder<'_> {
    /// Adds a disk that a vhost-user-blk back-end serves.
    #[must_use]
    pub fn vhost_user_disk(mut self, socket: impl Into<PathBuf>) -> Self {
        self.disks.push(Disk::VhostUser { socket: socket.into() });
        self
    }

    /// Another machine than the default one.
    #[must_use]
    pub fn hardware(mut self, hardware: Hardware) -> Self {
        self.hardware = hardware;
        self
    }

    /// Adds a disk whose image QEMU opens itself; `format` is `raw` or `qcow2`.
    #[must_use]
    pub fn image_disk(mut self, path: impl Into<PathBuf>, format: &'static str) -> Self {
        self.disks.push(Disk::Image { path: path.into(), format });
        self
    }

    /// Has QEMU wait for another one's guest, at this socket: [`Guest::move_to`].
    #[must_use]
    pub fn incoming(mut self, socket: impl Into<PathBuf>) -> Self {
        self.incoming = Some(socket.into());
        self
    }

    /// Starts QEMU and waits until the guest takes commands, or until QEMU waits for it.
    ///
    /// # Errors
    /// With the end of the guest's console and of QEMU's log.
    pub fn boot(self) -> Result<Guest> {
        let image = Image::get()?;
        let path = |end: &str| self.scratch.path(&format!("{}.{end}", self.name));
        let (console, control, qmp) = (path("console"), path("control"), path("qmp"));
        let arguments = self.arguments(&image, &console, &control, &qmp);
        let mut qemu = Process::spawn(Path::new("qemu-system-x86_64"), arguments, path("qemu.log"))?;

        let connected = eventually("QEMU's sockets", BOOT, || {
            qemu.check_alive()?;
            Ok(UnixStream::connect(&control).ok())
        })?;
        let mut control = Control::new(connected);
        let ready = match &self.incoming {
            Some(socket) => {
                eventually("QEMU to wait for a guest", BOOT, || Ok(socket.exists().then_some(())))
            }
            None => control.wait_until_ready(BOOT),
        };
        if let Err(error) = ready {
            return Err(error.with("console", &tail(&console)).with("QEMU", &qemu.log_tail()));
        }
        Ok(Guest { qemu, control, console, qmp, agent: path("agent") })
    }

    fn arguments(&self, image: &Image, console: &Path, control: &Path, qmp: &Path) -> Vec<String> {
        let hardware = &self.hardware;
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        for accelerator in accelerators() {
            add("-accel", (*accelerator).to_owned());
        }
        add("-machine", "q35,memory-backend=memory".to_owned());
        // A back-end maps the guest's memory, so it is shared. `max` has RDRAND: mkfs need not wait for entropy.
        add("-object", format!("memory-backend-memfd,id=memory,size={}M,share=on", hardware.memory_mib));
        add("-m", hardware.memory());
        add("-cpu", "max".to_owned());
        // An emulated guest of two processors at times loses a timer of the second one, and hangs, when the host is busy.
        add("-smp", "1".to_owned());
        add("-kernel", image.kernel.display().to_string());
        add("-initrd", image.initramfs.display().to_string());
        add("-append", "console=ttyS0 loglevel=4 panic=-1".to_owned());
        add("-display", "none".to_owned());
        add("-serial", format!("file:{}", console.display()));
        add("-qmp", format!("unix:{},server=on,wait=off", qmp.display()));
        add("-device", "virtio-serial-pci".to_owned());
        let agent = self.scratch.path(&format!("{}.agent", self.name));
        for (id, port, socket) in
            [("control", "frazil.control", control), ("agent", "org.qemu.guest_agent.0", agent.as_path())]
        {
            add("-chardev", format!("socket,id={id},path={},server=on,wait=off", socket.display()));
            add("-device", format!("virtserialport,chardev={id},name={port}"));
        }
        for (index, disk) in self.disks.iter().enumerate() {
            match disk {
                Disk::VhostUser { socket } => {
                    // Without reconnecting, the disk would hang for ever when the back-end restarts.
                    add(
                        "-chardev",
                        format!("socket,id=disk{index},path={},reconnect-ms=100", socket.display()),
                    );
                    let rings = hardware.rings();
                    add("-device", format!("vhost-user-blk-pci,chardev=disk{index},{rings}"));
                }
                Disk::Image { path, format } => {
                    add(
                        "-blockdev",
                        format!(
                            "{format},node-name=disk{index},file.driver=file,file.filename={}",
                            path.display()
                        ),
                    );
                    add("-device", format!("virtio-blk-pci,drive=disk{index}"));
                }
            }
        }
        arguments.extend(["-nodefaults", "-no-user-config"].map(String::from));
        if let Some(socket) = &self.incoming {
            arguments.extend(["-incoming".to_owned(), format!("unix:{}", socket.display())]);
        }
        if !hardware.resets {
            arguments.push("-no-reboot".to_owned());
        }
        arguments
    }
}

/// A running guest. It ends when it is dropped, as by a power cut.
#[derive(Debug)]
pub struct Guest {
    qemu: Process,
    control: Control,
    console: PathBuf,
    qmp: PathBuf,
    agent: PathBuf,
}

impl Guest {
    /// How many queues each disk offers: more than the guest's processors, so one stays unused, as in life.
    pub const QUEUES: u16 = 2;

    /// A guest named `name`; its sockets and logs go to `scratch` under that name.
    pub fn builder<'a>(scratch: &'a Scratch, name: &'a str) -> Builder<'a> {
        Builder { scratch, name, disks: Vec::new(), hardware: Hardware::default(), incoming: None }
    }

    /// Where a guest of that name has its agent's socket, so that a daemon can be told before the guest boots.
    pub fn agent_socket(scratch: &Scratch, name: &str) -> PathBuf {
        scratch.path(&format!("{name}.agent"))
    }

    /// Runs a line of shell in the guest and gives its output; an error unless it exits with 0.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.run_for(command, COMMAND)
    }

    /// As [`Guest::run`], with a limit of its own.
    ///
    /// A command that writes to a frozen file system holds the guest's shell until the thaw.
    pub fn run_for(&mut self, command: &str, limit: Duration) -> Result<String> {
        let (output, status) = self.try_run(command, limit)?;
        if status == 0 {
            return Ok(output);
        }
        Err(Error::new(format!("in the guest: {command}: exit status {status}")).with("output", &output))
    }

    /// Runs a line of shell in the guest and gives its output and exit status.
    pub fn try_run(&mut self, command: &str, limit: Duration) -> Result<(String, i32)> {
        self.control.run(command, limit).map_err(|error| error.with("console", &tail(&self.console)))
    }

    /// A new connection to QEMU's own monitor.
    pub fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp)
    }

    /// Moves the guest to the QEMU that waits for it at `socket`, while it runs. This one is left without a guest.
    pub fn move_to(&mut self, socket: &Path) -> Result<()> {
        let mut monitor = self.monitor()?;
        // An emulated guest makes pages dirty slowly, and a busy host sends them slowly.
        monitor
            .execute("migrate-set-parameters", json!({"downtime-limit": 2000, "max-bandwidth": 1 << 30}))?;
        monitor.execute("migrate", json!({"uri": format!("unix:{}", socket.display())}))?;
        eventually("the guest's move", MOVE, || {
            let state = monitor.execute("query-migrate", json!({}))?;
            match state.get("status").and_then(Value::as_str) {
                Some("completed") => Ok(Some(())),
                Some("failed" | "cancelled") => Err(Error::new(format!("the guest's move: {state}"))),
                _ => Ok(None),
            }
        })
        .map_err(|error| error.with("QEMU", &self.qemu.log_tail()))
    }

    /// The socket of the guest's agent.
    pub fn agent(&self) -> &Path {
        &self.agent
    }

    /// Syncs and unmounts everything, and waits until QEMU has ended.
    pub fn shut_down(mut self) -> Result<()> {
        self.run("killall guest-workload qemu-ga 2>/dev/null; umount -a -t ext4,xfs,btrfs,vfat; sync")?;
        // QEMU may close the connection before it answers.
        let _ = self.monitor()?.execute("quit", json!({}));
        self.qemu.wait_for_exit(Duration::from_secs(30)).map(drop)
    }
}

/// KVM where the processor has it and its device opens; QEMU goes on to the next if it does not work after all. There
/// are machines with a `/dev/kvm` on which an ordinary kernel fails: those whose processor shows no such extension.
fn accelerators() -> &'static [&'static str] {
    let extensions = std::fs::read_to_string("/proc/cpuinfo")
        .is_ok_and(|text| text.split_whitespace().any(|word| word == "vmx" || word == "svm"));
    let device = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if extensions && device { &["kvm", "tcg"] } else { &["tcg"] }
}
