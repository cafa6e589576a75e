//! The device of one session, as the framework drives it.
#![allow(unsafe_code, reason = "the framework leaks one descriptor a worker, which is closed by its number")]

use std::io;
use std::iter;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use block::{Disk, Result};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::cache::{CacheMode, Field};
use crate::config;
use crate::dirty::{Dirty, Log};
use crate::floor::{Claim, Floor};
use crate::inflight::{self, Record, Records, Shape};
use crate::inspect::Calls;
use crate::maps::Maps;
use crate::queue_state::QueueState;
use crate::server::DeviceConfig;
use crate::vring::{SharedMemory, Vring};
use crate::worker::{Parts, Worker};

/// One session's device. The framework has one thread a queue, and calls [`handle_event`](Self::handle_event) on it;
/// the other methods come from the session's own thread.
pub(crate) struct Device {
    disk: Arc<dyn Disk>,
    cache: Arc<CacheMode>,
    /// A worker is locked by its thread alone.
    workers: Vec<Mutex<Worker>>,
    queues: Vec<Arc<QueueState>>,
    records: Records,
    calls: Calls,
    dirty: Arc<Dirty>,
    claim: Arc<Claim>,
    /// After all that holds on to what is mapped.
    maps: Arc<Maps>,
    /// By which the framework's threads will be told to end. Made beforehand, where that may fail: a thread without one
    /// would never end, and the session neither.
    prepared_exits: Mutex<Vec<(EventConsumer, EventNotifier)>>,
    /// The descriptors of those that the framework has.
    exits: Mutex<Vec<RawFd>>,
}

impl Device {
    pub(crate) fn new(config: &DeviceConfig, field: &Arc<Field>, floor: &Arc<Floor>) -> Result<Self> {
        let cache = Arc::new(CacheMode::new(Arc::clone(field)));
        let (dirty, claim) = (Arc::new(Dirty::new(usize::from(config.queues))), Arc::new(Claim::new(floor)));
        let (maps, records) = (Arc::new(Maps::new(config.allowance.clone())?), Records::default());
        let (mut workers, mut queues, mut exits) = (Vec::new(), Vec::new(), Vec::new());
        for queue in 0..usize::from(config.queues) {
            let state = Arc::new(QueueState::new()?);
            workers.push(Mutex::new(Worker::new(Parts {
                name: config.name.clone(),
                queue,
                disk: Arc::clone(&config.disk),
                serial: config.serial_bytes(),
                gate: Arc::clone(&config.gate),
                pulse: Arc::clone(&config.pulse),
                parking: Arc::clone(&config.parking),
                on_failure: Arc::clone(&config.on_failure),
                cache: Arc::clone(&cache),
                maps: Arc::clone(&maps),
                records: records.clone(),
                dirty: Arc::clone(&dirty),
                claim: Arc::clone(&claim),
                state: Arc::clone(&state),
            })?));
            queues.push(state);
            exits.push(new_event_consumer_and_notifier(EventFlag::CLOEXEC)?);
        }
        let (prepared_exits, exits) = (Mutex::new(exits), Mutex::default());
        let (disk, calls) = (Arc::clone(&config.disk), Calls::new(queues.len()));
        Ok(Self { disk, cache, workers, queues, maps, records, calls, dirty, claim, prepared_exits, exits })
    }

    /// Has each worker watch its bell, its io_uring and its timer.
    pub(crate) fn watch(&self, daemon: &VhostUserDaemon<Arc<Self>>) -> io::Result<()> {
        for (index, handler) in daemon.get_epoll_handlers().iter().enumerate() {
            let (Some(queue), Some(worker)) = (self.queues.get(index), self.workers.get(index)) else {
                break;
            };
            handler.register_listener(queue.bell.fd(), EventSet::IN, self.bell_event())?;
            let worker = lock(worker);
            let ring = worker.ring().as_fd().as_raw_fd();
            handler.register_listener(ring, EventSet::IN, self.bell_event() + 1)?;
            handler.register_listener(worker.timer(), EventSet::IN, self.bell_event() + 2)?;
        }
        Ok(())
    }

    /// Takes no more requests, and waits until those in flight have been answered. The memory may be unmapped
    /// afterwards, and another front-end may have the disk.
    pub(crate) fn close(&self) {
        self.queues.iter().for_each(|queue| queue.close());
        self.queues.iter().for_each(|queue| queue.wait_closed(|| self.calls.free()));
        self.claim.give_up();
    }

    /// Memory for a front-end's in-flight record.
    pub(crate) fn create_record(&self, asked: Shape) -> Result<(OwnedFd, Shape)> {
        inflight::create(asked, self.queues.len())
    }

    /// Takes a front-end's in-flight record, for rings that are started from now on. What it says of the write cache counts
    /// at once if nobody else has the disk: the guest may ask.
    pub(crate) fn set_record(&self, file: OwnedFd, shape: Shape) -> Result<()> {
        self.maps.announce(iter::once(shape.size))?;
        let record = Arc::new(Record::map(file, shape, self.queues.len())?);
        // From here on it may be touched.
        self.maps.keep(&record)?;
        record.check()?;
        self.records.set(record);
        if !self.claim.is_refused() {
            self.records.adopt_cache(&self.cache);
        }
        Ok(())
    }

    /// Takes a front-end's log of dirty pages, in the place of the one before it.
    pub(crate) fn set_log(&self, file: OwnedFd, offset: u64, size: u64) -> Result<()> {
        self.maps.announce(iter::once(size))?;
        let log = Arc::new(Log::map(file, offset, size)?);
        // From here on it may be touched.
        self.maps.keep_log(&log)?;
        self.dirty.set_log(log);
        Ok(())
    }

    /// What is logged of the guest's memory.
    pub(crate) fn dirty(&self) -> &Dirty {
        &self.dirty
    }

    /// The session's number.
    pub(crate) fn session(&self) -> u64 {
        self.claim.session()
    }

    /// The calls of its queues.
    pub(crate) fn calls(&self) -> &Calls {
        &self.calls
    }

    /// What the front-end has given to map.
    pub(crate) fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Ends the threads of a daemon that was only half made: the framework starts them one by one, and forgets those
    /// that it has started when the next one fails.
    pub(crate) fn end_threads(self: &Arc<Self>) {
        for fd in lock(&self.exits).iter() {
            // SAFETY: the number is of an event descriptor that stays open until `close_exits`.
            let exit = unsafe { BorrowedFd::borrow_raw(*fd) };
            let _ = rustix::io::write(exit, &1_u64.to_ne_bytes());
        }
        // Each thread holds on to the device.
        while Arc::strong_count(self) > 1 {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Closes the descriptors that the framework has turned into bare numbers and forgotten. The daemon is gone, as
    /// this device has no other owner.
    pub(crate) fn close_exits(self: &Arc<Self>) {
        debug_assert_eq!(Arc::strong_count(self), 1, "threads of the framework are still running");
        for fd in lock(&self.exits).drain(..) {
            // SAFETY: the framework owned it and forgot it, and whoever used its number is gone.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }

    /// The first event number past the framework's own: one a queue, and one for its ends.
    fn bell_event(&self) -> u64 {
        self.queues.len() as u64 + 1
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(config::MAX_QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        config::features(&*self.disk)
    }

    fn acked_features(&self, features: u64) {
        self.cache.set_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        config::protocol_features()
    }

    /// The framework tells every vring itself.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        config::space(&*self.disk, self.queues.len() as u16, self.cache.field(), offset, size)
    }

    /// Only the write cache can be set, and not while another guest has the disk. Anything else is the guest's mistake,
    /// which must not end the session, as an error here would.
    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        match (offset, bytes) {
            (config::WRITEBACK_OFFSET, [value @ (0 | 1)]) if !self.claim.is_refused() => {
                tracing::info!(writeback = *value == 1, "the driver set the write cache");
                self.records.set_cache(&self.cache, *value == 1);
            }
            _ => tracing::debug!(offset, len = bytes.len(), "ignored a write to the configuration space"),
        }
        Ok(())
    }

    /// The workers let go of the old map, or would at their next request at the earliest.
    fn update_memory(&self, memory: SharedMemory) -> io::Result<()> {
        self.maps.publish(&memory.memory()).map_err(io::Error::other)?;
        self.queues.iter().for_each(|queue| queue.bell.ring());
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let pair = lock(&self.prepared_exits).pop()?;
        lock(&self.exits).push(pair.0.as_raw_fd());
        Some(pair)
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        if let Some(queue) = self.queues.get(queue_index as usize) {
            queue.wait_idle(|| self.calls.free());
            self.claim.stopped(queue_index as usize, self.dirty.is_on());
        }
        Ok(())
    }

    /// Never fails: an error would end the thread for good. An event that was on its way when the ring was stopped
    /// finds it not ready, and does nothing.
    fn handle_event(&self, event: u16, _: EventSet, vrings: &[Vring], thread: usize) -> io::Result<()> {
        let (Some(queue), Some(worker), [vring]) =
            (self.queues.get(thread), self.workers.get(thread), vrings)
        else {
            return Ok(());
        };
        if u64::from(event) == self.bell_event() {
            queue.bell.silence();
        }
        vring.wakes(&queue.bell);
        lock(worker).turn(vring);
        Ok(())
    }
}
