//! Jobs whose work is another's business: a backup, the making of an image.
//!
//! They are on the same list, are steered by the same commands and end with the same events as the jobs that merge layers.
//! The manifest knows nothing of them: as in QEMU, they end with the daemon. If that is killed, a note of each has the next one say
//! so ([`notes`](super::notes)).

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use block::{Context, Error, ErrorKind, Result};
use tracing::warn;

use super::group::JobGroup;
use super::job::{Halt, Identity, Job};
use super::model::{ClientId, JobStatus, JobType};
use super::notes::Note;
use super::runner::{Entry, Inner};
use crate::manager::Manager;
use crate::store::NOTES;

/// The work of a hosted job.
pub trait Labor: Send {
    /// What it makes, and from what, for people.
    fn makes(&self) -> String;

    /// All of it, on the job's own thread. It asks [`Job::pause_point`] between two pieces, and [`Job::finalize_point`] before
    /// what can not be undone; on an error it has put away what it began.
    fn run(self: Box<Self>, job: &Job) -> std::result::Result<(), Halt>;
}

/// What is asked of a hosted job: the members that QEMU's job commands share.
#[derive(Clone, Debug)]
pub struct HostedJob {
    /// Its id, unique.
    pub id: String,
    /// What it does.
    pub kind: JobType,
    /// Bytes a second to copy at most; 0 for no limit.
    pub speed: u64,
    /// Whether its last step needs nobody.
    pub auto_finalize: bool,
    /// Whether it goes from the list by itself when it has concluded.
    pub auto_dismiss: bool,
    /// Who asks.
    pub client: Option<ClientId>,
    /// Those that it ends with; it ends by itself if `None`.
    pub group: Option<Arc<JobGroup>>,
}

/// A job that has its place on the list and has not begun. It vanishes when this is dropped.
pub struct Seat {
    inner: Arc<Inner>,
    /// `None` once it has begun.
    entry: Option<Entry>,
}

impl Manager {
    /// Enters a job that begins later: so that a transaction knows of a job that can not be before it has done anything.
    pub fn enter_job(&self, asked: HostedJob) -> Result<Seat> {
        let inner = Arc::clone(&self.jobs.0);
        let mut list = inner.list();
        list.admit(&asked.id, false)?;
        let HostedJob { id, kind, speed, auto_finalize, auto_dismiss, client, group } = asked;
        let identity = Identity { id, kind, automatic: false, auto_finalize, auto_dismiss, client, group };
        let events = Arc::clone(&inner.world.bus) as _;
        let job = Arc::new(Job::new(identity, speed, false, events));
        if let Some(group) = &job.identity.group {
            group.join(&job);
        }
        // Begun: the list starts no work of chains for it.
        let entry = Entry { job, task: None, disks: BTreeSet::new(), begun: true };
        list.entries.push(entry.clone());
        drop(list);
        Ok(Seat { inner, entry: Some(entry) })
    }
}

impl Seat {
    /// The job's id.
    pub fn id(&self) -> &str {
        self.entry.as_ref().map_or("", |entry| entry.job.id())
    }

    /// Begins the work on a thread of its own.
    pub fn start(mut self, labor: Box<dyn Labor>) -> Result<()> {
        let Some(entry) = self.entry.clone() else { return Ok(()) };
        let (inner, own) = (Arc::clone(&self.inner), entry.clone());
        let folder = self.inner.world.store.file(NOTES);
        // Without room for it the job is done all the same.
        let note = Note::leave(&folder, own.job.id(), &labor.makes());
        let note = note.inspect_err(|error| warn!(%error, "a kill during this job would not be told of"));
        let thread = std::thread::Builder::new().name("job".to_owned());
        // Held until the thread is on the list: who ends the daemon waits for it, or it does not begin.
        let mut list = self.inner.list();
        list.check_running()?;
        let spawned = thread.spawn(move || {
            let worked = entry.job.go(JobStatus::Running).map_err(Halt::from);
            let worked = worked.and_then(|()| run(labor, &entry.job)).or_else(|halt| {
                entry.job.go(JobStatus::Aborting)?;
                Err(halt)
            });
            drop(note);
            inner.finish(&entry, worked);
        });
        let thread = spawned.context(|| format!("start job '{}'", own.job.id()))?;
        list.threads.push(thread);
        drop(list);
        self.entry = None;
        Ok(())
    }
}

/// A labor that panics fails its job and nothing else: the job must not stay on the list for ever.
fn run(labor: Box<dyn Labor>, job: &Job) -> std::result::Result<(), Halt> {
    catch_unwind(AssertUnwindSafe(|| labor.run(job))).unwrap_or_else(|_| {
        let story = "an internal error: the daemon's standard error tells more";
        Err(Halt::Failed(Error::new(ErrorKind::Io, story)))
    })
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.inner.withdraw(&entry.job);
        }
    }
}
