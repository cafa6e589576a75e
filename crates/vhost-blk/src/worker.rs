//! A virtqueue's worker: from its ring, through the gate, to the engine, and back.
//!
//! A *turn* is what a worker does when an event wakes it. It goes round until there is nothing left to do:
//! ```text
//!   ┌─▶ reap completions ─▶ ask deferred again ─▶ pop requests ─▶ begin them ─▶ submit ─▶ publish ─┐
//!   └──────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//! A ring that is started goes on with what the front-end's record says was in flight (see [`inflight`](crate::inflight)).
//! What the host can not carry out leaves its slot for the [`Lot`], and takes one again when it is tried anew.
//!
//! Before it rests it looks at the ring a little longer, as long as that pays (see [`Patience`]), and then asks the
//! driver to kick. The vring's lock is held while popping and while publishing, never over I/O, so that the session's messages are
//! answered meanwhile.

mod parked;

use std::collections::VecDeque;
use std::num::Wrapping;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Beat, Disk, Gate, Lane, Parking, Pulse, Result};
use hostio::Ring;
use vhost_user_backend::VringT;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace};

use crate::answer::{Tracks, answer};
use crate::cache::CacheMode;
use crate::chain::{Chain, Table};
use crate::complaint::Complaints;
use crate::dirty::{Dirty, Marks};
use crate::engine::{Engine, ID_LEN};
use crate::errors::{Errors, OnFailure};
use crate::floor::Claim;
use crate::guest::{Hold, Memory};
use crate::inflight::{QueueRecord, Records};
use crate::lot::Lot;
use crate::maps::Maps;
use crate::patience::Patience;
use crate::queue_state::QueueState;
use crate::request::Segments;
use crate::slot::Slot;
use crate::vring::{SharedMemory, Vring};

/// Requests in flight of one queue. What a driver offers beyond them waits in its ring.
const SLOTS: u16 = 256;

/// No slot's number: of requests that end outside of one.
const NO_SLOT: u16 = SLOTS;

/// Requests popped at a time; the ones in a batch are answered together.
const BATCH: usize = 32;

/// Rounds in a turn, before other events get theirs.
const ROUNDS: usize = 64;

/// Entries of the io_uring; a request that needs more submits early.
const RING_ENTRIES: u32 = 128;

/// What a worker is made of.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) queue: usize,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) serial: [u8; ID_LEN],
    pub(crate) gate: Arc<Gate>,
    pub(crate) pulse: Arc<Pulse>,
    pub(crate) parking: Arc<Parking>,
    pub(crate) on_failure: OnFailure,
    pub(crate) cache: Arc<CacheMode>,
    pub(crate) maps: Arc<Maps>,
    pub(crate) records: Records,
    pub(crate) dirty: Arc<Dirty>,
    pub(crate) claim: Arc<Claim>,
    pub(crate) state: Arc<QueueState>,
}

/// How popping went.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Popped {
    /// So many; the ring may hold more.
    Some,
    /// The ring is empty.
    Empty,
    /// The ring may hold requests, but none may be taken now. Whoever changes that wakes the worker: the gate's waker,
    /// a completion that frees a slot, the session that starts the ring, or one that gives up the floor.
    Blocked,
}

/// One virtqueue's worker, driven by one thread.
pub(crate) struct Worker {
    engine: Engine,
    /// `Box`, for the kernel holds on to what is in a slot.
    slots: Box<[Slot]>,
    free: Vec<u16>,
    /// Popped, and not yet begun.
    popped: Vec<u16>,
    segments: Segments,
    /// Before a rest with nothing in flight.
    idle: Patience,
    /// Before a rest with requests in flight.
    busy: Patience,
    lane: Lane,
    beat: Beat,
    lot: Lot,
    state: Arc<QueueState>,
    queue: usize,
    maps: Arc<Maps>,
    memory: SharedMemory,
    hold: Hold,
    /// Holds on to a map that is not the current one, or did.
    behind: bool,
    records: Records,
    cache: Arc<CacheMode>,
    /// The ring's part of the front-end's record, if it has given one.
    record: Option<QueueRecord>,
    /// Heads that are to be submitted again, before anything new is.
    again: VecDeque<u16>,
    dirty: Arc<Dirty>,
    claim: Arc<Claim>,
    complaints: Complaints,
}

impl Worker {
    pub(crate) fn new(parts: Parts) -> Result<Self> {
        let waker = std::task::Waker::from(Arc::clone(&parts.state.bell));
        let complaints = || Complaints::new(parts.name.clone(), parts.queue);
        let memory = parts.maps.current();
        let errors = Errors::new(parts.parking.policy(), complaints(), parts.on_failure);
        Ok(Self {
            engine: Engine::new(
                parts.disk,
                parts.serial,
                Arc::clone(&parts.cache),
                Ring::new(RING_ENTRIES)?,
                waker.clone(),
                errors,
            ),
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            free: (0..SLOTS).rev().collect(),
            popped: Vec::with_capacity(BATCH),
            segments: Segments::default(),
            idle: Patience::default(),
            busy: Patience::default(),
            lot: Lot::new(parts.parking.bay(waker.clone()))?,
            lane: parts.gate.lane(waker),
            beat: parts.pulse.beat(),
            hold: Arc::new(memory.memory().into_inner()),
            memory,
            behind: false,
            maps: parts.maps,
            queue: parts.queue,
            records: parts.records,
            cache: parts.cache,
            record: None,
            again: VecDeque::new(),
            dirty: parts.dirty,
            claim: parts.claim,
            complaints: complaints(),
            state: parts.state,
        })
    }

    /// The timer of what is parked, to be watched.
    pub(crate) fn timer(&self) -> RawFd {
        self.lot.timer()
    }

    /// The io_uring, to be watched for completions.
    pub(crate) fn ring(&self) -> &Ring {
        self.engine.ring()
    }

    /// Does what there is to do.
    pub(crate) fn turn(&mut self, vring: &Vring) {
        for _ in 0..ROUNDS {
            let woken = self.state.bell.answer();
            self.refresh_memory();
            let mut busy = self.engine.reap(&mut self.slots);
            // A finished request may be what a deferred one waits for, and then the bell has rung.
            if woken {
                self.engine.retry(&mut self.slots);
            }
            busy |= self.lot.len() > 0 && self.unpark(vring);
            // What takes long to look up is left for the next round: what has ended is answered before.
            let popped = if self.popped.is_empty() { self.pop(vring) } else { Popped::Some };
            self.engine.begin_some(&mut self.popped, &mut self.slots);
            if let Err(error) = self.engine.submit() {
                self.complaints.ring("could not submit, trying again", &error);
                self.state.bell.ring();
            }
            self.park();
            busy |= self.publish(vring) || popped == Popped::Some;
            if !busy && (popped == Popped::Blocked || !(self.linger(vring) || self.rearm(vring))) {
                self.beat.rest();
                self.behind = self.behind && !self.maps.prune();
                return self.state.rest();
            }
        }
        self.state.bell.ring();
    }

    /// Follows the front-end's changes of the memory table, so that a region it took away is not kept.
    fn refresh_memory(&mut self) {
        let current = self.memory.memory();
        if !ptr::eq::<Memory>(&*current, &**self.hold) {
            self.hold = Arc::new(current.into_inner());
            self.behind = true;
        }
    }

    /// Pops a batch of requests into slots; the one before has been begun.
    fn pop(&mut self, vring: &Vring) -> Popped {
        let mut state = vring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() || self.state.is_closing() {
            return Popped::Blocked;
        }
        if vring.owes_call()
            && let Err(error) = vring.call(&state)
        {
            self.complaints.ring("could not call the driver", &error);
        }
        let queue = state.get_queue_mut();
        if vring.take_started() {
            if !self.claim.take(self.queue, &self.state.bell) {
                vring.put_started();
                return Popped::Blocked;
            }
            if let Err(error) = self.start(queue) {
                vring.put_started();
                return self.broken(&error);
            }
        }
        let next = Wrapping(queue.next_avail());
        let waiting = match queue.avail_idx::<Memory>(&self.hold, Ordering::Acquire) {
            Ok(offered) => usize::from((offered - next).0),
            Err(error) => return self.broken(&error),
        };
        if waiting == 0 && self.again.is_empty() {
            return Popped::Empty;
        }
        // Only now: these requests may be in memory that was added just before they were offered.
        self.refresh_memory();
        match self.pop_some(queue, waiting) {
            Ok(popped) => popped,
            Err(error) => self.broken(&error),
        }
    }

    /// Pops of what is to be submitted again and of the `waiting` requests in the ring, as many as there is room for.
    fn pop_some(&mut self, queue: &mut Queue, waiting: usize) -> std::result::Result<Popped, QueueError> {
        let hold = Arc::clone(&self.hold);
        let memory: &Memory = &hold;
        queue.disable_notification(memory)?;
        self.dirty.marks(self.queue, queue.size()).iter().for_each(Marks::notification);
        let table = Table { addr: GuestAddress(queue.desc_table()), size: queue.size() };
        let mut offered = queue.iter(memory)?;
        let (mut blocked, all) = (false, waiting + self.again.len());
        while self.popped.len() < BATCH.min(all) {
            let Some(index) = self.free.pop_if(|_| self.lane.enter()) else {
                blocked = true;
                break;
            };
            let again = self.again.pop_front();
            let Some(head) = again.or_else(|| offered.next().map(|chain| chain.head_index())) else {
                // The ring has shrunk, or is not all in memory.
                self.free.push(index);
                self.lane.leave(1);
                blocked = true;
                break;
            };
            if let (Some(record), None) = (&mut self.record, again) {
                record.taken(head);
            }
            let request = self.segments.read(memory, Chain::new(memory, table, head));
            if let Some(slot) = self.slots.get_mut(usize::from(index)) {
                slot.fill(head, &request, &self.segments, &hold);
            }
            self.beat.begun(index);
            self.popped.push(index);
        }
        // Before the ring's lock is let go: one that is stopped after it finds all that was popped.
        self.state.popped(self.popped.len());
        Ok(match (self.popped.is_empty(), blocked) {
            (false, _) => Popped::Some,
            (true, true) => Popped::Blocked,
            (true, false) => Popped::Empty,
        })
    }

    /// The ring was started: finds what was in flight when it last ran, in the record that the front-end has given.
    ///
    /// The ring goes on behind that, whatever the front-end says, and where the used ring is by now: it may have looked before
    /// the last answers were in it, those of a session before this one too. Nothing is in flight here, for a ring is drained
    /// before it is started again, and the floor is this session's.
    fn start(&mut self, queue: &mut Queue) -> std::result::Result<(), QueueError> {
        self.again.clear();
        self.record = None;
        self.refresh_memory();
        self.records.adopt_cache(&self.cache);
        let used = queue.used_idx::<Memory>(&self.hold, Ordering::Acquire)?.0;
        queue.set_next_used(used);
        let Some(mut record) = self.records.queue(self.queue) else { return Ok(()) };
        if queue.size() > record.size() {
            self.complaints.ring("requests in flight are not tracked", &"the ring is longer than its record");
            return Ok(());
        }
        if let Some(again) = record.recover(used) {
            let heads = again.len();
            queue.set_next_avail(used.wrapping_add(heads as u16));
            if heads > 0 {
                self.complaints.submitted_again(heads);
            }
            self.again = again.into();
        }
        self.record = Some(record);
        Ok(())
    }

    fn broken(&mut self, error: &QueueError) -> Popped {
        self.complaints.ring("the driver's ring makes no sense", error);
        Popped::Blocked
    }

    /// Answers the requests that have ended, all with one call; `false` if there were none.
    fn publish(&mut self, vring: &Vring) -> bool {
        if self.engine.finished.is_empty() {
            return false;
        }
        let count = self.engine.finished.len();
        {
            let ended = self.engine.finished.iter().filter_map(|index| self.slots.get(usize::from(*index)));
            let tracks = Tracks { record: self.record.as_ref(), dirty: &self.dirty, queue: self.queue };
            answer(vring, &self.hold, &tracks, ended, &mut self.complaints);
        }
        for index in self.engine.finished.drain(..) {
            if let Some(slot) = self.slots.get_mut(usize::from(index)) {
                if slot.tries > 0 && self.lot.ended() {
                    self.complaints.parked_no_more();
                }
                self.beat.ended(index, slot.ended());
                slot.clear();
            }
            self.free.push(index);
        }
        self.lane.leave(count as u64);
        self.state.answered(count);
        true
    }

    /// Looks a little longer, at the driver's ring and, with requests in flight, for their ends; `true` if there is
    /// something to do.
    fn linger(&mut self, vring: &Vring) -> bool {
        let Self { engine, idle, busy, state, hold, lot, .. } = self;
        // What pays with requests in flight, whose ends wake the worker anyway, says nothing of an empty queue.
        let in_flight = state.in_flight() > lot.len();
        let patience = if in_flight { busy } else { idle };
        patience.wait(|| {
            let vring = vring.get_ref();
            let queue = vring.get_queue();
            let offered = || queue.avail_idx::<Memory>(hold, Ordering::Acquire);
            let ready = vring.is_enabled() && queue.ready();
            state.bell.is_rung()
                || engine.has_completions()
                || (ready && offered().is_ok_and(|offered| offered.0 != queue.next_avail()))
        })
    }

    /// Asks the driver to kick again; `true` if it has offered something meanwhile. A ring that was stopped since the
    /// last look at it is the guest's own memory again.
    fn rearm(&mut self, vring: &Vring) -> bool {
        let mut vring = vring.get_mut();
        if !vring.get_queue().ready() {
            return false;
        }
        let queue = vring.get_queue_mut();
        let more = queue.enable_notification(&**self.hold);
        self.dirty.marks(self.queue, queue.size()).iter().for_each(Marks::notification);
        more.unwrap_or_else(|error| {
            self.complaints.ring("could not ask for kicks", &error);
            false
        })
    }
}

#[cfg(test)]
mod tests;
