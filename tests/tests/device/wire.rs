//! Messages byte by byte, for those that no front-end would send.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Header flags: the version, and that an answer is wanted.
pub(crate) const PLAIN: u32 = 1;
pub(crate) const NEED_REPLY: u32 = 1 | 1 << 3;

/// A connection that has said nothing yet.
pub(crate) struct Wire(pub(crate) UnixStream);

impl Wire {
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        Self(stream)
    }

    /// One that has negotiated all features but those of the device.
    pub(crate) fn negotiated(socket: &Path) -> Self {
        let wire = Self::connect(socket);
        wire.send(3, PLAIN, &[], &[]).unwrap();
        wire.send(2, PLAIN, &(1_u64 << 32 | 1 << 30).to_ne_bytes(), &[]).unwrap();
        wire.send(15, PLAIN, &[], &[]).unwrap();
        let offered = wire.answer().unwrap();
        wire.send(16, PLAIN, &offered, &[]).unwrap();
        wire
    }

    /// Sends a message with its size as it is.
    pub(crate) fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[&OwnedFd]) -> io::Result<()> {
        let header = [request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
        self.send_bytes(&[&header, payload].concat(), fds)
    }

    /// Sends bytes, the descriptors with the first of them.
    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[&OwnedFd]) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| std::os::fd::AsFd::as_fd(*fd)).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let sent = sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// The payload of the next answer; an error if the session has ended.
    pub(crate) fn answer(&self) -> io::Result<Vec<u8>> {
        let mut header = [0; 12];
        (&self.0).read_exact(&mut header)?;
        let mut payload = vec![0; u32::from_ne_bytes(header[8..].try_into().unwrap()) as usize];
        (&self.0).read_exact(&mut payload)?;
        Ok(payload)
    }

    /// Whether the session has ended, or does within some seconds.
    pub(crate) fn has_ended(&self) -> bool {
        let ended = |kind| matches!(kind, io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset);
        loop {
            match self.answer() {
                Ok(_) => {}
                Err(error) => return ended(error.kind()),
            }
        }
    }
}
