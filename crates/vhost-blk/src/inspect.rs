//! What the framework must not see, or can not do: each message of the front-end's is looked at before it goes on.
//!
//! - GET_INFLIGHT_FD and SET_INFLIGHT_FD are answered here, and so is SET_LOG_BASE: the framework's log has no end, is not
//!   guarded, and is lost with the memory table. What is to be logged is noted before the message goes on.
//! - Descriptors must be what the message says. Memory is a file that is long enough, that can be mapped and not more (a
//!   device's pages are its driver's); kicks, calls and errors are event descriptors: of others some are always readable,
//!   so that a worker would never sleep, and some never take a write.
//! - What a message has us map is charged before it is mapped, see [`allowance`](crate::allowance): a front-end may have sent
//!   many of them before the first is dealt with.
//! - Copies are kept of the calls and of the back-end's channel.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, fstat};
use vhost::vhost_user::message::{
    VhostUserProtocolFeatures, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
};

use crate::device::Device;
use crate::inflight::Shape;
use crate::maps::is_within;
use crate::relay::{Message, Verdict};
use crate::vring::read_now;

/// The requests that are looked at (vhost-user, "Front-end message types").
mod request {
    pub(super) const SET_FEATURES: u32 = 2;
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_LOG_BASE: u32 = 6;
    pub(super) const SET_LOG_FD: u32 = 7;
    pub(super) const SET_VRING_ADDR: u32 = 9;
    pub(super) const SET_VRING_KICK: u32 = 12;
    pub(super) const SET_VRING_CALL: u32 = 13;
    pub(super) const SET_VRING_ERR: u32 = 14;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(super) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(super) const GET_INFLIGHT_FD: u32 = 31;
    pub(super) const SET_INFLIGHT_FD: u32 = 32;
    pub(super) const ADD_MEM_REG: u32 = 37;
}

/// Bytes of an in-flight description; some front-ends send the padding of their compiler's after it.
const INFLIGHT_LEN: usize = 20;
const INFLIGHT_PADDED: usize = 24;

/// A memory table's regions: what is before the first, the bytes of each, and where in it its size is, and its offset in
/// its file (vhost-user, "Memory region description").
const REGIONS_AT: usize = 8;
const REGION: usize = 32;
const REGION_SIZE_AT: usize = 8;
const REGION_OFFSET_AT: usize = 24;

/// Bytes of a log's description: its size and its offset in the file.
const LOG_LEN: usize = 16;

/// A message of a vring's addresses: its bytes, and where in it are the vring's number, its flags, and the used ring's
/// address in the log.
const ADDR_LEN: usize = 40;
const ADDR_FLAGS_AT: usize = 4;
const ADDR_LOG_AT: usize = 32;

/// Where a message of a vring's descriptor has the vring's number.
const VRING_MASK: u64 = 0xff;

/// The inspector of one session.
pub(crate) struct Inspector<'a> {
    device: &'a Device,
    keep: &'a dyn Fn(OwnedFd),
    features: VhostUserProtocolFeatures,
}

impl<'a> Inspector<'a> {
    /// `keep` is given a copy of each back-end channel.
    pub(crate) fn new(device: &'a Device, keep: &'a dyn Fn(OwnedFd)) -> Self {
        Self { device, keep, features: VhostUserProtocolFeatures::empty() }
    }

    /// What becomes of a message; an error ends the session.
    pub(crate) fn inspect(&mut self, message: Message) -> io::Result<Verdict> {
        match message.request() {
            request::SET_PROTOCOL_FEATURES => {
                let features = message.number().unwrap_or_default();
                self.features = VhostUserProtocolFeatures::from_bits_truncate(features);
            }
            request::SET_MEM_TABLE | request::ADD_MEM_REG => {
                check_memory(&message)?;
                let sizes = regions(&message).filter_map(|(_, region)| number(region, REGION_SIZE_AT));
                self.device.maps().announce(sizes).map_err(io::Error::other)?;
            }
            request::SET_VRING_KICK | request::SET_VRING_ERR => check_events(&message)?,
            request::SET_VRING_CALL => {
                check_events(&message)?;
                self.device.calls().keep(&message)?;
            }
            request::SET_FEATURES => {
                let features = message.number().unwrap_or_default();
                self.device.dirty().set_all(features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0);
            }
            request::SET_VRING_ADDR => self.note_used(&message),
            request::SET_LOG_BASE => return self.set_log_base(message),
            request::SET_LOG_FD => {
                // Of use for a front-end that sleeps until pages are marked. None does: it may ask for that, and is told nothing.
                check_events(&message)?;
                return Ok(Verdict::Answer(self.acknowledge(&message)));
            }
            request::SET_BACKEND_REQ_FD => {
                for fd in &message.fds {
                    refuse(file_type(fd) == FileType::Socket, "a channel that is no socket")?;
                    (self.keep)(fd.try_clone()?);
                }
            }
            request::GET_INFLIGHT_FD => return self.get_inflight(&message),
            request::SET_INFLIGHT_FD => return self.set_inflight(message),
            _ => {}
        }
        Ok(Verdict::Forward(message))
    }

    fn get_inflight(&self, message: &Message) -> io::Result<Verdict> {
        let asked = self.shape(message)?;
        refuse(message.fds.is_empty(), "an in-flight record with a question for one")?;
        let (file, shape) = self.device.create_record(asked).map_err(io::Error::other)?;
        let mut payload = encode(shape);
        payload.resize(message.payload().len(), 0);
        Ok(Verdict::Answer(Some(message.answer(&payload, vec![file]))))
    }

    fn set_inflight(&self, mut message: Message) -> io::Result<Verdict> {
        let shape = self.shape(&message)?;
        let (Some(file), true) = (message.fds.pop(), message.fds.is_empty()) else {
            return Err(io::Error::other("not one in-flight record"));
        };
        refuse(is_memory(&file), "an in-flight record that is no file")?;
        self.device.set_record(file, shape).map_err(io::Error::other)?;
        Ok(Verdict::Answer(self.acknowledge(&message)))
    }

    /// That all is well, if the message asks for it.
    fn acknowledge(&self, message: &Message) -> Option<Message> {
        let told = message.needs_reply() && self.features.contains(VhostUserProtocolFeatures::REPLY_ACK);
        told.then(|| message.answer(&0_u64.to_ne_bytes(), Vec::new()))
    }

    fn set_log_base(&self, mut message: Message) -> io::Result<Verdict> {
        let negotiated = self.features.contains(VhostUserProtocolFeatures::LOG_SHMFD);
        refuse(negotiated, "a log of dirty pages that was not negotiated")?;
        let (Some(file), true) = (message.fds.pop(), message.fds.is_empty()) else {
            return Err(io::Error::other("not one log of dirty pages"));
        };
        refuse(is_memory(&file), "a log of dirty pages that is no file")?;
        let payload = message.payload();
        let (Some(size), Some(offset), LOG_LEN) = (number(payload, 0), number(payload, 8), payload.len())
        else {
            return Err(io::Error::other("a malformed description of a log"));
        };
        self.device.set_log(file, offset, size).map_err(io::Error::other)?;
        // Always answered, with what it said.
        Ok(Verdict::Answer(Some(message.answer(payload, Vec::new()))))
    }

    /// Notes where a used ring is to be logged, if it is. The framework judges the message.
    fn note_used(&self, message: &Message) {
        let payload = message.payload();
        let word = |at: usize| Some(u32::from_ne_bytes(*payload.get(at..)?.first_chunk()?));
        let (Some(queue), Some(flags), ADDR_LEN) = (word(0), word(ADDR_FLAGS_AT), payload.len()) else {
            return;
        };
        let logged = flags & VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() != 0;
        let used = number(payload, ADDR_LOG_AT).filter(|_| logged);
        self.device.dirty().set_used(queue as usize, used);
    }

    fn shape(&self, message: &Message) -> io::Result<Shape> {
        let negotiated = self.features.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        refuse(negotiated, "in-flight tracking that was not negotiated")?;
        decode(message.payload()).ok_or_else(|| io::Error::other("a malformed in-flight description"))
    }
}

fn encode(shape: Shape) -> Vec<u8> {
    let Shape { size, offset, queues, queue_size } = shape;
    let mut bytes = [size, offset].map(u64::to_ne_bytes).concat();
    bytes.extend([queues, queue_size].map(u16::to_ne_bytes).concat());
    bytes
}

fn decode(payload: &[u8]) -> Option<Shape> {
    if !(INFLIGHT_LEN..=INFLIGHT_PADDED).contains(&payload.len()) {
        return None;
    }
    let (size, rest) = payload.split_first_chunk()?;
    let (offset, rest) = rest.split_first_chunk()?;
    let (queues, rest) = rest.split_first_chunk()?;
    let queue_size = rest.first_chunk()?;
    Some(Shape {
        size: u64::from_ne_bytes(*size),
        offset: u64::from_ne_bytes(*offset),
        queues: u16::from_ne_bytes(*queues),
        queue_size: u16::from_ne_bytes(*queue_size),
    })
}

fn refuse(sound: bool, story: &str) -> io::Result<()> {
    if sound { Ok(()) } else { Err(io::Error::other(format!("the front-end sent {story}"))) }
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

/// Each region of a memory table, or the one that is added, with its file. That there are as many of these as of those,
/// the framework judges.
fn regions(message: &Message) -> impl Iterator<Item = (&OwnedFd, &[u8])> {
    let regions = message.payload().get(REGIONS_AT..).unwrap_or_default().chunks_exact(REGION);
    message.fds.iter().zip(regions)
}

fn check_memory(message: &Message) -> io::Result<()> {
    for fd in &message.fds {
        refuse(is_memory(fd), "memory that is no file")?;
    }
    for (fd, region) in regions(message) {
        let (Some(size), Some(offset)) = (number(region, REGION_SIZE_AT), number(region, REGION_OFFSET_AT))
        else {
            continue;
        };
        refuse(
            is_within(fd, offset, size),
            "memory that is longer than its file, or a piece of a huge page",
        )?;
    }
    Ok(())
}

fn check_events(message: &Message) -> io::Result<()> {
    message.fds.iter().try_for_each(|fd| refuse(is_event(fd), "a descriptor that is no event descriptor"))
}

fn file_type(fd: &OwnedFd) -> FileType {
    fstat(fd).map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode))
}

fn is_memory(fd: &OwnedFd) -> bool {
    file_type(fd) == FileType::RegularFile
}

/// The kernel's word for it; where /proc is not mounted, whether it is a descriptor without a file at all.
fn is_event(fd: &OwnedFd) -> bool {
    match fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(name) => name.as_os_str() == "anon_inode:[eventfd]",
        Err(_) => file_type(fd) == FileType::Unknown,
    }
}

/// Copies of the event descriptors by which the driver is called, by queue.
///
/// A front-end may have us wait for such a descriptor: if its count is full and it is not one that says so at once. The
/// worker looks before it writes, but the front-end may fill it in between, or change the flag. Whoever waits for that
/// worker takes the count out, and the worker goes on.
#[derive(Debug)]
pub(crate) struct Calls(Mutex<Vec<Option<OwnedFd>>>);

impl Calls {
    pub(crate) fn new(queues: usize) -> Self {
        Self(Mutex::new((0..queues).map(|_| None).collect()))
    }

    /// Keeps a copy of what SET_VRING_CALL brings. The framework answers for a queue that there is not.
    fn keep(&self, message: &Message) -> io::Result<()> {
        let queue = message.number().unwrap_or_default() & VRING_MASK;
        if let Some(call) = self.lock().get_mut(queue as usize) {
            *call = message.fds.first().map(AsFd::as_fd).map(|fd| fd.try_clone_to_owned()).transpose()?;
        }
        Ok(())
    }

    /// Frees the workers that wait for one.
    pub(crate) fn free(&self) {
        self.lock().iter().flatten().for_each(|call| read_now(call.as_fd()));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<OwnedFd>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, epoll, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};

    #[test]
    fn descriptors_are_told_apart() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        let (socket, _other) = UnixStream::pair().unwrap();
        let zero = File::open("/dev/zero").unwrap();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let folder = File::open("/").unwrap();
        let all = [event, memory, socket.into(), zero.into(), epoll, folder.into()];
        let found = |is: fn(&OwnedFd) -> bool| all.iter().map(is).collect::<Vec<_>>();
        assert_eq!(found(is_event), [true, false, false, false, false, false]);
        assert_eq!(found(is_memory), [false, true, false, false, false, false]);
    }

    #[test]
    fn a_description_with_padding_or_without_is_the_same() {
        let shape = Shape { size: 1 << 40, offset: 7, queues: 3, queue_size: 128 };
        let mut bytes = encode(shape);
        for _ in INFLIGHT_LEN..=INFLIGHT_PADDED {
            assert_eq!(decode(&bytes), Some(shape));
            bytes.push(0);
        }
        assert_eq!(decode(&bytes), None);
        assert_eq!(decode(&bytes[..19]), None);
    }
}
