//! Requests that the host could not carry out: they leave their slots for the [`Lot`](crate::lot::Lot), and are tried anew.

use super::{NO_SLOT, Worker};
use crate::answer::{Tracks, answer};
use crate::request::Status;
use crate::vring::Vring;

impl Worker {
    /// Takes the requests out of their slots that are to be parked. They are outside of the gate then.
    pub(super) fn park(&mut self) {
        let ends = self.state.is_stopping() && !self.leaves();
        for (index, kind) in std::mem::take(&mut self.engine.stalled) {
            let Some(slot) = self.slots.get_mut(usize::from(index)) else { continue };
            if ends || self.lot.is_full() {
                self.engine.finish(index, slot, Status::IoError);
                continue;
            }
            self.lot.add(std::mem::take(slot), kind);
            self.beat.untime(index);
            self.free.push(index);
            self.lane.leave(1);
        }
        if self.leaves() {
            self.state.bell.ring();
        }
    }

    /// Whether requests that wait for the host are left to the front-end's record, instead of ending with an error: the
    /// session ends, and the next one finds them there. A ring that is stopped within a session may be moved to where
    /// nobody has the record.
    fn leaves(&self) -> bool {
        self.state.is_closing() && self.record.is_some()
    }

    /// Begins what is parked anew if it is time to, as far as the gate and the slots allow; `false` if there was nothing
    /// to do. Whoever changes what the gate or the slots forbid wakes the worker.
    pub(super) fn unpark(&mut self, vring: &Vring) -> bool {
        if self.state.is_stopping() {
            self.give_up(vring);
            return true;
        }
        let mut any = false;
        while self.lot.is_due() && !self.free.is_empty() && self.lane.enter() {
            let (Some(slot), Some(index)) = (self.lot.take(), self.free.pop()) else { break };
            if let Some(place) = self.slots.get_mut(usize::from(index)) {
                *place = slot;
                self.engine.begin(index, place);
            }
            any = true;
        }
        any
    }

    /// Answers what is parked with an error, for its ring is being stopped, or leaves it to the record.
    fn give_up(&mut self, vring: &Vring) {
        let mut all = self.lot.empty();
        if self.leaves() {
            tracing::info!(
                requests = all.len(),
                "requests that waited for the host wait for the next session"
            );
            all.iter().for_each(|_| self.beat.ended(NO_SLOT, None));
            return self.state.answered(all.len());
        }
        for slot in &mut all {
            (slot.status, slot.written) = (Status::IoError, 0);
            self.beat.ended(NO_SLOT, slot.ended());
        }
        tracing::warn!(
            requests = all.len(),
            "requests that waited for the host end with an error: their ring stops"
        );
        let tracks = Tracks { record: self.record.as_ref(), dirty: &self.dirty, queue: self.queue };
        answer(vring, &self.hold, &tracks, all.iter(), &mut self.complaints);
        self.state.answered(all.len());
    }
}
