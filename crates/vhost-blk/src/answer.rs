//! Answers: the status byte, the log of dirty pages, the front-end's record, the used ring and the call, in this order.

use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::Bytes;

use crate::complaint::Complaints;
use crate::dirty::Dirty;
use crate::guest::Memory;
use crate::inflight::QueueRecord;
use crate::slot::Slot;
use crate::vring::Vring;

/// What a front-end wants to be noted of a ring's answers.
pub(crate) struct Tracks<'a> {
    pub(crate) record: Option<&'a QueueRecord>,
    pub(crate) dirty: &'a Dirty,
    pub(crate) queue: usize,
}

/// Writes the used ring entries of these requests, and calls the driver if it wants to be.
pub(crate) fn answer<'a>(
    vring: &Vring,
    memory: &Memory,
    tracks: &Tracks<'_>,
    ended: impl Iterator<Item = &'a Slot>,
    complaints: &mut Complaints,
) {
    let mut state = vring.get_mut();
    let queue = state.get_queue_mut();
    let (record, marks) = (tracks.record, tracks.dirty.marks(tracks.queue, queue.size()));
    for slot in ended {
        let len = write_status(slot);
        marks.iter().for_each(|marks| marks.request(slot));
        record.inspect(|record| record.answering(slot.head));
        match queue.add_used(memory, slot.head, len) {
            Ok(()) => drop(record.inspect(|record| record.answered(slot.head, queue.next_used()))),
            Err(error) => complaints.ring("could not write to the used ring", &error),
        }
        marks.iter().for_each(|marks| marks.entry(queue.next_used()));
    }
    drop(marks);
    if queue.needs_notification(memory).unwrap_or(true)
        && let Err(error) = vring.call(&state)
    {
        complaints.ring("could not call the driver", &error);
    }
}

/// Writes the status byte, and returns how many bytes of the chain were written in all: none if the status could not
/// be, for then the driver must not trust the rest.
fn write_status(slot: &Slot) -> u32 {
    let written = match (slot.status_at, slot.buffer.memory()) {
        (Some(addr), Some(memory)) => memory.write_obj(slot.status as u8, addr).is_ok(),
        _ => false,
    };
    if written { slot.written.saturating_add(1) } else { 0 }
}
