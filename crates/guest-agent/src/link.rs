//! The transport: one connection, lines of JSON, everything under an absolute deadline.
//!
//! The framing is qemu-ga's (`docs/interop/qemu-ga.rst`, `qga/main.c` in QEMU): one JSON object a line; a `0xFF` byte resets
//! the agent's parser, and `guest-sync-delimited` is answered with a `0xFF` byte before the reply.

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send,
    socket_with,
};
use serde::Deserialize;

use crate::error::AgentError;

/// The longest reply taken, in bytes: a guest of thousands of mounts needs about one MiB.
pub const REPLY_MAX: usize = 4 << 20;

/// The longest reply to a sync; a longer one is not the answer.
const SYNC_REPLY_MAX: usize = 4096;

const CHUNK: usize = 64 << 10;

/// How long to wait before trying again to enter a full listen queue, which cannot be polled for.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);

const SYNC: &str = "guest-sync-delimited";
const DELIMITER: u8 = 0xFF;

/// A connection on which every question so far has been answered. After any error it must be dropped.
pub(crate) struct Link {
    socket: OwnedFd,
    /// Received and not yet consumed; never longer than `REPLY_MAX + CHUNK`.
    pending: Vec<u8>,
    chunk: Box<[u8]>,
}

#[derive(Deserialize)]
struct SyncReply {
    #[serde(rename = "return")]
    id: i64,
}

impl Link {
    /// A connection to `path` whose agent has answered `id`.
    ///
    /// # Errors
    /// [`AgentError::Absent`] if nothing listens, [`AgentError::Silent`] if nobody answers by `deadline`.
    pub(crate) fn open(path: &Path, id: i64, deadline: Instant) -> Result<Self, AgentError> {
        let socket = dial(path, deadline)
            .map_err(|source| AgentError::Absent { path: path.to_owned(), source: source.into() })?;
        let mut link = Self::over(socket);
        let mut discarded = 0;
        match link.sync(id, deadline, &mut discarded) {
            Err(AgentError::Timeout { .. }) => Err(AgentError::Silent { path: path.to_owned(), discarded }),
            Err(error) => Err(error),
            Ok(()) => Ok(link),
        }
    }

    /// A connection that is yet to be synchronized.
    pub(crate) fn over(socket: OwnedFd) -> Self {
        Self { socket, pending: Vec::new(), chunk: vec![0; CHUNK].into_boxed_slice() }
    }

    /// Whether the connection stands and nothing came that was not asked for.
    pub(crate) fn is_quiet(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        self.pending.is_empty() && matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }

    /// Sends `line` (which ends in a newline) and returns the line that answers it, without its newline.
    pub(crate) fn exchange(
        &mut self,
        command: &'static str,
        line: &[u8],
        deadline: Instant,
    ) -> Result<Vec<u8>, AgentError> {
        self.write(command, line, deadline)?;
        let mut searched = 0;
        loop {
            if let Some(end) = self.pending[searched..].iter().position(|&byte| byte == b'\n') {
                let rest = self.pending.split_off(searched + end + 1);
                let mut reply = std::mem::replace(&mut self.pending, rest);
                reply.pop();
                return Ok(reply);
            }
            searched = self.pending.len();
            if searched > REPLY_MAX {
                let detail = format!("more than {REPLY_MAX} bytes without a newline");
                return Err(AgentError::Protocol { command, detail });
            }
            let count = self.read(command, deadline)?;
            self.pending.extend_from_slice(&self.chunk[..count]);
        }
    }

    /// Resets the agent's parser and discards all that comes until the reply to `id`.
    pub(crate) fn sync(&mut self, id: i64, deadline: Instant, discarded: &mut u64) -> Result<(), AgentError> {
        let line = format!("\u{0}{{\"execute\":\"{SYNC}\",\"arguments\":{{\"id\":{id}}}}}\n");
        let mut line = line.into_bytes();
        line[0] = DELIMITER;
        self.write(SYNC, &line, deadline)?;
        // `None` until a delimiter was seen, then what followed it.
        let mut reply: Option<Vec<u8>> = None;
        loop {
            let count = self.read(SYNC, deadline)?;
            for (index, &byte) in self.chunk[..count].iter().enumerate() {
                *discarded += 1;
                match (byte, &mut reply) {
                    (DELIMITER, _) => reply = Some(Vec::new()),
                    (_, None) => {}
                    (b'\n', Some(line)) => {
                        if answers(line, id) {
                            // What follows was not asked for; `is_quiet` will see it.
                            self.pending.extend_from_slice(&self.chunk[index + 1..count]);
                            return Ok(());
                        }
                        reply = None;
                    }
                    (_, Some(line)) if line.len() < SYNC_REPLY_MAX => line.push(byte),
                    (_, Some(_)) => reply = None,
                }
            }
        }
    }

    fn write(&self, command: &'static str, mut bytes: &[u8], deadline: Instant) -> Result<(), AgentError> {
        while !bytes.is_empty() {
            self.wait(command, PollFlags::OUT, deadline)?;
            match send(&self.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(AgentError::Io { command, source: errno.into() }),
            }
        }
        Ok(())
    }

    /// At least one byte into `chunk`; returns how many.
    fn read(&mut self, command: &'static str, deadline: Instant) -> Result<usize, AgentError> {
        loop {
            self.wait(command, PollFlags::IN, deadline)?;
            match recv(&self.socket, &mut *self.chunk, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => {
                    let source = io::Error::new(io::ErrorKind::UnexpectedEof, "the other side closed it");
                    return Err(AgentError::Io { command, source });
                }
                Ok((_, count)) => return Ok(count.min(CHUNK)),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(AgentError::Io { command, source: errno.into() }),
            }
        }
    }

    /// Returns when the socket may be ready. The deadline is looked at first, so that a peer which always has one more
    /// byte gains nothing by it.
    fn wait(&self, command: &'static str, flags: PollFlags, deadline: Instant) -> Result<(), AgentError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(AgentError::Timeout { command });
            }
            let timeout = Timespec::try_from(left).ok();
            let mut fds = [PollFd::new(&self.socket, flags)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(AgentError::Io { command, source: errno.into() }),
            }
        }
    }
}

/// Whether a line is the reply to the sync with this id.
fn answers(line: &[u8], id: i64) -> bool {
    is_object(line) && serde_json::from_slice::<SyncReply>(line).is_ok_and(|reply| reply.id == id)
}

/// Whether a line can be a reply: `serde` would also take an array for it, each member in its place.
pub(crate) fn is_object(line: &[u8]) -> bool {
    line.trim_ascii_start().starts_with(b"{")
}

/// Connects without ever blocking: a listener that does not accept (QEMU with another client) fills its queue, and a
/// plain `connect` would then sleep in the kernel with no deadline (unix(7): EAGAIN for a non-blocking one).
fn dial(path: &Path, deadline: Instant) -> Result<OwnedFd, Errno> {
    let address = SocketAddrUnix::new(path)?;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() + CONNECT_PAUSE < deadline => {
                thread::sleep(CONNECT_PAUSE);
            }
            Err(errno) => return Err(errno),
        }
    }
}
