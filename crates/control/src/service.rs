//! What the commands act on.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use backup::{
    Action, CompletionMode, ExportInfo, ExportOptions, ImageOptions, NodeInfo, NodeOptions, ServeRequest,
    ServerOptions, Serving, TlsCredentials,
};
use block::{Result, Stats};
use hostio::Confined;
use serde::{Deserialize, Serialize};
use snapshot::{
    BitmapInfo, BlockJobInfo, Changes, CheckpointRecord, CheckpointRequest, ClientId, CommitRequest,
    CreateRequest, DeleteRequest, DiskProbe, DiskStatus, FreezeOwner, ImageFormat, JobInfo, JobVerb,
    SnapshotRecord, StreamRequest,
};

/// The daemon, as its clients see it. Every method may be called from several threads at once and may take its time:
/// it holds up only the client that asked.
///
/// The arguments have the right types and nothing more: whether a name is well-formed, a disk exists, a state allows
/// what is asked, the service checks. [`block::ErrorKind::NotFound`] becomes the class `DeviceNotFound`, every other
/// kind `GenericError`.
pub trait Service: Send + Sync {
    /// Takes a snapshot, all in one.
    fn create(&self, request: CreateRequest) -> Result<SnapshotRecord>;

    /// Goes up to the drained gate and holds there, until [`release`](Self::release), [`abort`](Self::abort) or the
    /// end of the lease.
    fn prepare(&self, request: CreateRequest, lease: Duration) -> Result<()>;

    /// Completes the prepared snapshot.
    fn release(&self, name: &str) -> Result<SnapshotRecord>;

    /// Undoes the prepared snapshot.
    fn abort(&self, name: &str) -> Result<()>;

    /// All snapshots, the oldest first.
    fn list(&self) -> Vec<SnapshotRecord>;

    /// One of them.
    fn show(&self, name: &str) -> Result<SnapshotRecord>;

    /// Reads the super-blocks in a snapshot and judges each file system.
    fn probe(&self, name: &str) -> Result<Vec<DiskProbe>>;

    /// Begins to delete a snapshot; the job's id.
    fn delete(&self, request: DeleteRequest) -> Result<String>;

    /// Begins to merge layers down; the job's id.
    fn commit(&self, request: CommitRequest) -> Result<String>;

    /// Begins to pull layers up; the job's id.
    fn stream(&self, request: StreamRequest) -> Result<String>;

    /// The jobs, the oldest first.
    fn jobs(&self) -> Vec<JobInfo>;

    /// Those that clients began.
    fn block_jobs(&self) -> Vec<BlockJobInfo>;

    /// Asks something of a job.
    fn ask_job(&self, id: &str, verb: JobVerb) -> Result<()>;

    /// Limits a job's copying to so many bytes a second; 0 for no limit.
    fn set_job_speed(&self, id: &str, speed: u64) -> Result<()>;

    /// Takes the disks back to a snapshot; the newer ones go too if `discard_newer`, else they are a reason to refuse.
    fn revert(&self, name: &str, discard_newer: bool) -> Result<()>;

    /// Copies one disk of a snapshot to a new file, `target`. Calls `progress` with the bytes done and the bytes in
    /// all, as often as it likes; what that returns says whether to go on. What is called off leaves nothing.
    fn export(
        &self,
        name: &str,
        disk: &str,
        target: &Path,
        format: ImageFormat,
        progress: &dyn Fn(u64, u64) -> ControlFlow<()>,
    ) -> Result<()>;

    /// Makes a checkpoint, of now or of a snapshot's instant.
    fn checkpoint_create(&self, request: CheckpointRequest) -> Result<CheckpointRecord>;

    /// Deletes a checkpoint.
    fn checkpoint_delete(&self, name: &str) -> Result<()>;

    /// All checkpoints, in the order in which they were made.
    fn checkpoints(&self) -> Vec<CheckpointRecord>;

    /// Where a disk differs, or may, between the checkpoint or snapshot `from`, and `to` or now. `granularity` is in bytes.
    fn changes(&self, disk: &str, from: &str, to: Option<&str>, granularity: Option<u64>) -> Result<Changes>;

    /// Makes a disk larger while it is served, and tells its front-end. `size` is in bytes.
    fn resize(&self, disk: &str, size: u64) -> Result<()>;

    /// Has the image of a layer, by its node, name the one beneath it by another name.
    fn rename_backing(&self, device: &str, node: &str, name: &str) -> Result<()>;

    /// Adds a block node.
    fn add_node(&self, options: NodeOptions) -> Result<()>;

    /// Removes one.
    fn remove_node(&self, name: &str) -> Result<()>;

    /// The nodes that were added.
    fn nodes(&self) -> Vec<NodeInfo>;

    /// Puts a filter on the disk at `path` of QEMU's object tree, or takes it off: `node` is what the disk is to be.
    fn set_drive(&self, path: &str, node: &str) -> Result<()>;

    /// Does all actions at one instant, or none; the jobs that begin end as `mode` says.
    fn transaction(&self, actions: Vec<Action>, mode: CompletionMode, client: ClientId) -> Result<()>;

    /// Begins to make an image; `id` is the job's.
    fn create_image(&self, id: String, options: ImageOptions, client: ClientId) -> Result<()>;

    /// The dirty bitmaps of a disk.
    fn bitmaps(&self, disk: &str) -> Result<Vec<BitmapInfo>>;

    /// Adds certificates for the NBD server.
    fn add_credentials(&self, credentials: &TlsCredentials) -> Result<()>;

    /// Removes them.
    fn remove_credentials(&self, id: &str) -> Result<()>;

    /// Has the NBD server listen.
    fn start_server(&self, options: ServerOptions) -> Result<()>;

    /// Stops it, and all that it offers.
    fn stop_server(&self) -> Result<()>;

    /// Offers a disk, a node or an image on it.
    fn add_export(&self, options: ExportOptions) -> Result<()>;

    /// Offers it no more; with `hard`, its clients are cut off.
    fn remove_export(&self, id: &str, hard: bool) -> Result<()>;

    /// The same by the name that clients ask for.
    fn remove_export_named(&self, name: &str, hard: bool) -> Result<()>;

    /// What is offered.
    fn exports(&self) -> Vec<ExportInfo>;

    /// Serves one disk of a snapshot over NBD until `tell` has enough.
    fn serve(&self, request: &ServeRequest, tell: &dyn Fn(Serving) -> ControlFlow<()>) -> Result<()>;

    /// Has the disks stand still: takes no more requests, and waits for those in flight.
    fn stop(&self) -> Result<()>;

    /// Whether they do.
    fn is_stopped(&self) -> bool;

    /// Has them go on, and all requests tried again that wait for the host.
    fn resume(&self);

    /// The disks, sorted by id.
    fn disks(&self) -> Vec<DiskStatus>;

    /// What each disk has been asked for, sorted by id.
    fn stats(&self) -> Vec<(String, Stats)>;

    /// The state of the whole.
    fn status(&self) -> DaemonStatus;

    /// Asks the daemon to end. Returns at once; the reply to the client is sent before the server stops.
    fn quit(&self);
}

/// What `query-frazil` returns, beside the disks.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DaemonStatus {
    /// Seconds since the daemon began to serve.
    pub uptime: u64,
    /// The state directory.
    pub state: PathBuf,
    /// Bytes left where overlays grow.
    pub free: u64,
    /// Who freezes the guest.
    pub freeze_owner: FreezeOwner,
    /// The guest agent's socket, if one was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<PathBuf>,
    /// Whether a guest may be frozen and has not confirmed a thaw.
    pub thaw_owed: bool,
    /// The snapshot that is prepared and waits for its release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<String>,
    /// How many snapshots there are.
    pub snapshots: u64,
    /// How many clients are connected over NBD.
    #[serde(default)]
    pub nbd_clients: u64,
    /// What the daemon is kept from.
    #[serde(default)]
    pub sandbox: Confined,
}
