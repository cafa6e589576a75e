//! A copy to a target, steered as clients steer jobs.

use std::sync::Arc;

use block::{DirtyBitmap, Error, ErrorKind, Result};
use snapshot::{CopyFailure, DiskCopy, ErrorAction, Halt, IoOperation, Job, Pin};
use tracing::warn;

use crate::model::OnError;
use crate::nodes::Writing;

/// What a job does about I/O that fails.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policies {
    pub(crate) read: OnError,
    pub(crate) write: OnError,
}

/// A disk as it was, and what of it goes to a target.
pub(crate) struct Copying {
    pub(crate) copy: DiskCopy,
    target: Writing,
    policies: Policies,
}

impl Copying {
    /// From the disk of `pin`, which the caller keeps: what is marked, or all.
    pub(crate) fn new(
        pin: &Pin,
        target: Writing,
        marked: Option<DirtyBitmap>,
        compress: bool,
        policies: Policies,
    ) -> Result<Self> {
        let mut copy = DiskCopy::new(pin.disk(), Arc::clone(target.disk()), marked);
        if compress {
            copy = copy.compressed(target.compressible()?);
        }
        Ok(Self { copy, target, policies })
    }

    /// Where it writes, for people.
    pub(crate) fn target(&self) -> String {
        self.target.told()
    }

    /// Copies all, and brings it onto stable storage. `pause` is asked between two pieces, and its error ends it.
    pub(crate) fn run(
        &mut self,
        job: &Job,
        pause: impl Fn(&Job) -> std::result::Result<(), Halt>,
    ) -> std::result::Result<(), Halt> {
        loop {
            pause(job)?;
            match self.copy.step(job.allowance()) {
                Ok(None) => break,
                Ok(Some(copied)) => {
                    job.copied(copied);
                    self.target.relieve()?;
                }
                Err(failure) => self.heed(job, failure)?,
            }
        }
        Ok(self.flush()?)
    }

    /// What was copied so far is on stable storage when this returns. If that failed once, it does so again.
    pub(crate) fn flush(&self) -> Result<()> {
        self.target.disk().flush().run()
    }

    /// Does as the policy says: the piece is tried again, or left out, or the job fails.
    fn heed(&mut self, job: &Job, failure: CopyFailure) -> std::result::Result<(), Halt> {
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
                Ok(job.pause()?)
            }
            ErrorAction::Ignore => {
                let left_out = self.copy.skip();
                warn!(job = job.id(), %error, ?left_out, "left out");
                Ok(())
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
