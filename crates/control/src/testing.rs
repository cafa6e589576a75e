//! A service that only pretends, for tests of the server and of its clients.

mod samples;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backup::{
    Action, CompletionMode, ExportInfo, ExportOptions, ImageOptions, NodeInfo, NodeOptions, ServeRequest,
    ServerOptions, Serving, TlsCredentials,
};
use block::{ByteRange, DirtyBitmap, Error, ErrorKind, IoStatus, Result, Stats};
use hostio::{Confined, Held};
use snapshot::{
    BitmapInfo, BlockJobInfo, Changes, CheckpointRecord, CheckpointRequest, ClientId, CommitRequest,
    CreateRequest, DeleteRequest, DiskProbe, DiskStatus, Event, FreezeOwner, ImageFormat, JobInfo,
    JobOptions, JobStatus, JobType, JobVerb, SnapshotRecord, StreamRequest,
};

use crate::{Announcer, DaemonStatus, Service};

/// One disk, `vda`, and a list of snapshots. A snapshot named `slow` is taken only once [`Fake::go_on`] is called,
/// one named `panic` panics.
#[derive(Debug, Default)]
pub struct Fake {
    state: Mutex<State>,
    changed: Condvar,
    announcer: Announcer,
}

#[derive(Debug, Default)]
struct State {
    snapshots: Vec<SnapshotRecord>,
    checkpoints: Vec<CheckpointRecord>,
    jobs: Vec<JobInfo>,
    prepared: Option<CreateRequest>,
    lease: Option<Duration>,
    waiting: usize,
    go_on: bool,
    quit: bool,
    stopped: bool,
    resumed: bool,
    capacity: Option<u64>,
}

impl Fake {
    /// A service with one disk and no snapshots.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells the clients of its server of events.
    pub fn announcer(&self) -> &Announcer {
        &self.announcer
    }

    /// Lets the snapshots named `slow` be taken.
    pub fn go_on(&self) {
        self.lock().go_on = true;
        self.changed.notify_all();
    }

    /// Waits until so many snapshots named `slow` are being taken.
    pub fn wait_for_slow(&self, count: usize) {
        let wait = self.changed.wait_while(self.lock(), |state| state.waiting < count);
        drop(wait.unwrap_or_else(PoisonError::into_inner));
    }

    /// The lease of the last prepared snapshot.
    pub fn lease(&self) -> Option<Duration> {
        self.lock().lease
    }

    /// The names of the snapshots.
    pub fn names(&self) -> Vec<String> {
        self.lock().snapshots.iter().map(|snapshot| snapshot.name.clone()).collect()
    }

    /// Whether a client asked the daemon to end.
    pub fn has_quit(&self) -> bool {
        self.lock().quit
    }

    /// A job that runs until it is cancelled, whatever it is; but a delete is over at once.
    fn begin(&self, r#type: JobType, options: JobOptions, usual: &str) -> String {
        let id = options.job_id.unwrap_or_else(|| usual.to_owned());
        let (current_progress, total_progress) = (1 << 20, 1 << 30);
        let status = match r#type {
            JobType::SnapshotDelete => JobStatus::Concluded,
            _ => JobStatus::Running,
        };
        let job = JobInfo { id: id.clone(), r#type, status, current_progress, total_progress, error: None };
        self.lock().jobs.push(job);
        self.announcer.tell(&Event::Job { id: id.clone(), status });
        id
    }

    fn with_job(&self, id: &str, change: impl FnOnce(&mut JobInfo)) -> Result<()> {
        let mut state = self.lock();
        let found = state.jobs.iter_mut().find(|job| job.id == id);
        found.map(change).ok_or_else(|| Error::new(ErrorKind::NotFound, "Job not found"))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_to_go_on(&self) {
        self.lock().waiting += 1;
        self.changed.notify_all();
        let wait = self.changed.wait_while(self.lock(), |state| !state.go_on);
        wait.unwrap_or_else(PoisonError::into_inner).waiting -= 1;
    }
}

fn missing(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("no snapshot is named {name}"))
}

impl Service for Fake {
    fn create(&self, request: CreateRequest) -> Result<SnapshotRecord> {
        match request.name.as_str() {
            "slow" => self.wait_to_go_on(),
            #[expect(clippy::panic, reason = "what a defect in a service would do")]
            "panic" => panic!("as asked"),
            _ => {}
        }
        let mut state = self.lock();
        if state.snapshots.iter().any(|snapshot| snapshot.name == request.name) {
            return Err(Error::new(ErrorKind::Busy, format!("a snapshot is already named {}", request.name)));
        }
        let disks = request.disks.unwrap_or_else(|| vec!["vda".to_owned()]);
        let record = samples::snapshot(request.name, &disks);
        state.snapshots.push(record.clone());
        drop(state);
        self.announcer.tell(&Event::Created { snapshot: Box::new(record.clone()) });
        Ok(record)
    }

    fn prepare(&self, request: CreateRequest, lease: Duration) -> Result<()> {
        let mut state = self.lock();
        if state.prepared.is_some() {
            return Err(Error::new(ErrorKind::Busy, "another snapshot is prepared"));
        }
        state.prepared = Some(request);
        state.lease = Some(lease);
        Ok(())
    }

    fn release(&self, name: &str) -> Result<SnapshotRecord> {
        let prepared = self.lock().prepared.take_if(|request| request.name == name);
        self.create(prepared.ok_or_else(|| missing(name))?)
    }

    fn abort(&self, name: &str) -> Result<()> {
        let prepared = self.lock().prepared.take_if(|request| request.name == name);
        prepared.map(drop).ok_or_else(|| missing(name))
    }

    fn list(&self) -> Vec<SnapshotRecord> {
        self.lock().snapshots.clone()
    }

    fn show(&self, name: &str) -> Result<SnapshotRecord> {
        self.list().into_iter().find(|snapshot| snapshot.name == name).ok_or_else(|| missing(name))
    }

    fn probe(&self, name: &str) -> Result<Vec<DiskProbe>> {
        self.show(name)?;
        Ok(vec![samples::probe()])
    }

    fn delete(&self, request: DeleteRequest) -> Result<String> {
        self.show(&request.name)?;
        self.lock().snapshots.retain(|snapshot| snapshot.name != request.name);
        Ok(self.begin(JobType::SnapshotDelete, request.options, &request.name))
    }

    fn commit(&self, request: CommitRequest) -> Result<String> {
        Ok(self.begin(JobType::Commit, request.options, &request.device))
    }

    fn stream(&self, request: StreamRequest) -> Result<String> {
        Ok(self.begin(JobType::Stream, request.options, &request.device))
    }

    fn jobs(&self) -> Vec<JobInfo> {
        self.lock().jobs.clone()
    }

    fn block_jobs(&self) -> Vec<BlockJobInfo> {
        self.jobs().into_iter().map(samples::block_job).collect()
    }

    fn ask_job(&self, id: &str, verb: JobVerb) -> Result<()> {
        self.with_job(id, |job| match verb {
            JobVerb::Pause => job.status = JobStatus::Paused,
            JobVerb::Resume => job.status = JobStatus::Running,
            JobVerb::Cancel => {
                job.status = JobStatus::Concluded;
                job.error = Some("Operation canceled".to_owned());
            }
            JobVerb::SetSpeed | JobVerb::Complete | JobVerb::Finalize | JobVerb::Dismiss => {}
        })?;
        self.lock().jobs.retain(|job| verb != JobVerb::Dismiss || job.id != id);
        Ok(())
    }

    fn set_job_speed(&self, id: &str, _speed: u64) -> Result<()> {
        self.with_job(id, |_| {})
    }

    fn revert(&self, name: &str, discard_newer: bool) -> Result<()> {
        self.show(name)?;
        let mut state = self.lock();
        if state.snapshots.last().is_some_and(|newest| newest.name != name) && !discard_newer {
            return Err(Error::new(ErrorKind::Busy, format!("there are newer snapshots than {name}")));
        }
        let keep = state.snapshots.iter().position(|snapshot| snapshot.name == name).map_or(0, |at| at + 1);
        state.snapshots.truncate(keep);
        Ok(())
    }

    fn export(
        &self,
        name: &str,
        disk: &str,
        _target: &Path,
        _format: ImageFormat,
        progress: &dyn Fn(u64, u64) -> ControlFlow<()>,
    ) -> Result<()> {
        self.show(name)?;
        if disk != "vda" {
            return Err(Error::new(ErrorKind::NotFound, format!("{name} has no disk {disk}")));
        }
        match (0..=100).try_for_each(|percent| progress(percent, 100)) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::new(ErrorKind::Busy, "called off")),
        }
    }

    fn checkpoint_create(&self, request: CheckpointRequest) -> Result<CheckpointRecord> {
        let disks = request.disks.unwrap_or_else(|| vec!["vda".to_owned()]);
        let record = samples::checkpoint(request.name, disks);
        self.lock().checkpoints.push(record.clone());
        Ok(record)
    }

    fn checkpoint_delete(&self, name: &str) -> Result<()> {
        self.lock().checkpoints.retain(|checkpoint| checkpoint.name != name);
        Ok(())
    }

    fn checkpoints(&self) -> Vec<CheckpointRecord> {
        self.lock().checkpoints.clone()
    }

    /// Every other 64 KiB of 1 MiB.
    fn changes(
        &self,
        _disk: &str,
        _from: &str,
        _to: Option<&str>,
        _granularity: Option<u64>,
    ) -> Result<Changes> {
        let bits = DirtyBitmap::new(1 << 20, 16)?;
        (0..8).for_each(|index| bits.mark(ByteRange { offset: index << 17, len: 1 << 16 }));
        Ok(bits.into())
    }

    fn rename_backing(&self, device: &str, node: &str, name: &str) -> Result<()> {
        match (device, node, name) {
            ("vda", "vda.1", "base.raw") => Ok(()),
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("'{name}' is not what is beneath"))),
        }
    }

    fn resize(&self, disk: &str, size: u64) -> Result<()> {
        if disk != "vda" {
            return Err(Error::new(ErrorKind::NotFound, format!("disk '{disk}' is not served")));
        }
        self.lock().capacity = Some(size);
        Ok(())
    }

    fn add_node(&self, _options: NodeOptions) -> Result<()> {
        Ok(())
    }

    fn remove_node(&self, _name: &str) -> Result<()> {
        Ok(())
    }

    fn nodes(&self) -> Vec<NodeInfo> {
        vec![samples::node()]
    }

    fn set_drive(&self, _path: &str, _node: &str) -> Result<()> {
        Ok(())
    }

    fn transaction(&self, _actions: Vec<Action>, _mode: CompletionMode, _client: ClientId) -> Result<()> {
        Ok(())
    }

    fn create_image(&self, _id: String, _options: ImageOptions, _client: ClientId) -> Result<()> {
        Ok(())
    }

    fn bitmaps(&self, _disk: &str) -> Result<Vec<BitmapInfo>> {
        Ok(vec![samples::bitmap()])
    }

    fn add_credentials(&self, _credentials: &TlsCredentials) -> Result<()> {
        Ok(())
    }

    fn remove_credentials(&self, _id: &str) -> Result<()> {
        Ok(())
    }

    fn start_server(&self, _options: ServerOptions) -> Result<()> {
        Ok(())
    }

    fn stop_server(&self) -> Result<()> {
        Ok(())
    }

    fn add_export(&self, _options: ExportOptions) -> Result<()> {
        Ok(())
    }

    fn remove_export(&self, _id: &str, _hard: bool) -> Result<()> {
        Ok(())
    }

    fn remove_export_named(&self, _name: &str, _hard: bool) -> Result<()> {
        Ok(())
    }

    fn exports(&self) -> Vec<ExportInfo> {
        let (id, node_name) = ("e".to_owned(), "vda".to_owned());
        vec![ExportInfo { id, r#type: "nbd".to_owned(), node_name, shutting_down: false }]
    }

    fn serve(&self, _request: &ServeRequest, tell: &dyn Fn(Serving) -> ControlFlow<()>) -> Result<()> {
        let mut wanted = tell(Serving::Ready("/nbd".to_owned()));
        while wanted.is_continue() {
            wanted = tell(Serving::GoOn);
        }
        Ok(())
    }

    fn stop(&self) -> Result<()> {
        self.lock().stopped = true;
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    fn resume(&self) {
        let mut state = self.lock();
        (state.stopped, state.resumed) = (false, true);
    }

    fn disks(&self) -> Vec<DiskStatus> {
        let state = self.lock();
        let io_status = if state.resumed { IoStatus::Ok } else { IoStatus::NoSpace };
        vec![samples::disk(state.capacity.unwrap_or(1 << 30), io_status)]
    }

    fn stats(&self) -> Vec<(String, Stats)> {
        vec![("vda".to_owned(), Stats::default())]
    }

    fn status(&self) -> DaemonStatus {
        let state = self.lock();
        DaemonStatus {
            uptime: 7,
            state: PathBuf::from("/state"),
            free: 1 << 40,
            freeze_owner: FreezeOwner::Frazil,
            agent: Some(PathBuf::from("/run/agent")),
            thaw_owed: false,
            prepared: state.prepared.as_ref().map(|request| request.name.clone()),
            snapshots: state.snapshots.len() as u64,
            nbd_clients: 1,
            sandbox: Confined { landlock: Held::Full, seccomp: Held::Unavailable, ..Confined::default() },
        }
    }

    fn quit(&self) {
        self.lock().quit = true;
    }
}
