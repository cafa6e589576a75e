//! All disks standing still, until they are told to go on: QEMU's `stop` and `cont`, as far as disks go.

use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::{Closed, Error, ErrorKind, Result};

use super::Manager;
use crate::cut::Events;
use crate::model::{Event, FreezePolicy};

/// How long the requests in flight are waited for.
const PATIENCE: Duration = Duration::from_secs(10);

impl Manager {
    /// Takes no more requests, of any disk, and waits for those in flight: the guest's wait in its own rings. Cuts go on as
    /// ever. Without effect if it is so already. If the requests in flight do not end, all is as before.
    pub fn stop(&self) -> Result<()> {
        if self.is_stopped() {
            return Ok(());
        }
        let closed: Vec<_> = self.disks.values().map(|disk| disk.chain.gate().close()).collect();
        let deadline = Instant::now() + PATIENCE;
        closed.iter().try_for_each(|closed| closed.drain(deadline))?;
        let mut stopped = self.stopped();
        if stopped.is_none() {
            *stopped = Some(closed);
            self.bus.emit(Event::Stopped {});
        }
        Ok(())
    }

    /// Takes requests again, and has those tried again that wait for the host.
    pub fn go_on(&self) {
        let mut stopped = self.stopped();
        if stopped.take().is_some() {
            self.bus.emit(Event::Resumed {});
        }
        drop(stopped);
        self.disks.values().for_each(|disk| disk.chain.parking().resume());
    }

    /// Whether the disks stand still.
    pub fn is_stopped(&self) -> bool {
        self.stopped().is_some()
    }

    /// What to do about the agent, if this is asked. A guest whose disks stand still can not freeze: it would have to write
    /// first, and a freeze that comes too late is worse than none.
    pub(super) fn possible_freeze(&self, asked: FreezePolicy) -> Result<FreezePolicy> {
        match (self.freezer.is_some() && self.is_stopped(), asked) {
            (true, FreezePolicy::Require) => Err(Error::new(
                ErrorKind::Busy,
                "the disks are stopped, so the guest can not freeze: cont first",
            )),
            (true, FreezePolicy::Prefer) => Ok(FreezePolicy::Never),
            _ => Ok(asked),
        }
    }

    fn stopped(&self) -> MutexGuard<'_, Option<Vec<Closed>>> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
