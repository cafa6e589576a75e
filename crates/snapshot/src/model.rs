//! What a snapshot is, as it is recorded, reported and sent as an event.

use std::path::PathBuf;
use std::time::Duration;

use block::{IoStatus, WriteErrors};
use hostio::Cache;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::jobs::{ClientId, JobEnd, JobStatus, JobType};

/// How sure it is that the guest's file systems are clean in the snapshot.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grade {
    /// Every mounted, writable file system on our disks was frozen, and stayed so until after the cut.
    Filesystem,
    /// As after a loss of power at the instant of the cut; file systems replay their journals.
    Crash,
}

/// What to do about the guest agent.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FreezePolicy {
    /// No snapshot without a freeze of grade `filesystem`.
    Require,
    /// Freeze if it can be had, else take a snapshot of grade `crash` and say why.
    #[default]
    Prefer,
    /// Do not ask the agent.
    Never,
}

/// Who freezes the guest.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FreezeOwner {
    /// Frazil, through the agent's socket.
    #[default]
    Frazil,
    /// The caller has frozen the guest by other means (libvirt) before it asks, and thaws it after.
    External,
    /// Nobody.
    None,
}

/// The measured time of each step of a cut, in milliseconds; a step that did not take place is absent.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Timing {
    /// Overlays created and synced, manifest written. The guest runs.
    pub prepare: f64,
    /// The guest's dirty memory written out ahead of the freeze. The guest runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_sync: Option<f64>,
    /// From the freeze command to its reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<f64>,
    /// Closing the gates of all disks of the group.
    pub gate: f64,
    /// Waiting for the requests in flight.
    pub drain: f64,
    /// The switch to the overlays.
    pub pivot: f64,
    /// Opening the gates.
    pub open: f64,
    /// From the thaw command to its confirmation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thaw: Option<f64>,
    /// Syncing the old layers. The guest runs.
    pub seal: f64,
    /// How long no request was taken: from the closing of the first gate to the opening of the last.
    pub gate_closed: f64,
    /// How long the guest's file systems were frozen: from the freeze command to the confirmation of the thaw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<f64>,
    /// The longest time a request waited before a gate because of this cut.
    pub longest_wait: f64,
}

/// A [`Duration`] as [`Timing`] counts. One division, so that it prints with the digits that were measured and no more
/// (0.000652, not 0.0006519999999999999).
pub fn millis(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1e6
}

/// One disk's share of a snapshot: the image that now holds the frozen state.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotDisk {
    /// The disk's id, as given to `--disk`.
    pub id: String,
    /// The image; with what it names as its backing file it holds the whole state.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: ImageFormat,
}

/// The format of an image, always stated, never probed.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The bytes as they are.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// A snapshot, as recorded.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotRecord {
    /// Its name, unique among the daemon's snapshots.
    pub name: String,
    /// When the cut was made, on the host's clock.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// How clean the file systems are.
    pub grade: Grade,
    /// Why it has that grade, in words.
    pub reason: String,
    /// File systems that the agent said it froze; absent if it was not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_count: Option<u64>,
    /// File systems that the agent said it thawed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thawed_count: Option<u64>,
    /// The measured time of each step.
    pub timing: Timing,
    /// Whether the old layers are synced: until then a loss of the host's power may lose the snapshot.
    pub sealed: bool,
    /// The images that hold the frozen state, one a disk.
    pub disks: Vec<SnapshotDisk>,
}

/// The steps of a cut, in order (design: PREPARE, pre-sync, FREEZE, GATE, DRAIN, PIVOT, OPEN, THAW, SEAL).
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Overlays and manifest.
    Prepare,
    /// The guest writes out its dirty memory.
    PreSync,
    /// The guest's file systems stop.
    Freeze,
    /// No request is taken any more.
    Gate,
    /// The requests in flight end.
    Drain,
    /// The overlays become active.
    Pivot,
    /// Requests are taken again.
    Open,
    /// The guest's file systems go on.
    Thaw,
    /// The old layers are synced.
    Seal,
}

/// What a request was to do: QEMU's `IoOperationType`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoOperation {
    /// Read.
    Read,
    /// Change the disk, or flush.
    Write,
}

/// What became of I/O that failed: QEMU's `BlockErrorAction`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorAction {
    /// A job goes on without it.
    Ignore,
    /// The guest was told; a job fails.
    Report,
    /// A guest's request waits until the host can carry it out: QEMU stops the machine meanwhile, here the guest runs on. A
    /// job is paused.
    Stop,
}

/// What happened; the control server sends each as a QMP event, named in the comment, with these fields as data.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case", untagged)]
pub enum Event {
    /// `FRAZIL_SNAPSHOT_STEP`: a step of a cut has ended.
    Step {
        /// The snapshot's name.
        name: String,
        /// Which step.
        step: Step,
        /// How long it took, in milliseconds.
        milliseconds: f64,
    },
    /// `FRAZIL_SNAPSHOT_CREATED`: the snapshot stands, though it may not be sealed yet.
    Created {
        /// The snapshot.
        snapshot: Box<SnapshotRecord>,
    },
    /// `FRAZIL_SNAPSHOT_SEALED`: it is on stable storage.
    Sealed {
        /// The snapshot's name.
        name: String,
    },
    /// `FRAZIL_SNAPSHOT_FAILED`: it was undone.
    Failed {
        /// The snapshot's name.
        name: String,
        /// The step that failed.
        step: Step,
        /// Why.
        reason: String,
    },
    /// `FRAZIL_STALL`: a step takes, or a request waited, longer than it should.
    Stall {
        /// The snapshot's name.
        name: String,
        /// Which step.
        step: Step,
        /// How long so far, in milliseconds.
        milliseconds: f64,
    },
    /// `FRAZIL_THAW_OWED`: a guest may be frozen and has not confirmed a thaw; Frazil keeps trying.
    ThawOwed {
        /// How many tries have failed.
        tries: u64,
        /// Why the last one failed.
        reason: String,
    },
    /// `FRAZIL_THAW_CONFIRMED`: what was owed is paid.
    ThawConfirmed {
        /// How many file systems the agent says it thawed.
        count: u64,
    },
    /// `BLOCK_IO_ERROR`, QEMU's: the host could not carry out a guest's request.
    IoError {
        /// The disk's id.
        device: String,
        /// What the guest asked for.
        operation: IoOperation,
        /// What became of it.
        action: ErrorAction,
        /// Whether for want of room.
        nospace: bool,
        /// Why, in words.
        reason: String,
    },
    /// `FRAZIL_SPACE_LOW`: little room is left where layers grow.
    SpaceLow {
        /// The folder.
        path: PathBuf,
        /// Bytes left.
        free: u64,
    },
    /// `JOB_STATUS_CHANGE`, QEMU's own: a job has another status.
    Job {
        /// The job's id.
        id: String,
        /// Its status.
        status: JobStatus,
    },
    /// `BLOCK_JOB_COMPLETED`, QEMU's: a job that a client began has ended, well or not.
    JobCompleted {
        /// How.
        #[serde(flatten)]
        end: Box<JobEnd>,
        /// Who began it.
        #[serde(skip)]
        client: Option<ClientId>,
    },
    /// `BLOCK_JOB_CANCELLED`, QEMU's: it has been called off.
    JobCancelled {
        /// How far it was.
        #[serde(flatten)]
        end: Box<JobEnd>,
        /// Who began it.
        #[serde(skip)]
        client: Option<ClientId>,
    },
    /// `BLOCK_JOB_READY`, QEMU's: it waits for `job-complete`.
    JobReady {
        /// How it stands.
        #[serde(flatten)]
        end: Box<JobEnd>,
        /// Who began it.
        #[serde(skip)]
        client: Option<ClientId>,
    },
    /// `BLOCK_JOB_ERROR`, QEMU's: its I/O failed.
    JobError {
        /// The job's id.
        device: String,
        /// What failed.
        operation: IoOperation,
        /// What the job does about it.
        action: ErrorAction,
        /// Who began it.
        #[serde(skip)]
        client: Option<ClientId>,
    },
    /// `BLOCK_JOB_PENDING`, QEMU's: it waits for `job-finalize`.
    JobPending {
        /// What it does.
        r#type: JobType,
        /// The job's id.
        id: String,
        /// Who began it.
        #[serde(skip)]
        client: Option<ClientId>,
    },
    /// `BLOCK_EXPORT_DELETED`, QEMU's: an export is gone, and nobody reads through it any more.
    ExportDeleted {
        /// The export's id.
        id: String,
    },
    /// `STOP`, QEMU's: the disks stand still.
    Stopped {},
    /// `RESUME`, QEMU's: they go on.
    Resumed {},
    /// `SHUTDOWN`, QEMU's: the daemon ends.
    Shutdown {
        /// Whether the guest asked for it: never.
        guest: bool,
        /// Who did.
        reason: ShutdownCause,
    },
    /// `FRAZIL_SNAPSHOT_EXPIRED`: a snapshot is being deleted, for a disk has too many overlays.
    Expired {
        /// The snapshot's name.
        name: String,
        /// The disk.
        disk: String,
        /// How many there are, and how many there may be.
        reason: String,
    },
}

/// Why the daemon ends.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownCause {
    /// A client asked for it.
    HostQmpQuit,
    /// A signal, such as SIGTERM.
    HostSignal,
}

impl Event {
    /// The event's name in QMP.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Step { .. } => "FRAZIL_SNAPSHOT_STEP",
            Self::Created { .. } => "FRAZIL_SNAPSHOT_CREATED",
            Self::Sealed { .. } => "FRAZIL_SNAPSHOT_SEALED",
            Self::Failed { .. } => "FRAZIL_SNAPSHOT_FAILED",
            Self::Stall { .. } => "FRAZIL_STALL",
            Self::ThawOwed { .. } => "FRAZIL_THAW_OWED",
            Self::ThawConfirmed { .. } => "FRAZIL_THAW_CONFIRMED",
            Self::IoError { .. } => "BLOCK_IO_ERROR",
            Self::SpaceLow { .. } => "FRAZIL_SPACE_LOW",
            Self::Job { .. } => "JOB_STATUS_CHANGE",
            Self::JobCompleted { .. } => "BLOCK_JOB_COMPLETED",
            Self::JobCancelled { .. } => "BLOCK_JOB_CANCELLED",
            Self::JobReady { .. } => "BLOCK_JOB_READY",
            Self::JobError { .. } => "BLOCK_JOB_ERROR",
            Self::JobPending { .. } => "BLOCK_JOB_PENDING",
            Self::ExportDeleted { .. } => "BLOCK_EXPORT_DELETED",
            Self::Stopped {} => "STOP",
            Self::Resumed {} => "RESUME",
            Self::Shutdown { .. } => "SHUTDOWN",
            Self::Expired { .. } => "FRAZIL_SNAPSHOT_EXPIRED",
        }
    }

    /// The client that alone is told, as long as it is there. There are backup programs that take every end of a job for that
    /// of their own.
    pub fn addressee(&self) -> Option<ClientId> {
        match self {
            Self::JobCompleted { client, .. }
            | Self::JobCancelled { client, .. }
            | Self::JobReady { client, .. }
            | Self::JobError { client, .. }
            | Self::JobPending { client, .. } => *client,
            _ => None,
        }
    }
}

/// What to take a snapshot of, and how.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CreateRequest {
    /// The snapshot's name: letters, digits, `-`, `_`, `.`; at most 64, not starting with a dot or dash.
    pub name: String,
    /// The disks, all at one cut; all the daemon's disks if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
    /// What to do about the agent; the daemon's default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FreezePolicy>,
}

/// A disk that the daemon serves.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskStatus {
    /// The id given to `--disk`.
    pub id: String,
    /// Bytes.
    pub capacity: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// The way of its data I/O.
    pub cache: Cache,
    /// What becomes of changes that the host can not carry out.
    #[serde(rename = "werror")]
    pub write_errors: WriteErrors,
    /// Whether requests wait for the host, and why.
    pub io_status: IoStatus,
    /// How many do.
    pub parked: u64,
    /// Requests that were taken from the rings and are not answered, those that wait included.
    pub in_flight: u64,
    /// The chain's images, the base first, the active layer last.
    pub layers: Vec<DiskLayer>,
}

/// One image of a disk's chain.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskLayer {
    /// Its name as a node: the disk's id, a dot and the layer's number, which it keeps as long as it lives.
    pub node_name: String,
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Bytes that it shows: those of its disk when the next layer was put on it.
    pub virtual_size: u64,
    /// Bytes that it takes on the host; absent where the host does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_have_no_digits_that_nobody_measured() {
        for nanos in (1..10_000).chain([1_000_000_000_001, 3_725_392]) {
            let text = millis(Duration::from_nanos(nanos)).to_string();
            let decimals = text.split_once('.').map_or(0, |(_, decimals)| decimals.len());
            assert!(decimals <= 6, "{nanos} ns are told as {text} ms");
        }
        assert_eq!(millis(Duration::from_micros(1500)), 1.5);
    }
}
