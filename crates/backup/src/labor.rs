//! The work of jobs: of a backup, copy, make durable, clean the bitmap.

use std::sync::Arc;
use std::time::Duration;

use block::{Error, ErrorKind};
use snapshot::{BitmapLock, CopyFailure, DiskCopy, ErrorAction, Halt, IoOperation, Job, Labor, Pin};
use tracing::warn;

use crate::model::OnError;
use crate::nodes::{Access, Creation, Writing};

/// What a job does about I/O that fails.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policies {
    pub(crate) read: OnError,
    pub(crate) write: OnError,
}

/// One backup.
pub(crate) struct Backup {
    pub(crate) copy: DiskCopy,
    pub(crate) target: Writing,
    pub(crate) policies: Policies,
    /// Keeps what is read as it was.
    pub(crate) pin: Arc<Pin>,
    /// The bitmaps that are used, and whether each becomes clean.
    pub(crate) bitmaps: Vec<(BitmapLock, bool)>,
    /// The node that is read, if the disk is not read itself: it can not be removed meanwhile.
    pub(crate) _access: Option<Arc<Access>>,
}

impl Labor for Backup {
    fn run(mut self: Box<Self>, job: &Job) -> Result<(), Halt> {
        job.set_total(self.copy.total());
        let whole = self.copy(job)?;
        self.target.disk().flush().run()?;
        job.finalize_point()?;
        for (bitmap, _) in self.bitmaps.iter().filter(|(_, cleans)| *cleans) {
            match whole {
                true => bitmap.restart(&self.pin)?,
                false => warn!(job = job.id(), "something was left out, so the bitmap stays dirty"),
            }
        }
        Ok(())
    }
}

/// An image that is made: QEMU counts it as one.
impl Labor for Creation {
    fn run(self: Box<Self>, job: &Job) -> Result<(), Halt> {
        job.set_total(1);
        Creation::run(&self)?;
        job.copied(1);
        job.finalize_point()
    }
}

impl Backup {
    /// Copies all; whether nothing was left out.
    fn copy(&mut self, job: &Job) -> Result<bool, Halt> {
        let mut whole = true;
        loop {
            job.pause_point(Duration::ZERO)?;
            match self.copy.step() {
                Ok(None) => return Ok(whole),
                Ok(Some(copied)) => {
                    job.copied(copied);
                    self.target.relieve()?;
                }
                Err(failure) => whole &= self.heed(job, failure)?,
            }
        }
    }

    /// Does as the policy says; whether the piece will be tried again.
    fn heed(&mut self, job: &Job, failure: CopyFailure) -> Result<bool, Halt> {
        let (operation, policy, error) = match failure {
            CopyFailure::Read(error) => (IoOperation::Read, self.policies.read, error),
            CopyFailure::Write(error) => (IoOperation::Write, self.policies.write, error),
        };
        let action = action(policy, &error);
        job.tell_error(operation, action);
        match action {
            ErrorAction::Report => Err(Halt::Failed(error)),
            ErrorAction::Stop => {
                warn!(job = job.id(), %error, "paused until it is resumed");
                job.pause()?;
                Ok(true)
            }
            ErrorAction::Ignore => {
                let left_out = self.copy.skip();
                warn!(job = job.id(), %error, ?left_out, "left out");
                Ok(false)
            }
        }
    }
}

/// What an error leads to. One that is final for the target can not be waited out.
fn action(policy: OnError, error: &Error) -> ErrorAction {
    match policy {
        _ if error.kind() == ErrorKind::Latched => ErrorAction::Report,
        OnError::Enospc if error.kind() == ErrorKind::NoSpace => ErrorAction::Stop,
        OnError::Report | OnError::Enospc => ErrorAction::Report,
        OnError::Stop => ErrorAction::Stop,
        OnError::Ignore => ErrorAction::Ignore,
    }
}
