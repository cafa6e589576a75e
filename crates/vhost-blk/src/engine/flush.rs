//! Flushes: the disk names files, the ring syncs them, and the disk is asked for the next step.

use std::task::Poll;

use block::{FlushStep, Result};
use hostio::Completion;

use super::{Engine, tag};
use crate::request::Status;
use crate::slot::Slot;

impl Engine {
    pub(super) fn begin_flush(&mut self, index: u16, slot: &mut Slot) {
        slot.flush = Some(self.disk.flush());
        self.step_flush(index, slot, Ok(()));
    }

    pub(super) fn step_flush(&mut self, index: u16, slot: &mut Slot, mut last: Result<()>) {
        loop {
            let Some(flush) = &mut slot.flush else { return };
            // After a failed sync no later one could be trusted, so none is tried.
            let lost = last.is_err();
            match flush.step(last, &self.waker) {
                Poll::Pending => return self.deferred.push(index),
                Poll::Ready(Err(error)) if lost => return self.report(index, slot, &error),
                Poll::Ready(Err(error)) => return self.fail(index, slot, error),
                Poll::Ready(Ok(FlushStep::Done)) => return self.finish(index, slot, Status::Ok),
                Poll::Ready(Ok(FlushStep::Sync(storages))) => slot.syncs = storages,
            }
            last = self.begin_syncs(index, slot);
            if slot.pending > 0 {
                // Told with the others when the last one has ended.
                if let Err(error) = last {
                    slot.fail(error);
                }
                return;
            }
        }
    }

    /// Begins the syncs that the ring can do, does the others.
    fn begin_syncs(&mut self, index: u16, slot: &mut Slot) -> Result<()> {
        let mut result = Ok(());
        for (part, storage) in slot.syncs.iter().enumerate() {
            match storage.fd().map(|fd| self.ring.sync_data(fd, tag(index, part))) {
                Some(Ok(())) => slot.pending += 1,
                _ => result = result.and(storage.sync()),
            }
        }
        result
    }

    pub(super) fn synced(&mut self, index: u16, slot: &mut Slot, completion: Completion) {
        if let Err(error) = completion.result {
            slot.fail(error.into());
        }
        if slot.pending == 0 {
            let last = slot.failed.take().map_or(Ok(()), Err);
            self.step_flush(index, slot, last);
        }
    }
}
