//! Jobs as they are asked for, reported and sent as events: the words of QEMU's `qapi/job.json`.

use block::IoStatus;
use serde::{Deserialize, Serialize};

/// What a job does.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobType {
    /// Merges layers down into the one beneath them.
    Commit,
    /// Pulls layers up into the one above them.
    Stream,
    /// Deletes a snapshot: whichever of both copies less.
    SnapshotDelete,
    /// Copies a disk, or what has changed of it, to somewhere else.
    Backup,
    /// Makes an image.
    Create,
}

/// A client's connection, as long as the daemon runs. What it asks for is told to it alone, as long as it is there.
pub type ClientId = u64;

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobStatus {
    /// Made; it waits for another job of the same disks.
    Created,
    /// Copying.
    Running,
    /// Resting until it is told to go on.
    Paused,
    /// All is copied; it waits to be completed by hand.
    Ready,
    /// The same, and it rests.
    Standby,
    /// All is copied; it waits for a snapshot under way, or for a program that reads one of its images.
    Waiting,
    /// Switching the chains over.
    Pending,
    /// It failed or was cancelled, and puts away what it began.
    Aborting,
    /// Over; kept until somebody has seen how it ended.
    Concluded,
    /// Gone.
    Null,
}

impl JobStatus {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }
}

/// A job, as `query-jobs` tells it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its id, unique among the daemon's jobs.
    pub id: String,
    /// What it does.
    pub r#type: JobType,
    /// Where it is.
    pub status: JobStatus,
    /// Bytes copied.
    pub current_progress: u64,
    /// Bytes to copy, as far as is known yet.
    pub total_progress: u64,
    /// Why it failed, once it has concluded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A job that a client began, as `query-block-jobs` tells it (QEMU's `BlockJobInfo`).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJobInfo {
    /// What it does.
    pub r#type: JobType,
    /// Its id.
    pub device: String,
    /// Bytes to copy, as far as is known yet.
    pub len: u64,
    /// Bytes copied.
    pub offset: u64,
    /// Whether it is at work.
    pub busy: bool,
    /// Whether it rests until it is told to go on.
    pub paused: bool,
    /// Bytes a second to copy at most; 0 for no limit.
    pub speed: u64,
    /// Always ok: a job whose I/O fails ends or pauses.
    pub io_status: IoStatus,
    /// Whether it waits to be completed by hand.
    pub ready: bool,
    /// Where it is.
    pub status: JobStatus,
    /// Whether its last step needs nobody.
    pub auto_finalize: bool,
    /// Whether it goes from the list by itself when it has concluded.
    pub auto_dismiss: bool,
    /// Why it failed, once it has concluded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How a job ended, or stands: the data of QEMU's `BLOCK_JOB_COMPLETED`, `BLOCK_JOB_CANCELLED` and `BLOCK_JOB_READY`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct JobEnd {
    /// What it did.
    pub r#type: JobType,
    /// Its id.
    pub device: String,
    /// Bytes there were to copy.
    pub len: u64,
    /// Bytes copied.
    pub offset: u64,
    /// Bytes a second that it might copy; 0 for no limit.
    pub speed: u64,
    /// Why it failed; absent if it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What every job can be told when it is asked for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobOptions {
    /// Its id; one that says what it does if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,
    /// Bytes a second to copy at most; 0 for no limit.
    #[serde(default)]
    pub speed: u64,
    /// Whether its last step needs nobody.
    #[serde(default = "yes")]
    pub auto_finalize: bool,
    /// Whether it goes from the list by itself when it has concluded.
    #[serde(default = "yes")]
    pub auto_dismiss: bool,
    /// Who asks.
    #[serde(skip)]
    pub client: Option<ClientId>,
}

fn yes() -> bool {
    true
}

impl Default for JobOptions {
    fn default() -> Self {
        Self { job_id: None, speed: 0, auto_finalize: true, auto_dismiss: true, client: None }
    }
}

/// `block-commit`: layers of a disk to merge into the one beneath them. A layer is named by its node or its file.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CommitRequest {
    /// The disk's id, or a node of it.
    pub device: String,
    /// The layer to merge into: by its file. The one beneath all others if neither is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The same by its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_node: Option<String>,
    /// The newest layer to merge: by its file. The active layer if neither is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top: Option<String>,
    /// The same by its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_node: Option<String>,
    /// Whether the job switches over by itself where `top` is the active layer. QEMU's never does: it becomes ready, and
    /// waits for `job-complete`.
    #[serde(default)]
    pub auto_complete: bool,
    /// The rest.
    #[serde(flatten)]
    pub options: JobOptions,
}

/// `block-stream`: a layer of a disk into which to pull up what is beneath it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StreamRequest {
    /// The layer, by its node; the active one of a disk, by the disk's id.
    pub device: String,
    /// The newest layer that stays beneath: by its file. If neither is given, none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The same by its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_node: Option<String>,
    /// The rest.
    #[serde(flatten)]
    pub options: JobOptions,
}

/// `snapshot-delete`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeleteRequest {
    /// The snapshot's name.
    pub name: String,
    /// The rest.
    #[serde(flatten)]
    pub options: JobOptions,
}
