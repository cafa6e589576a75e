//! The manager, as the QMP server and the offline commands want it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use backup::{
    Action, Backups, CompletionMode, ExportInfo, ExportOptions, ImageOptions, NodeInfo, NodeOptions,
    ServeRequest, ServerOptions, Serving, SocketAddress, TlsCredentials,
};
use block::{Result, Stats};
use control::{DaemonStatus, Service};
use snapshot::{
    BitmapInfo, BlockJobInfo, Changes, CheckpointRecord, CheckpointRequest, ClientId, CommitRequest,
    CreateRequest, DeleteRequest, DiskProbe, DiskStatus, FreezeOwner, ImageFormat, JobInfo, JobVerb, Manager,
    Point, SnapshotRecord, StreamRequest,
};
use tracing::info;
use vhost_blk::Notifier;

use super::Stop;
use super::confine::Confinement;
use crate::config::Config;

/// What clients see.
pub(super) struct Daemon {
    manager: Arc<Manager>,
    backups: Backups,
    started: Instant,
    state: PathBuf,
    freeze_owner: FreezeOwner,
    agent: Option<PathBuf>,
    /// The way to each disk's front-end.
    notifiers: BTreeMap<String, Notifier>,
    confinement: Confinement,
    /// Absent where nothing runs that could be stopped.
    stop: Option<Sender<Stop>>,
}

impl Daemon {
    pub(super) fn new(
        manager: Arc<Manager>,
        config: &Config,
        sockets: BTreeMap<String, OwnedFd>,
        notifiers: BTreeMap<String, Notifier>,
        confinement: Confinement,
        stop: Sender<Stop>,
    ) -> Self {
        Self {
            backups: Backups::new(Arc::clone(&manager), sockets),
            manager,
            started: Instant::now(),
            state: config.state.clone(),
            freeze_owner: config.freeze_owner,
            agent: config.agent.clone(),
            notifiers,
            confinement,
            stop: Some(stop),
        }
    }

    pub(super) fn offline(manager: Manager, state: &Path) -> Self {
        let manager = Arc::new(manager);
        Self {
            backups: Backups::new(Arc::clone(&manager), BTreeMap::new()),
            manager,
            started: Instant::now(),
            state: state.to_owned(),
            freeze_owner: FreezeOwner::None,
            agent: None,
            notifiers: BTreeMap::new(),
            confinement: Confinement::default(),
            stop: None,
        }
    }

    /// Whether a client may name this address.
    fn check_address(&self, address: &SocketAddress) -> Result<()> {
        match address {
            SocketAddress::Unix { path } => self.confinement.check(path),
            // What systemd has passed on is the operator's own.
            SocketAddress::Inet { .. } | SocketAddress::Fd { .. } => Ok(()),
        }
    }

    /// At the end, when no more commands come: what clients read over NBD ends.
    pub(super) fn end_exports(&self) {
        self.backups.shut_down();
    }
}

impl Service for Daemon {
    fn create(&self, request: CreateRequest) -> Result<SnapshotRecord> {
        self.manager.create(request)
    }

    fn prepare(&self, request: CreateRequest, lease: Duration) -> Result<()> {
        self.manager.prepare(request, lease)
    }

    fn release(&self, name: &str) -> Result<SnapshotRecord> {
        self.manager.release(name)
    }

    fn abort(&self, name: &str) -> Result<()> {
        self.manager.abort(name)
    }

    fn list(&self) -> Vec<SnapshotRecord> {
        self.manager.list()
    }

    fn show(&self, name: &str) -> Result<SnapshotRecord> {
        self.manager.show(name)
    }

    fn probe(&self, name: &str) -> Result<Vec<DiskProbe>> {
        self.manager.probe(name)
    }

    fn delete(&self, request: DeleteRequest) -> Result<String> {
        self.manager.delete(request)
    }

    fn commit(&self, request: CommitRequest) -> Result<String> {
        self.manager.commit(request)
    }

    fn stream(&self, request: StreamRequest) -> Result<String> {
        self.manager.stream(request)
    }

    fn jobs(&self) -> Vec<JobInfo> {
        self.manager.jobs()
    }

    fn block_jobs(&self) -> Vec<BlockJobInfo> {
        self.manager.block_jobs()
    }

    fn ask_job(&self, id: &str, verb: JobVerb) -> Result<()> {
        self.manager.ask_job(id, verb)
    }

    fn set_job_speed(&self, id: &str, speed: u64) -> Result<()> {
        self.manager.set_job_speed(id, speed)
    }

    fn revert(&self, name: &str, discard_newer: bool) -> Result<()> {
        self.manager.revert(name, discard_newer)
    }

    fn export(
        &self,
        name: &str,
        disk: &str,
        target: &Path,
        format: ImageFormat,
        progress: &dyn Fn(u64, u64) -> ControlFlow<()>,
    ) -> Result<()> {
        self.confinement.check(target)?;
        self.manager.export(name, disk, target, format, &mut |done, total| progress(done, total))
    }

    fn checkpoint_create(&self, request: CheckpointRequest) -> Result<CheckpointRecord> {
        self.manager.checkpoint_create(request)
    }

    fn checkpoint_delete(&self, name: &str) -> Result<()> {
        self.manager.checkpoint_delete(name)
    }

    fn checkpoints(&self) -> Vec<CheckpointRecord> {
        self.manager.checkpoints()
    }

    fn changes(&self, disk: &str, from: &str, to: Option<&str>, granularity: Option<u64>) -> Result<Changes> {
        let from = self.manager.point(from)?;
        let to = to.map_or(Ok(Point::Now), |to| self.manager.point(to))?;
        self.manager.changes(disk, &from, &to, granularity)
    }

    fn resize(&self, disk: &str, size: u64) -> Result<()> {
        self.manager.resize(disk, size)?;
        let told = self.notifiers.get(disk).is_some_and(Notifier::resized);
        info!(disk, size, told, "a disk has been resized");
        Ok(())
    }

    fn rename_backing(&self, device: &str, node: &str, name: &str) -> Result<()> {
        self.manager.rename_backing(device, node, name)
    }

    fn add_node(&self, options: NodeOptions) -> Result<()> {
        options.filenames().into_iter().try_for_each(|path| self.confinement.check(path))?;
        self.backups.add_node(options)
    }

    fn remove_node(&self, name: &str) -> Result<()> {
        self.backups.remove_node(name)
    }

    fn nodes(&self) -> Vec<NodeInfo> {
        self.backups.nodes()
    }

    fn set_drive(&self, path: &str, node: &str) -> Result<()> {
        self.backups.set_drive(path, node)
    }

    fn transaction(&self, actions: Vec<Action>, mode: CompletionMode, client: ClientId) -> Result<()> {
        actions.iter().filter_map(Action::filename).try_for_each(|path| self.confinement.check(path))?;
        self.backups.transaction(actions, mode, Some(client))
    }

    fn create_image(&self, id: String, options: ImageOptions, client: ClientId) -> Result<()> {
        options.filenames().into_iter().try_for_each(|path| self.confinement.check(path))?;
        self.backups.create_image(id, options, Some(client))
    }

    fn bitmaps(&self, disk: &str) -> Result<Vec<BitmapInfo>> {
        self.manager.bitmaps(disk)
    }

    fn add_credentials(&self, credentials: &TlsCredentials) -> Result<()> {
        self.confinement.check_certificates(credentials)?;
        self.backups.add_credentials(credentials)
    }

    fn remove_credentials(&self, id: &str) -> Result<()> {
        self.backups.remove_credentials(id)
    }

    fn start_server(&self, options: ServerOptions) -> Result<()> {
        self.check_address(&options.addr)?;
        self.backups.start_server(options)
    }

    fn stop_server(&self) -> Result<()> {
        self.backups.stop_server()
    }

    fn add_export(&self, options: ExportOptions) -> Result<()> {
        self.backups.add_export(options)
    }

    fn remove_export(&self, id: &str, hard: bool) -> Result<()> {
        self.backups.remove_export(id, hard)
    }

    fn remove_export_named(&self, name: &str, hard: bool) -> Result<()> {
        self.backups.remove_export_named(name, hard)
    }

    fn exports(&self) -> Vec<ExportInfo> {
        self.backups.exports()
    }

    fn serve(&self, request: &ServeRequest, tell: &dyn Fn(Serving) -> ControlFlow<()>) -> Result<()> {
        self.check_address(&request.addr)?;
        self.backups.serve(request, tell)
    }

    fn stop(&self) -> Result<()> {
        self.manager.stop()
    }

    fn is_stopped(&self) -> bool {
        self.manager.is_stopped()
    }

    fn resume(&self) {
        self.manager.go_on();
    }

    fn disks(&self) -> Vec<DiskStatus> {
        self.manager.disks()
    }

    fn stats(&self) -> Vec<(String, Stats)> {
        self.manager.stats()
    }

    fn status(&self) -> DaemonStatus {
        DaemonStatus {
            uptime: self.started.elapsed().as_secs(),
            state: self.state.clone(),
            free: self.manager.free_space().unwrap_or_default(),
            freeze_owner: self.freeze_owner,
            agent: self.agent.clone(),
            thaw_owed: self.manager.thaw_owed(),
            prepared: self.manager.prepared(),
            snapshots: self.manager.list().len() as u64,
            nbd_clients: self.backups.nbd_clients() as u64,
            sandbox: self.confinement.state.clone(),
        }
    }

    fn quit(&self) {
        if let Some(stop) = &self.stop {
            // Nobody hears it if the daemon is ending already.
            let _ = stop.send(Stop::Quit);
        }
    }
}
