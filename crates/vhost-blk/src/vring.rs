//! The framework's vring, with a kick and a call that can not hurt.
#![allow(unsafe_code, reason = "the kick descriptor is only to be had as a number")]

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, QueueT};
use vm_memory::GuestMemoryAtomic;

use crate::guest::Memory;
use crate::wake::Bell;

/// The guest's memory as the front-end changes it.
pub(crate) type SharedMemory = GuestMemoryAtomic<Memory>;

/// A [`VringMutex`], but for [`read_kick`](VringT::read_kick), and that it notes when it is started, and given a call.
///
/// The framework ends a worker for good when reading the kick fails. That happens to honest front-ends: an event that
/// was taken from epoll just before the ring was stopped and set up again finds a new descriptor with nothing in it,
/// and QEMU's do not block. From a dishonest one, a descriptor that blocks would hold the worker for ever.
#[derive(Clone)]
pub(crate) struct Vring {
    inner: VringMutex<SharedMemory>,
    flags: Arc<Flags>,
}

#[derive(Default)]
struct Flags {
    /// The ring was started, and the worker has not seen it yet.
    started: AtomicBool,
    /// The call waits where its count is full.
    call_waits: AtomicBool,
    /// The call was given, and the worker has not used it yet.
    call_is_new: AtomicBool,
    /// The worker's, to tell it of that.
    bell: OnceLock<Arc<Bell>>,
}

impl Vring {
    /// Whether the ring was started since this was last asked. Asked with the ring locked, and ready: whoever finds it so
    /// for the first time finds this set.
    pub(crate) fn take_started(&self) -> bool {
        self.flags.started.load(Ordering::Acquire) && self.flags.started.swap(false, Ordering::AcqRel)
    }

    /// The worker could not see to the start yet.
    pub(crate) fn put_started(&self) {
        self.flags.started.store(true, Ordering::Release);
    }

    /// From now on the worker that this wakes is told of a call that is given.
    pub(crate) fn wakes(&self, bell: &Arc<Bell>) {
        self.flags.bell.get_or_init(|| Arc::clone(bell));
    }

    /// Whether the driver is to be called for what it may not have been told: a call was given since this was last
    /// asked. Before that somebody else may have been called (QEMU itself while it starts a ring) or nobody (by a daemon
    /// that died between the used ring and the call), and with `EVENT_IDX` the next answer would not make up for it.
    /// Asked with the ring locked: a worker that does not see the flag here has its bell rung.
    pub(crate) fn owes_call(&self) -> bool {
        self.flags.call_is_new.load(Ordering::Acquire) && self.flags.call_is_new.swap(false, Ordering::AcqRel)
    }

    /// Calls the driver; `state` is this vring's, locked. A call whose count is full is not waited for: the driver has
    /// been called and has not looked yet.
    pub(crate) fn call(&self, state: &VringState<SharedMemory>) -> io::Result<()> {
        if self.flags.call_waits.load(Ordering::Acquire)
            && let Some(call) = state.get_call()
        {
            // SAFETY: `state` is locked, so nobody takes the call out and closes it.
            let call = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
            let mut writable = [PollFd::new(&call, PollFlags::OUT)];
            if poll(&mut writable, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(0) {
                return Ok(());
            }
        }
        state.signal_used_queue()
    }
}

impl<'a> VringStateGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl<'a> VringStateMutGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl VringT<SharedMemory> for Vring {
    fn new(mem: SharedMemory, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Self { inner: VringMutex::new(mem, max_queue_size)?, flags: Arc::default() })
    }

    fn read_kick(&self) -> io::Result<bool> {
        let state = self.inner.get_ref();
        if let Some(kick) = state.get_kick() {
            // SAFETY: `state` is locked, so nobody takes the kick out and closes it.
            let kick = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
            read_now(kick);
        }
        Ok(state.is_enabled())
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<SharedMemory>> {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<SharedMemory>> {
        self.inner.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), Error> {
        self.inner.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    /// Only the worker knows where a ring that runs is in its used ring. The framework looks at that ring whenever its
    /// addresses are told, and when logging begins they are told while it runs: it may look just before an answer.
    fn set_queue_next_used(&self, idx: u16) {
        let mut state = self.inner.get_mut();
        if !state.get_queue().ready() {
            state.get_queue_mut().set_next_used(idx);
        }
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.inner.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    /// Both at once: a ring that is being stopped must not be found ready and, with the flag taken away already, long
    /// started, or its requests would be served without the floor, and without those in the front-end's record.
    fn set_queue_ready(&self, ready: bool) {
        let mut state = self.inner.get_mut();
        self.flags.started.store(ready, Ordering::Release);
        state.get_queue_mut().set_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.inner.set_kick(file);
    }

    /// One that does not wait by itself (QEMU's are such) costs nothing more. The flag is the front-end's to change, so a
    /// dishonest one may still have us wait: see [`Calls`](crate::inspect::Calls).
    fn set_call(&self, file: Option<File>) {
        let flags = file.as_ref().map(fcntl_getfl);
        let waits = flags.is_some_and(|flags| flags.is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK)));
        self.flags.call_waits.store(waits, Ordering::Release);
        self.flags.call_is_new.store(true, Ordering::Release);
        self.inner.set_call(file);
        if let Some(bell) = self.flags.bell.get() {
            bell.ring();
        }
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}

/// Takes the count out of an event descriptor, if there is one, and never waits for it.
pub(crate) fn read_now(event: BorrowedFd<'_>) {
    let mut count = [0; 8];
    let read = preadv2(event, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
    if let Err(errno) = read
        && errno != Errno::AGAIN
    {
        tracing::debug!(%errno, "could not read the kick");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::thread;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[test]
    fn a_kick_is_taken_and_an_empty_one_is_no_error() {
        for flags in [0, EFD_NONBLOCK] {
            let (event, memory) = (EventFd::new(flags).unwrap(), SharedMemory::new(Memory::new()));
            let vring = Vring::new(memory, 16).unwrap();
            assert!(!vring.read_kick().unwrap());
            let dup = rustix::io::fcntl_dupfd_cloexec(borrow(&event), 0).unwrap();
            vring.set_kick(Some(dup.into()));
            vring.set_enabled(true);
            assert!(vring.read_kick().unwrap());
            event.write(3).unwrap();
            assert!(vring.read_kick().unwrap());
            read_now(borrow(&event));
            event.write(1).unwrap();
            assert_eq!(event.read().unwrap(), 1);
        }
    }

    #[test]
    fn a_call_that_is_full_is_not_waited_for() {
        for flags in [0, EFD_NONBLOCK] {
            let (event, memory) = (EventFd::new(flags).unwrap(), SharedMemory::new(Memory::new()));
            let vring = Vring::new(memory, 16).unwrap();
            vring.set_call(Some(rustix::io::fcntl_dupfd_cloexec(borrow(&event), 0).unwrap().into()));
            vring.call(&vring.get_ref()).unwrap();
            assert_eq!(event.read().unwrap(), 1);
            event.write(u64::MAX - 1).unwrap();
            // The one that does not wait says so, which is told and forgotten.
            assert_eq!(vring.call(&vring.get_ref()).is_ok(), flags == 0);
            assert_eq!(event.read().unwrap(), u64::MAX - 1);
        }
    }

    #[test]
    fn a_ring_that_is_found_ready_was_seen_to_start() {
        let vring = Vring::new(SharedMemory::new(Memory::new()), 16).unwrap();
        let (starts, done) = (AtomicU32::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..100_000 {
                    starts.fetch_add(1, Ordering::SeqCst);
                    vring.set_queue_ready(true);
                    vring.set_queue_ready(false);
                }
                done.store(true, Ordering::SeqCst);
            });
            let mut seen = 0;
            while !done.load(Ordering::SeqCst) {
                let state = vring.get_ref();
                if state.get_queue().ready() {
                    let now = starts.load(Ordering::SeqCst);
                    assert!(vring.take_started() || seen == now, "start {now} was missed");
                    seen = now;
                }
            }
        });
    }

    fn borrow(event: &EventFd) -> BorrowedFd<'_> {
        // SAFETY: it is open as long as the result lives.
        unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
    }
}
