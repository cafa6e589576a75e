//! The command line's words, fixed, for others script against them.

mod marks;
mod top;

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};
use clap_complete::Shell;
use snapshot::{FreezeOwner, FreezePolicy, ImageFormat};

use crate::config::{DiskConfig, MetricsAddress, SandboxMode, parse_disk, parse_metrics, word};
use crate::failure::EXIT_CODES;
pub(crate) use marks::{Changes, Checkpoint};
pub(crate) use top::Top;

/// Consistent snapshots for running virtual machines.
#[derive(Debug, Parser)]
#[command(name = "frazil", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve disks to a virtual machine until SIGTERM, SIGINT or `quit`.
    Serve(Serve),
    /// Take, list, export, delete and go back to snapshots.
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Remember instants, to ask later what changed since; list and forget them.
    #[command(subcommand)]
    Checkpoint(Checkpoint),
    /// List what changed on a disk between two instants: checkpoints, snapshots, now.
    Changes(Changes),
    /// Look at the layers of disks, and merge some while the guest runs.
    #[command(subcommand)]
    Chain(Chain),
    /// List, pause, resume, slow down, cancel jobs, and wait for them.
    #[command(subcommand)]
    Job(Job),
    /// Change a disk that is served.
    #[command(subcommand)]
    Disk(Disk),
    /// Watch the daemon's disks live: requests, bytes, latencies, chains and jobs.
    Top(Top),
    /// Show the daemon's disks and what it is doing.
    Status {
        #[command(flatten)]
        daemon: Daemon,
        #[command(flatten)]
        output: Output,
    },
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: Shell,
    },
}

#[derive(Args, Debug)]
#[command(after_help = DISK_KEYS)]
pub(crate) struct Serve {
    /// A TOML file with the same words as keys, instead of all other flags.
    #[arg(long, value_name = "FILE")]
    #[arg(conflicts_with_all = ["state", "control", "agent", "disks", "freeze_owner", "freeze", "pre_sync", "allow_folders",
        "target_folders", "tls_folders", "sandbox", "metrics", "users"])]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) flags: ServeFlags,
}

#[derive(Args, Debug)]
pub(crate) struct ServeFlags {
    /// The state directory, created if it is missing.
    #[arg(long, value_name = "DIR", required_unless_present = "config")]
    pub(crate) state: Option<PathBuf>,
    /// Where to listen for QMP clients and the commands of this program.
    #[arg(long, value_name = "SOCK", required_unless_present = "config")]
    pub(crate) control: Option<PathBuf>,
    /// The guest agent's socket; it need not exist yet.
    #[arg(long, value_name = "SOCK")]
    pub(crate) agent: Option<PathBuf>,
    /// A disk to serve; may be given many times. Its keys are below.
    #[arg(long = "disk", value_name = "KEY=VALUE,…", required_unless_present = "config", value_parser = parse_disk)]
    pub(crate) disks: Vec<DiskConfig>,
    /// Who freezes the guest: Frazil, whoever asks for a snapshot, or nobody.
    #[arg(long, value_name = "WHO", default_value = "frazil", value_parser = word::<FreezeOwner>())]
    pub(crate) freeze_owner: FreezeOwner,
    /// What a snapshot does about the freeze if it does not say.
    #[arg(long, value_name = "POLICY", default_value = "prefer", value_parser = word::<FreezePolicy>())]
    pub(crate) freeze: FreezePolicy,
    /// Let the guest write out its dirty memory before the freeze, where its agent allows that.
    #[arg(long, value_name = "SWITCH", default_value = "on", value_parser = word::<bool>())]
    #[arg(action = ArgAction::Set)]
    pub(crate) pre_sync: bool,
    /// A folder below which base images may name backing files and data files; may be given many times. If absent, only
    /// the image's own folder.
    #[arg(long = "allow-folder", value_name = "DIR")]
    pub(crate) allow_folders: Vec<PathBuf>,
    /// A folder, or a device, that clients may name for backups, exports and NBD sockets, besides the
    /// folders of the images and of the daemon's own sockets; may be given many times.
    #[arg(long = "target-folder", value_name = "DIR")]
    pub(crate) target_folders: Vec<PathBuf>,
    /// A folder of certificates that clients may name for TLS, which the daemon only reads; may be given many times.
    #[arg(long = "tls-folder", value_name = "DIR")]
    pub(crate) tls_folders: Vec<PathBuf>,
    /// Keep the daemon to its folders (Landlock) and to the system calls that it needs (seccomp).
    #[arg(long, value_name = "SWITCH", default_value = "on", value_parser = word::<SandboxMode>())]
    pub(crate) sandbox: SandboxMode,
    /// Serve metrics in the OpenMetrics format for Prometheus at unix:PATH or HOST:PORT.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_metrics)]
    pub(crate) metrics: Option<MetricsAddress>,
    /// The id of a user whose processes may connect to the Unix sockets, which have mode 0600 in any case; may be given
    /// many times. If absent, whoever can open them.
    #[arg(long = "user", value_name = "UID")]
    pub(crate) users: Vec<u32>,
}

const DISK_KEYS: &str = "Keys of --disk, separated by commas; a comma inside a value is written twice:
  id=ID               the disk's name in snapshots and commands
  path=FILE           the base image: a file or a block device
  format=raw|qcow2    its format; never guessed
  socket=SOCK         where the front-end (QEMU) connects
  queues=N            request queues, from 1 to 64; 1 if absent, at least the front-end's num-queues
  serial=S            what the guest sees, at most 20 characters; the id if absent
  readonly=on|off     refuse the guest's writes; off if absent
  cache=writeback|none
                      through the host's page cache (if absent), or past it (O_DIRECT)
  metadata-cache=SIZE memory for what is known of where the disk's bytes are; 64M if absent
  werror=report|enospc|stop
                      the guest's writes that the host can not carry out: fail them; let them wait if there is no room
                      (if absent); let them wait whatever the reason
  max-overlays=N      delete the oldest snapshots when the disk has more overlays; no limit if absent";

#[derive(Debug, Subcommand)]
pub(crate) enum Disk {
    /// Make a disk larger while the guest runs; what is new reads as zeroes.
    Resize {
        /// Which disk.
        id: String,
        /// The new size in bytes, or with a unit: 512M, 20G, 1T.
        #[arg(value_parser = size)]
        size: u64,
        #[command(flatten)]
        daemon: Daemon,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// Take a snapshot of all disks, or of some, at one instant.
    Create {
        #[command(flatten)]
        what: What,
        #[command(flatten)]
        daemon: Daemon,
        #[command(flatten)]
        output: Output,
    },
    /// Freeze the guest and hold its requests until `release` or `abort`, for those who coordinate several hosts.
    Prepare {
        #[command(flatten)]
        what: What,
        /// Undo it all if nobody releases it within this time.
        #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
        lease: Duration,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Make the cut that was prepared, and let the guest go on.
    Release {
        /// The snapshot's name.
        name: String,
        #[command(flatten)]
        daemon: Daemon,
        #[command(flatten)]
        output: Output,
    },
    /// Undo what was prepared, and let the guest go on.
    Abort {
        /// The snapshot's name.
        name: String,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// List the snapshots.
    List {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        output: Output,
    },
    /// Show one snapshot: times, images, and the state of the file systems in it.
    Show {
        /// The snapshot's name.
        name: String,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        output: Output,
    },
    /// Delete a snapshot, whichever it is, while the guest runs; what it sees does not change.
    Delete {
        /// The snapshot's name.
        name: String,
        #[command(flatten)]
        job: JobFlags,
        #[command(flatten)]
        place: Place,
    },
    /// Copy one disk of a snapshot to a new image that stands on its own.
    Export {
        /// The snapshot's name.
        name: String,
        /// Which disk.
        #[arg(long, value_name = "ID")]
        disk: String,
        /// The new image's format.
        #[arg(long, value_name = "FORMAT", value_parser = word::<ImageFormat>(), required_unless_present = "nbd")]
        format: Option<ImageFormat>,
        /// The new image.
        #[arg(required_unless_present = "nbd", requires = "format")]
        out: Option<PathBuf>,
        /// Serve it over NBD instead, until this command is ended: at a socket's path, HOST:PORT, or a socket that the
        /// daemon's service manager has opened for it.
        #[arg(long, value_name = "SOCKET|HOST:PORT|fd:NAME", conflicts_with_all = ["out", "format"])]
        nbd: Option<String>,
        /// With --nbd: let clients write, to an overlay that is thrown away at the end.
        #[arg(long, requires = "nbd")]
        writable: bool,
        /// With --nbd: tell clients what has changed since a checkpoint or an older snapshot (qemu:dirty-bitmap:NAME).
        #[arg(long, value_name = "NAME", requires = "nbd")]
        since: Option<String>,
        #[command(flatten)]
        place: Place,
    },
    /// Go back to a snapshot while no guest is connected; what was written since is lost.
    Revert {
        /// The snapshot's name.
        name: String,
        /// Lose the snapshots taken since, too.
        #[arg(long)]
        discard_newer: bool,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Chain {
    /// List the layers of all disks, the active one of each first.
    List {
        #[command(flatten)]
        daemon: Daemon,
        #[command(flatten)]
        output: Output,
    },
    /// Merge layers down into the one beneath them. The layers that vanish must hold no snapshot, but for the topmost:
    /// its snapshot is then held by the base.
    Commit {
        /// The disk's id.
        disk: String,
        /// The layer to merge into, a file or a node name; the one beneath all others if absent.
        #[arg(long, value_name = "LAYER")]
        base: Option<String>,
        /// The newest layer to merge; the active one if absent.
        #[arg(long, value_name = "LAYER")]
        top: Option<String>,
        #[command(flatten)]
        job: JobFlags,
        #[command(flatten)]
        place: Place,
    },
    /// Pull layers up into the one above them. The layers that vanish must hold no snapshot.
    Stream {
        /// The disk's id, for its active layer, or the node name of another layer.
        layer: String,
        /// The newest layer that stays beneath, a file or a node name; none if absent.
        #[arg(long, value_name = "LAYER")]
        base: Option<String>,
        #[command(flatten)]
        job: JobFlags,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Job {
    /// List the jobs.
    List {
        #[command(flatten)]
        daemon: Daemon,
        #[command(flatten)]
        output: Output,
    },
    /// Have a job rest.
    Pause {
        /// The job's id.
        id: String,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Have a paused job go on.
    Resume {
        /// The job's id.
        id: String,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Limit how fast a job copies.
    Speed {
        /// The job's id.
        id: String,
        /// Bytes a second, with K, M or G if need be; 0 for no limit.
        #[arg(value_parser = size)]
        speed: u64,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Call a job off; its disks read as before.
    Cancel {
        /// The job's id.
        id: String,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Wait until a job is over.
    Wait {
        /// The job's id.
        id: String,
        #[command(flatten)]
        daemon: Daemon,
    },
}

/// How a job is to run.
#[derive(Args, Clone, Debug)]
pub(crate) struct JobFlags {
    /// The job's id; one that says what it does if absent.
    #[arg(long, value_name = "ID")]
    pub(crate) job_id: Option<String>,
    /// Bytes a second to copy at most, with K, M or G if need be; 0 for no limit.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    pub(crate) speed: u64,
    /// Only begin it: print its id and leave. `frazil job` tells of it from then on.
    #[arg(long, conflicts_with = "state")]
    pub(crate) no_wait: bool,
}

/// What to take a snapshot of.
#[derive(Args, Debug)]
pub(crate) struct What {
    /// A new name: letters, digits, `-`, `_` and `.`, at most 64.
    pub(crate) name: String,
    /// Only these disks, separated by commas; all if absent.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub(crate) disks: Option<Vec<String>>,
    /// What to do about the freeze; the daemon's own policy if absent.
    #[arg(long, value_name = "POLICY", value_parser = word::<FreezePolicy>())]
    pub(crate) freeze: Option<FreezePolicy>,
}

/// A running daemon.
#[derive(Args, Debug)]
pub(crate) struct Daemon {
    /// The daemon's control socket [default: $FRAZIL_CONTROL, else /run/frazil/control.sock for root and
    /// $XDG_RUNTIME_DIR/frazil.sock for others]
    #[arg(long, value_name = "SOCK")]
    pub(crate) control: Option<PathBuf>,
}

/// A running daemon, or the state directory of one that does not run.
#[derive(Args, Debug)]
pub(crate) struct Place {
    #[command(flatten)]
    pub(crate) daemon: Daemon,
    /// The state directory of a daemon that does not run, instead of --control.
    #[arg(long, value_name = "DIR", conflicts_with = "control")]
    pub(crate) state: Option<PathBuf>,
    /// With --state: a folder below which base images may name files, as the daemon has it.
    #[arg(long = "allow-folder", value_name = "DIR", requires = "state")]
    pub(crate) allow_folders: Vec<PathBuf>,
}

/// For people or for programs.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Output {
    /// Print JSON, and nothing else, to standard output.
    #[arg(long)]
    pub(crate) json: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let most = snapshot::MAX_LEASE.as_secs();
    let seconds = text.parse().ok().filter(|seconds| (1..=most).contains(seconds));
    seconds.map(Duration::from_secs).ok_or_else(|| format!("a lease is a number of seconds from 1 to {most}"))
}

/// Bytes, with a binary unit perhaps.
fn size(text: &str) -> Result<u64, String> {
    let units = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
    let unit = units.iter().find(|(letter, _)| text.to_ascii_uppercase().ends_with(*letter));
    let (digits, shift) = unit.map_or((text, 0), |(_, shift)| (&text[..text.len() - 1], *shift));
    let bytes = digits.parse().ok().and_then(|count: u64| count.checked_mul(1 << shift));
    bytes
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or_else(|| "expected a number of bytes, such as 65536, 512K or 20M".to_owned())
}

#[cfg(test)]
mod tests;
