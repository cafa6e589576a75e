//! The framework's vring, with a kick that can not hurt.
#![allow(unsafe_code, reason = "the kick descriptor is only to be had as a number")]

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::MutexGuard;

use rustix::io::{Errno, ReadWriteFlags, preadv2};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::GuestMemoryAtomic;

use crate::guest::Memory;

/// The guest's memory as the front-end changes it.
pub(crate) type SharedMemory = GuestMemoryAtomic<Memory>;

/// A [`VringMutex`], but for [`read_kick`](VringT::read_kick).
///
/// The framework ends a worker for good when reading the kick fails. That happens to honest front-ends: an event that
/// was taken from epoll just before the ring was stopped and set up again finds a new descriptor with nothing in it,
/// and QEMU's do not block. From a dishonest one, a descriptor that blocks would hold the worker for ever.
#[derive(Clone)]
pub(crate) struct Vring(VringMutex<SharedMemory>);

impl<'a> VringStateGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl<'a> VringStateMutGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl VringT<SharedMemory> for Vring {
    fn new(mem: SharedMemory, max_queue_size: u16) -> Result<Self, Error> {
        VringMutex::new(mem, max_queue_size).map(Self)
    }

    fn read_kick(&self) -> io::Result<bool> {
        let state = self.0.get_ref();
        if let Some(kick) = state.get_kick() {
            // SAFETY: `state` is locked, so nobody takes the kick out and closes it.
            let kick = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
            read_now(kick);
        }
        Ok(state.is_enabled())
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<SharedMemory>> {
        self.0.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<SharedMemory>> {
        self.0.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.0.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.0.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.0.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.0.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.0.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.0.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), Error> {
        self.0.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.0.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.0.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.0.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.0.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.0.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.0.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.0.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.0.set_kick(file);
    }

    fn set_call(&self, file: Option<File>) {
        self.0.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.0.set_err(file);
    }
}

/// Takes the count out of an event descriptor, if there is one, and never waits for it.
fn read_now(event: BorrowedFd<'_>) {
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

    fn borrow(event: &EventFd) -> BorrowedFd<'_> {
        // SAFETY: it is open as long as the result lives.
        unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
    }
}
