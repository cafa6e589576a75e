//! What happens, as whoever listens is told.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{SnapshotRecord, Step};
use crate::jobs::{ClientId, JobEnd, JobStatus, JobType};

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
