//! Messages on a vhost-user socket, with their descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Request, flags, size: 32 bits each, in the host's order (vhost-user, "Message header").
pub(crate) const HEADER: usize = 12;
/// Bytes after a header, at most; the framework's own limit.
pub(crate) const MAX_PAYLOAD: usize = 4096;
/// Descriptors with a message, at most; the framework's own limit.
pub(crate) const MAX_FDS: usize = 32;

/// The version in a header's flags. Without more no answer is asked for.
pub(crate) const VERSION: u32 = 1;
/// In a header's flags: this is an answer.
const REPLY: u32 = 1 << 2;
/// In a header's flags: an answer is wanted, where `REPLY_ACK` was negotiated.
const NEED_REPLY: u32 = 1 << 3;

pub(crate) struct Message {
    /// Header and payload.
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    pub(crate) fn request(&self) -> u32 {
        self.word(0)
    }

    /// Whether it asks for an answer that it would not have by itself.
    pub(crate) fn needs_reply(&self) -> bool {
        self.word(4) & NEED_REPLY != 0
    }

    /// What follows the header.
    pub(crate) fn payload(&self) -> &[u8] {
        self.bytes.get(HEADER..).unwrap_or_default()
    }

    /// The payload's number of 64 bits, if that is what it is.
    pub(crate) fn number(&self) -> Option<u64> {
        self.payload().try_into().ok().map(u64::from_ne_bytes)
    }

    /// The answer to it.
    pub(crate) fn answer(&self, payload: &[u8], fds: Vec<OwnedFd>) -> Self {
        let header = [self.request(), VERSION | REPLY, payload.len() as u32].map(u32::to_ne_bytes).concat();
        Self { bytes: [&header, payload].concat(), fds }
    }

    fn word(&self, at: usize) -> u32 {
        let word = self.bytes.get(at..).and_then(|rest| rest.first_chunk());
        word.map_or(0, |word| u32::from_ne_bytes(*word))
    }

    pub(crate) fn send(&self, to: BorrowedFd<'_>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(too_many_fds());
        }
        let mut rest = self.bytes.as_slice();
        while !rest.is_empty() {
            match sendmsg(to, &[IoSlice::new(rest)], &mut ancillary, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                sent => {
                    rest = rest.get(sent?..).unwrap_or_default();
                    ancillary.clear();
                }
            }
        }
        Ok(())
    }
}

/// The next message, or `None` if there are no more.
pub(crate) fn receive(from: BorrowedFd<'_>) -> io::Result<Option<Message>> {
    let mut message = Message { bytes: vec![0; HEADER], fds: Vec::new() };
    if !fill(from, &mut message.bytes, &mut message.fds)? {
        return Ok(None);
    }
    let size = message.bytes.last_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes)) as usize;
    if size > MAX_PAYLOAD {
        return Err(io::Error::other(format!("a message of {size} bytes")));
    }
    message.bytes.resize(HEADER + size, 0);
    let payload = message.bytes.get_mut(HEADER..).unwrap_or_default();
    match fill(from, payload, &mut message.fds)? {
        true => Ok(Some(message)),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Fills `bytes`; `false` if the socket was closed before the first of them.
fn fill(from: BorrowedFd<'_>, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(from, &mut [IoSliceMut::new(rest)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let received = match received {
            Err(Errno::INTR) => continue,
            received => received?.bytes,
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(found) = message {
                fds.extend(found);
            }
        }
        // Each piece of a message may bring some: a front-end must not make us hold all that the process may have.
        if fds.len() > MAX_FDS {
            return Err(too_many_fds());
        }
        match (received, done) {
            (0, 0) => return Ok(false),
            (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => done += received,
        }
    }
    Ok(true)
}

fn too_many_fds() -> io::Error {
    io::Error::other("a message with too many descriptors")
}
