//! A backup of what the guest overwrites while it runs: QEMU's `sync: none`.
//!
//! QEMU copies the old bytes to the target before each first write of the guest. Here a pin keeps them, and they are copied
//! when the job is called off, which is the only way in which it ends. An image over the disk shows them meanwhile
//! ([`Backing`](crate::nodes::Backing)).

use std::sync::Arc;
use std::time::Duration;

use snapshot::{Halt, Job, Labor, Pin};

use crate::copying::{Copying, Policies};
use crate::model::OnError;
use crate::nodes::{Shown, Writing};

/// It sleeps for so long, or until somebody wants something of it.
const LONG: Duration = Duration::from_secs(3600);

/// The work of such a job.
pub(crate) struct Fleece {
    /// Keeps the disk as it was.
    pub(crate) pin: Arc<Pin>,
    pub(crate) target: Writing,
    pub(crate) policies: Policies,
    pub(crate) compress: bool,
    /// Has the target show the disk beneath it as it was.
    pub(crate) _shown: Option<Arc<Shown>>,
}

impl Labor for Fleece {
    fn makes(&self) -> String {
        format!("backup of disk {} to {}", self.pin.id(), self.target.told())
    }

    fn run(self: Box<Self>, job: &Job) -> Result<(), Halt> {
        // As in QEMU, any of it might be overwritten.
        job.set_total(self.pin.disk().capacity());
        loop {
            match job.pause_point(LONG) {
                Ok(()) => {}
                Err(Halt::Cancelled) => break,
                Err(halt) => return Err(halt),
            }
        }
        self.close(job)?;
        Err(Halt::Cancelled)
    }
}

impl Fleece {
    /// Copies what has been overwritten.
    fn close(self, job: &Job) -> Result<(), Halt> {
        let Self { pin, target, policies, compress, _shown } = self;
        let overwritten = pin.changes()?.into_bitmap();
        // Nobody resumes a job that has been called off.
        let at_once = |policy| if policy == OnError::Ignore { policy } else { OnError::Report };
        let policies = Policies { read: at_once(policies.read), write: at_once(policies.write) };
        Copying::new(&pin, target, Some(overwritten), compress, policies)?.run(job, Job::closing_point)
    }
}
