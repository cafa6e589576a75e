//! The relay: the front-end's messages on their way to the framework, and the answers back.
//!
//! ```text
//!   front-end ═══ socket ═══ relay ═══ socket ═══ framework
//!        ▲                     │ keeps
//!        └── back-end channel ─┘ (SET_BACKEND_REQ_FD)
//! ```
//! The framework keeps the back-end's own channel to itself, and can not send the one message that a disk has for its
//! front-end: that its configuration has changed. So the relay takes a copy of the channel's descriptor as it passes.
//! It changes nothing: who sends what when, the framework judges.
//!
//! A message goes on whole, its descriptors with its first byte, as the framework reads them. One that is longer than any
//! message is ends the session.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, send, sendmsg,
};

/// Request, flags, size: 32 bits each, in the host's order (vhost-user, "Message header").
const HEADER: usize = 12;
/// Bytes after a header, at most; the framework's own limit.
const MAX_PAYLOAD: usize = 4096;
/// Descriptors with a message, at most; the framework's own limit.
const MAX_FDS: usize = 32;

/// `VHOST_USER_SET_BACKEND_REQ_FD`, from the front-end.
const SET_BACKEND_REQ_FD: u32 = 21;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, to the front-end.
const CONFIG_CHANGE: u32 = 2;
/// The version in a header's flags. Without more no answer is asked for.
const VERSION: u32 = 1;

struct Message {
    /// Header and payload.
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// Passes messages on until one side closes its socket. `keep` is given a copy of each back-end channel.
pub(crate) fn run(front: impl AsFd, framework: impl AsFd, mut keep: impl FnMut(OwnedFd)) -> io::Result<()> {
    let (front, framework) = (front.as_fd(), framework.as_fd());
    loop {
        let mut fds = [PollFd::new(&framework, PollFlags::IN), PollFd::new(&front, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            polled => polled?,
        };
        // Answers first: they are waited for.
        let [answered, asked] = fds.map(|fd| !fd.revents().is_empty());
        let from = if answered { framework } else { front };
        if !answered && !asked {
            continue;
        }
        let Some(message) = receive(from)? else { return Ok(()) };
        if !answered && message.request() == Some(SET_BACKEND_REQ_FD) {
            message.fds.first().map(OwnedFd::try_clone).transpose()?.into_iter().for_each(&mut keep);
        }
        message.send(if answered { front } else { framework })?;
    }
}

/// Tells the front-end that the configuration has changed. Does not wait: `WouldBlock` from one that does not read.
pub(crate) fn tell_config_change(channel: impl AsFd) -> io::Result<()> {
    let message = [CONFIG_CHANGE, VERSION, 0].map(u32::to_ne_bytes).concat();
    let sent = send(channel, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    // A Unix socket takes so few bytes whole or not at all.
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

impl Message {
    fn request(&self) -> Option<u32> {
        self.bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
    }

    fn send(&self, to: BorrowedFd<'_>) -> io::Result<()> {
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
fn receive(from: BorrowedFd<'_>) -> io::Result<Option<Message>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    fn header(request: u32, size: u32) -> Vec<u8> {
        [request, VERSION, size].map(u32::to_ne_bytes).concat()
    }

    #[test]
    fn messages_pass_whole_with_their_descriptors_and_a_channel_is_kept() {
        let (mut front, outer) = UnixStream::pair().unwrap();
        let (mut framework, inner) = UnixStream::pair().unwrap();
        let (channel, theirs) = UnixStream::pair().unwrap();
        let relay = thread::spawn(move || {
            let mut kept = Vec::new();
            run(&outer, &inner, |fd| kept.push(fd)).map(|()| kept)
        });
        // In pieces, and two at once.
        let message = [header(5, 600), vec![7; 600]].concat();
        message.chunks(100).for_each(|piece| front.write_all(piece).unwrap());
        let set = Message { bytes: header(SET_BACKEND_REQ_FD, 0), fds: vec![theirs.into()] };
        set.send(front.as_fd()).unwrap();
        let first = receive(framework.as_fd()).unwrap().unwrap();
        assert_eq!((first.bytes, first.fds.len()), (message, 0));
        let second = receive(framework.as_fd()).unwrap().unwrap();
        assert_eq!((second.request(), second.fds.len()), (Some(SET_BACKEND_REQ_FD), 1));
        framework.write_all(&header(1, 0)).unwrap();
        let mut answer = [0; HEADER];
        front.read_exact(&mut answer).unwrap();
        assert_eq!(answer.to_vec(), header(1, 0));
        drop(framework);
        let kept = relay.join().unwrap().unwrap();
        assert_eq!(kept.len(), 1);
        tell_config_change(&kept[0]).unwrap();
        let told = receive(channel.as_fd()).unwrap().unwrap();
        assert_eq!(told.bytes, header(CONFIG_CHANGE, 0));
        while tell_config_change(&kept[0]).is_ok() {}
        let full = tell_config_change(&kept[0]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock, "one that does not read would hold us up");
    }

    #[test]
    fn descriptors_are_counted_over_all_pieces_of_a_message() {
        let (front, outer) = UnixStream::pair().unwrap();
        let (_framework, inner) = UnixStream::pair().unwrap();
        let message = header(5, 8);
        for byte in message.chunks(1).take(2) {
            let fds = (0..MAX_FDS - 1).map(|_| front.as_fd().try_clone_to_owned().unwrap()).collect();
            Message { bytes: byte.to_vec(), fds }.send(front.as_fd()).unwrap();
        }
        let ended = run(&outer, &inner, drop).unwrap_err();
        assert_eq!(ended.to_string(), "a message with too many descriptors");
    }

    #[test]
    fn what_is_no_message_ends_the_session() {
        for (bytes, why) in [
            (header(5, MAX_PAYLOAD as u32 + 1), "a message of 4097 bytes"),
            (header(5, 8)[..5].to_vec(), "unexpected end of file"),
            (header(5, 8), "unexpected end of file"),
        ] {
            let (mut front, outer) = UnixStream::pair().unwrap();
            let (_framework, inner) = UnixStream::pair().unwrap();
            front.write_all(&bytes).unwrap();
            drop(front);
            assert_eq!(run(&outer, &inner, drop).unwrap_err().to_string(), why);
        }
    }
}
