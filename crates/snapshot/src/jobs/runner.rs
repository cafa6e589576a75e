//! The jobs of a daemon: a list, and a thread for each that has begun.
//!
//! Jobs of the same disk run one after the other, in the order in which they were asked for. A job that has not concluded
//! is in the manifest, and a daemon that starts goes on with it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use block::{Error, ErrorKind, Result};
use tracing::{error, info, warn};

use super::job::{Halt, Identity, Job};
use super::machine::Verb;
use super::model::{BlockJobInfo, ClientId, JobInfo, JobOptions, JobStatus};
use super::plan::plan;
use super::record::{JobRecord, Task};
use super::tidy::Tidiness;
use super::work::Work;
use super::world::World;

/// Jobs that clients may have on the list, those that nobody has dismissed included. Of the automatic ones each disk has one.
const MAX_JOBS: usize = 256;

/// The error of a job that was called off, in QEMU's words.
const CANCELLED: &str = "Operation canceled";

/// All jobs. They are stopped, to be gone on with by the next run, when this is dropped.
pub(crate) struct Jobs(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) world: World,
    list: Mutex<List>,
}

#[derive(Default)]
pub(super) struct List {
    pub(super) entries: Vec<Entry>,
    pub(super) threads: Vec<JoinHandle<()>>,
    /// No more begin.
    ended: bool,
    tidiness: Tidiness,
}

#[derive(Clone)]
pub(super) struct Entry {
    pub(super) job: Arc<Job>,
    /// What it does to chains; `None` if that is another's business.
    pub(super) task: Option<Task>,
    pub(super) disks: BTreeSet<String>,
    pub(super) begun: bool,
}

impl Entry {
    fn is_over(&self) -> bool {
        matches!(self.job.status(), JobStatus::Concluded | JobStatus::Null)
    }
}

impl Jobs {
    pub(crate) fn new(world: World) -> Self {
        Self(Arc::new(Inner { world, list: Mutex::default() }))
    }

    /// Goes on with what an earlier run left.
    pub(crate) fn resume(&self) {
        let records = self.0.world.store.manifest().jobs.clone();
        let mut list = self.0.list();
        for record in records {
            if list.entries.iter().any(|entry| entry.job.identity.id == record.id) {
                continue;
            }
            info!(job = record.id, "a job of an earlier run goes on");
            // Whoever wanted to see its end, and then dismiss it, lost the connection with that run.
            let record = JobRecord { auto_dismiss: true, ..record };
            let entry = self.0.entry(&record, None);
            list.entries.push(entry);
        }
        drop(list);
        Inner::start_ready(&self.0);
    }

    /// Begins a job; its id. `usual` is the id of one that is given none.
    pub(crate) fn begin(
        &self,
        task: Task,
        options: JobOptions,
        usual: &str,
        automatic: bool,
    ) -> Result<String> {
        let busy = |story: String| Err(Error::new(ErrorKind::Busy, story));
        let mut list = self.0.list();
        let id = match (automatic, options.job_id) {
            (true, _) => list.free_id(usual),
            (false, asked) => asked.unwrap_or_else(|| usual.to_owned()),
        };
        list.admit(&id, automatic)?;
        let is_same = |entry: &&Entry| entry.task.as_ref() == Some(&task) && !entry.is_over();
        if let Some(same) = list.entries.iter().find(is_same) {
            return busy(format!("job '{}' does that already", same.job.identity.id));
        }
        // What can not be done now is refused at once, unless another job is about to make it possible.
        let disks = self.0.disks_of(&task)?;
        if list.entries.iter().all(|entry| entry.is_over() || entry.disks.is_disjoint(&disks)) {
            plan(&self.0.world.store.manifest(), &task)?;
        }
        let record = JobRecord {
            id: id.clone(),
            task,
            automatic,
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            speed: options.speed,
            paused: false,
            moves: Vec::new(),
        };
        self.0.world.store.update(|manifest| {
            manifest.jobs.push(record.clone());
            Ok(())
        })?;
        let entry = self.0.entry(&record, options.client);
        list.entries.push(entry);
        drop(list);
        Inner::start_ready(&self.0);
        Ok(id)
    }

    pub(crate) fn list(&self) -> Vec<JobInfo> {
        self.0.list().entries.iter().map(|entry| entry.job.info()).collect()
    }

    /// Those that clients began.
    pub(crate) fn block_jobs(&self) -> Vec<BlockJobInfo> {
        self.0.list().entries.iter().filter_map(|entry| entry.job.block_info()).collect()
    }

    pub(crate) fn ask(&self, id: &str, verb: Verb) -> Result<()> {
        let job = self.find(id)?;
        job.ask(verb)?;
        match verb {
            Verb::Dismiss => self.0.dismiss(&job),
            // One that has not begun has no thread that would hear of it.
            Verb::Cancel => {
                Inner::cancel_waiting(&self.0, &job);
                Ok(())
            }
            Verb::Complete | Verb::Finalize => Ok(()),
            Verb::Pause | Verb::Resume | Verb::SetSpeed => {
                self.0.remember(&job);
                Ok(())
            }
        }
    }

    pub(crate) fn set_speed(&self, id: &str, speed: u64) -> Result<()> {
        let job = self.find(id)?;
        job.set_speed(speed)?;
        self.0.remember(&job);
        Ok(())
    }

    /// Makes way for work on these disks that needs them closed: calls off what nobody asked for. True once nothing is in
    /// the way. What begins after that waits for the right to change chains, which the caller has.
    ///
    /// Errors: [`ErrorKind::Busy`] if there is a job that somebody did ask for.
    pub(crate) fn make_way(&self, disks: &BTreeSet<String>) -> Result<bool> {
        let in_the_way = |entry: &&Entry| !entry.is_over() && !entry.disks.is_disjoint(disks);
        let entries: Vec<_> = self.0.list().entries.iter().filter(in_the_way).cloned().collect();
        if let Some(asked) = entries.iter().find(|entry| !entry.job.identity.automatic) {
            let story = format!("job '{}' works on it: wait for it, or cancel it", asked.job.identity.id);
            return Err(Error::new(ErrorKind::Busy, story));
        }
        for entry in &entries {
            // One that is pending can not be called off, and is over soon.
            let _ = self.ask(&entry.job.identity.id, Verb::Cancel);
        }
        Ok(entries.is_empty())
    }

    /// Begins what is to be done without anybody asking: layers without snapshots are merged, and disks with too many
    /// overlays lose their oldest snapshot.
    pub(crate) fn tidy(&self) {
        let busy: BTreeSet<String> = {
            let list = self.0.list();
            let under_way = list.entries.iter().filter(|entry| !entry.is_over());
            under_way.flat_map(|entry| entry.disks.clone()).collect()
        };
        let now = Instant::now();
        let chores = self.0.list().tidiness.chores(&self.0.world, &busy, now);
        for chore in chores {
            let options = JobOptions::default();
            if let Err(error) = self.begin(chore.task.clone(), options, &chore.usual_id(), true) {
                warn!(disk = chore.disk, %error, "layers can not be merged now");
                self.0.list().tidiness.failed(&chore.disk, now);
            } else if let Some(event) = chore.event {
                use crate::cut::Events as _;
                self.0.world.bus.emit(event);
            }
        }
    }

    /// Stops all jobs where they are, for the next run to go on with, and takes no more.
    pub(crate) fn stop(&self) {
        let (entries, threads) = {
            let mut list = self.0.list();
            list.ended = true;
            (list.entries.clone(), std::mem::take(&mut list.threads))
        };
        entries.iter().for_each(|entry| entry.job.stop());
        for thread in threads {
            if thread.join().is_err() {
                error!("a job's thread had panicked");
            }
        }
    }

    fn find(&self, id: &str) -> Result<Arc<Job>> {
        let list = self.0.list();
        let found = list.entries.iter().find(|entry| entry.job.identity.id == id);
        let missing = || Error::new(ErrorKind::NotFound, "Job not found");
        found.map(|entry| Arc::clone(&entry.job)).ok_or_else(missing)
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.stop();
    }
}

impl List {
    /// Whether jobs may begin.
    pub(super) fn check_running(&self) -> Result<()> {
        match self.ended {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Busy, "the daemon is ending")),
        }
    }

    /// This id or one like it, that no job has: a client may have given it to one of its own.
    fn free_id(&self, usual: &str) -> String {
        let mut id = usual.to_owned();
        for number in 2.. {
            if self.entries.iter().all(|entry| entry.job.identity.id != id) {
                break;
            }
            id = format!("{usual}-{number}");
        }
        id
    }

    /// Whether a job of that id may be entered. Clients that dismiss nothing keep out each other, and no automatic job.
    pub(super) fn admit(&self, id: &str, automatic: bool) -> Result<()> {
        let busy = |story: String| Err(Error::new(ErrorKind::Busy, story));
        check_id(id)?;
        self.check_running()?;
        let of_clients = self.entries.iter().filter(|entry| !entry.job.identity.automatic).count();
        if !automatic && of_clients >= MAX_JOBS {
            return busy("there are too many jobs: dismiss those that have concluded".to_owned());
        }
        if self.entries.iter().any(|entry| entry.job.identity.id == id) {
            return busy(format!("Job ID '{id}' already in use"));
        }
        Ok(())
    }
}

impl Inner {
    pub(super) fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, record: &JobRecord, client: Option<ClientId>) -> Entry {
        let identity = Identity {
            id: record.id.clone(),
            kind: record.task.kind(),
            automatic: record.automatic,
            auto_finalize: record.auto_finalize,
            auto_dismiss: record.auto_dismiss,
            client,
            group: None,
        };
        let events = Arc::clone(&self.world.bus) as _;
        let job = Arc::new(Job::new(identity, record.speed, record.paused, events));
        let disks = self.disks_of(&record.task).unwrap_or_default();
        Entry { job, task: Some(record.task.clone()), disks, begun: false }
    }

    fn disks_of(&self, task: &Task) -> Result<BTreeSet<String>> {
        match task {
            Task::Commit { disk, .. } | Task::Stream { disk, .. } | Task::Merge { disk, .. } => {
                Ok(BTreeSet::from([disk.clone()]))
            }
            Task::Delete { snapshot } => {
                let manifest = self.world.store.manifest();
                Ok(manifest.snapshot(snapshot)?.disks.iter().map(|disk| disk.id.clone()).collect())
            }
        }
    }

    /// Starts each job whose disks no earlier one needs.
    fn start_ready(inner: &Arc<Self>) {
        let mut list = inner.list();
        if list.ended {
            return;
        }
        list.threads.retain(|thread| !thread.is_finished());
        let mut taken = BTreeSet::new();
        let mut ready = Vec::new();
        for entry in list.entries.iter_mut().filter(|entry| !entry.is_over()) {
            if !entry.begun && entry.disks.is_disjoint(&taken) {
                entry.begun = true;
                ready.push(entry.clone());
            }
            taken.extend(entry.disks.iter().cloned());
        }
        for entry in ready {
            let (own, thread) = (Arc::clone(inner), std::thread::Builder::new().name("job".to_owned()));
            let job = Arc::clone(&entry.job);
            let spawned = thread.spawn(move || {
                Self::run(&own, &entry);
                Self::start_ready(&own);
            });
            match spawned {
                Ok(thread) => list.threads.push(thread),
                Err(error) => {
                    // It stays on the list, created, and can be cancelled; the next job that ends or begins starts it too.
                    error!(%error, "a job's thread can not be started");
                    let same = list.entries.iter_mut().filter(|entry| Arc::ptr_eq(&entry.job, &job));
                    same.for_each(|entry| entry.begun = false);
                }
            }
        }
    }

    /// A job's life, on its own thread.
    fn run(inner: &Arc<Self>, entry: &Entry) {
        let (job, Some(task)) = (&entry.job, &entry.task) else { return };
        match Work::new(&inner.world, job, task).run() {
            Err(Halt::Stopped) => info!(job = job.id(), "stopped: the next run goes on with it"),
            worked => inner.finish(entry, worked),
        }
    }

    /// Concludes a job whose work has ended.
    pub(super) fn finish(&self, entry: &Entry, worked: std::result::Result<(), Halt>) {
        let id = entry.job.id();
        let failed = |story| {
            entry.job.fail();
            Some(story)
        };
        let story = match worked {
            Ok(()) => {
                info!(job = id, "done");
                None
            }
            Err(Halt::Stopped) => failed("the daemon ended".to_owned()),
            Err(Halt::Cancelled) => Some(CANCELLED.to_owned()),
            Err(Halt::Failed(error)) => failed(error.to_string()),
        };
        if let Some(story) = &story {
            warn!(job = id, story, "the job did not succeed");
            entry.job.call_off_group();
        }
        self.conclude(entry, story);
    }

    /// The end of a job that did not succeed, or did.
    fn conclude(&self, entry: &Entry, story: Option<String>) {
        let job = &entry.job;
        if story.is_some() && job.identity.automatic {
            entry.disks.iter().for_each(|disk| self.list().tidiness.failed(disk, Instant::now()));
        }
        if let Err(error) = job.conclude(story) {
            error!(%error, job = job.identity.id, "a job ended where it could not");
        }
        if job.identity.auto_dismiss
            && let Err(error) = self.dismiss(job)
        {
            error!(%error, job = job.identity.id, "a job can not be dismissed");
        }
    }

    /// Takes a job from the list that will not begin.
    pub(super) fn withdraw(&self, job: &Arc<Job>) {
        if let Err(error) = self.dismiss(job) {
            error!(%error, job = job.id(), "a job had begun that was to be withdrawn");
        }
    }

    fn dismiss(&self, job: &Arc<Job>) -> Result<()> {
        // At once: whoever asks finds no job that is gone, and its id is free.
        let mut list = self.list();
        job.go(JobStatus::Null)?;
        list.entries.retain(|entry| !Arc::ptr_eq(&entry.job, job));
        Ok(())
    }

    /// Ends a job that has been called off before it began.
    fn cancel_waiting(inner: &Arc<Self>, job: &Arc<Job>) {
        let waiting = {
            let mut list = inner.list();
            let found = list.entries.iter_mut().find(|entry| Arc::ptr_eq(&entry.job, job) && !entry.begun);
            found.map(|entry| {
                entry.begun = true;
                entry.clone()
            })
        };
        if let Some(entry) = waiting {
            if let Err(error) = job.go(JobStatus::Aborting).and_then(|()| inner.forget(&job.identity.id)) {
                warn!(%error, job = job.identity.id, "a job that was called off may come back");
            }
            inner.conclude(&entry, Some(CANCELLED.to_owned()));
            Self::start_ready(inner);
        }
    }

    fn forget(&self, id: &str) -> Result<()> {
        self.world.store.update(|manifest| {
            manifest.jobs.retain(|record| record.id != id);
            Ok(())
        })
    }

    /// Writes a job's settings down. That they can not be is no reason not to follow them.
    fn remember(&self, job: &Job) {
        let (speed, paused) = job.settings();
        let written = self.world.store.update(|manifest| {
            for record in manifest.jobs.iter_mut().filter(|record| record.id == job.identity.id) {
                (record.speed, record.paused) = (speed, paused);
            }
            Ok(())
        });
        if let Err(error) = written {
            warn!(%error, job = job.identity.id, "a job's settings would be forgotten by a restart");
        }
    }
}

/// QEMU's rule for ids (`id_wellformed`), and a bound.
fn check_id(id: &str) -> Result<()> {
    let starts_well = id.bytes().next().is_some_and(|first| first.is_ascii_alphabetic());
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    match starts_well && id.len() <= 128 && id.bytes().all(allowed) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::InvalidInput, format!("Invalid job ID '{id}'"))),
    }
}
