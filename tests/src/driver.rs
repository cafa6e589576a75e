//! An honest driver: the crate `virtio-driver` over a vhost-user socket, with memory of its own for the data.
#![allow(unsafe_code, reason = "buffers shared with a device are reached through bare pointers")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion};

/// Descriptors in a ring: a request of ours takes three.
const RING: u16 = 256;

/// A connection with its queues set up.
pub struct Driver {
    /// Each queue, with memory of its own. Take them out to drive them from threads.
    pub queues: Vec<DriverQueue>,
    transport: Arc<Transport>,
}

/// The queues' memory, and the connection; both outlive every queue.
struct Transport {
    inner: Mutex<Box<VirtioBlkTransport>>,
    data: MmapRegion,
}

/// One queue, and `depth` buffers of `size` bytes.
pub struct DriverQueue {
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completion: Arc<EventFd>,
    transport: Arc<Transport>,
    /// Offset of the first buffer in `data`.
    base: usize,
    size: usize,
    in_flight: usize,
}

/// What to ask for. Offsets and lengths are bytes of the disk.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// The whole buffer from the disk.
    Read(u64),
    /// The whole buffer to the disk.
    Write(u64),
    /// A flush.
    Flush,
    /// A discard of so many bytes.
    Discard(u64, u64),
    /// So many zeroes, with unmap or without.
    WriteZeroes(u64, u64, bool),
}

impl Driver {
    /// Connects, and sets up `queues` queues with `depth` buffers of `size` bytes each.
    pub fn connect(socket: &Path, queues: usize, depth: usize, size: usize) -> io::Result<Self> {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::all().bits();
        let path = socket.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let mut inner: Box<VirtioBlkTransport> = Box::new(VhostUser::new(path, features)?);
        let ready = VirtioBlkQueue::<usize>::setup_queues(&mut *inner, queues, RING)?;
        let bytes = queues * depth * size;
        let file: File = memfd_create("driver-data", MemfdFlags::CLOEXEC)?.into();
        file.set_len(bytes as u64)?;
        let fd = file.as_raw_fd();
        let data =
            MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), bytes).map_err(io::Error::other)?;
        inner.map_mem_region(data.as_ptr().addr(), bytes, fd, 0)?;
        let notifiers: Vec<_> = (0..queues).map(|i| inner.get_submission_notifier(i)).collect();
        let completions: Vec<_> = (0..queues).map(|i| inner.get_completion_fd(i)).collect();
        let transport = Arc::new(Transport { inner: Mutex::new(inner), data });
        let queues = ready
            .into_iter()
            .zip(notifiers.into_iter().zip(completions))
            .enumerate()
            .map(|(index, (mut queue, (notifier, completion)))| {
                queue.set_used_notif_enabled(true);
                let (transport, base) = (Arc::clone(&transport), index * depth * size);
                DriverQueue { queue, notifier, completion, transport, base, size, in_flight: 0 }
            })
            .collect();
        Ok(Self { queues, transport })
    }

    /// The features that both ends have.
    pub fn features(&self) -> u64 {
        self.transport.inner.lock().unwrap_or_else(PoisonError::into_inner).get_features()
    }

    /// The disk's size in bytes.
    pub fn capacity(&self) -> io::Result<u64> {
        let config = self.transport.inner.lock().unwrap_or_else(PoisonError::into_inner).get_config()?;
        Ok(u64::from(config.capacity) * 512)
    }
}

impl DriverQueue {
    /// Puts bytes into buffer `index`.
    pub fn fill(&mut self, index: usize, bytes: &[u8]) {
        assert!(bytes.len() <= self.size);
        // SAFETY: the buffer is in `data`, and no request of ours is using it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.buffer(index), bytes.len()) };
    }

    /// A copy of buffer `index`.
    pub fn bytes(&self, index: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.size];
        // SAFETY: as for `fill`.
        unsafe { std::ptr::copy_nonoverlapping(self.buffer(index), bytes.as_mut_ptr(), self.size) };
        bytes
    }

    fn buffer(&self, index: usize) -> *mut u8 {
        let at = self.base + index * self.size;
        assert!(at + self.size <= self.transport.data.size());
        self.transport.data.as_ptr().wrapping_add(at)
    }

    /// Queues a request with buffer `index`; the buffer is the device's until the request is back.
    pub fn queue(&mut self, index: usize, request: Request) -> io::Result<()> {
        let (buffer, size) = (self.buffer(index), self.size);
        match request {
            // SAFETY: the buffer stays mapped as long as this queue lives, and only its copies are looked at.
            Request::Read(offset) => unsafe { self.queue.read_raw(offset, buffer, size, index) },
            // SAFETY: as above.
            Request::Write(offset) => unsafe { self.queue.write_raw(offset, buffer, size, index) },
            Request::Flush => self.queue.flush(index),
            Request::Discard(offset, len) => self.queue.discard(offset, len, index),
            Request::WriteZeroes(offset, len, unmap) => self.queue.write_zeroes(offset, len, unmap, index),
        }?;
        self.in_flight += 1;
        Ok(())
    }

    /// Kicks the device, if it wants to be.
    pub fn kick(&mut self) -> io::Result<()> {
        if self.queue.avail_notif_needed() {
            self.notifier.notify()?;
        }
        Ok(())
    }

    /// The requests that are back: their buffers' numbers, and 0 or a negative errno.
    pub fn poll(&mut self, back: &mut Vec<(usize, i32)>) {
        let before = back.len();
        back.extend(self.queue.completions().map(|done| (done.context, done.ret)));
        self.in_flight -= back.len() - before;
    }

    /// Waits until at least one request is back.
    pub fn wait(&mut self, back: &mut Vec<(usize, i32)>) -> io::Result<()> {
        loop {
            self.poll(back);
            if !back.is_empty() || self.in_flight == 0 {
                return Ok(());
            }
            self.completion.read()?;
        }
    }

    /// Waits until at least one request is back, or `timeout` (less than a second) is over: the device may be gone.
    pub fn wait_for(&mut self, back: &mut Vec<(usize, i32)>, timeout: Duration) -> io::Result<()> {
        self.poll(back);
        if !back.is_empty() || self.in_flight == 0 {
            return Ok(());
        }
        let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
        if poll(&mut [PollFd::new(&*self.completion, PollFlags::IN)], Some(&timeout))? > 0 {
            self.completion.read()?;
        }
        self.poll(back);
        Ok(())
    }

    /// Asks and waits, with buffer 0 and nothing else in flight: 0 or a negative errno.
    pub fn ask(&mut self, request: Request) -> i32 {
        assert_eq!(self.in_flight, 0);
        self.queue(0, request).unwrap();
        self.kick().unwrap();
        let mut back = Vec::new();
        self.wait(&mut back).unwrap();
        back[0].1
    }

    /// Whether the used ring's interrupts are wanted: a driver that polls does not.
    pub fn set_polling(&mut self, polling: bool) {
        self.queue.set_used_notif_enabled(!polling);
    }

    /// Requests not yet back.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }
}
