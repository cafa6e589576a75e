//! The work of jobs: of a backup, copy, make durable, clean the bitmap.

use std::sync::Arc;
use std::time::Duration;

use snapshot::{BitmapLock, Halt, Job, Labor, Pin};
use tracing::warn;

use crate::copying::Copying;
use crate::nodes::{Access, Creation};

/// What becomes of a bitmap at the end of a job.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Ending {
    /// It stays as it is.
    Stays,
    /// It is clean if all was copied.
    OnSuccess,
    /// What was copied is clean, however the job ended.
    Always,
}

/// One backup.
pub(crate) struct Backup {
    pub(crate) copying: Copying,
    /// Keeps what is read as it was.
    pub(crate) pin: Arc<Pin>,
    /// The bitmaps that are used.
    pub(crate) bitmaps: Vec<(BitmapLock, Ending)>,
    /// The node that is read, if the disk is not read itself: it can not be removed meanwhile.
    pub(crate) _access: Option<Arc<Access>>,
}

impl Labor for Backup {
    fn makes(&self) -> String {
        format!("backup of disk {} to {}", self.pin.id(), self.copying.target())
    }

    fn run(mut self: Box<Self>, job: &Job) -> Result<(), Halt> {
        job.set_total(self.copying.copy.total());
        let worked = self.work(job);
        if worked.is_err() {
            // The job's error is the one to tell; a bitmap that could not be changed tells too much, never too little.
            if let Err(error) = self.note_copied() {
                warn!(job = job.id(), %error, "the bitmap stays as it was");
            }
            return worked;
        }
        for (bitmap, ending) in &self.bitmaps {
            match (ending, self.copying.copy.is_whole()) {
                (Ending::Stays, _) => {}
                (Ending::OnSuccess, false) => {
                    warn!(job = job.id(), "something was left out, so the bitmap stays dirty");
                }
                _ => bitmap.restart(&self.pin, |left| self.copying.copy.mark_left(left))?,
            }
        }
        Ok(())
    }
}

/// An image that is made: QEMU counts it as one.
impl Labor for Creation {
    fn makes(&self) -> String {
        format!("image in {}", self.path().display())
    }

    fn run(self: Box<Self>, job: &Job) -> Result<(), Halt> {
        job.set_total(1);
        Creation::run(&self)?;
        job.copied(1);
        job.finalize_point()
    }
}

impl Backup {
    /// All but what becomes of the bitmaps.
    fn work(&mut self, job: &Job) -> Result<(), Halt> {
        self.copying.run(job, |job| job.pause_point(Duration::ZERO))?;
        job.finalize_point()
    }

    /// The job did not succeed. What it has copied is clean nevertheless in a bitmap that is to say so, once that is on stable
    /// storage.
    fn note_copied(&self) -> block::Result<()> {
        for (bitmap, _) in self.bitmaps.iter().filter(|(_, ending)| *ending == Ending::Always) {
            self.copying.flush()?;
            bitmap.restart(&self.pin, |left| self.copying.copy.mark_left(left))?;
        }
        Ok(())
    }
}
