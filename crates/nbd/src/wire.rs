//! A connection's bytes: a Unix or TCP socket, plain or under TLS, read by one thread while another writes.
//!
//! # Invariants
//! - Whoever reads has the [`Incoming`], whoever writes the [`Outgoing`]. Under TLS both take the session's lock, but never
//!   while they wait for the socket: a client that does not read can not keep its requests from being read, nor the other
//!   way round.
//! - Nothing is read ahead before the transmission phase, so nothing that came in plain text is taken for what was said
//!   under TLS.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use rustls::{ServerConfig, ServerConnection};

/// Small reads are served from this much read ahead, a few dozen requests.
const AHEAD: usize = 4096;
/// Under TLS: a record and its header, and a little.
const RECORD: usize = 17 * 1024;
/// How much is encrypted at once, and so how much memory a reply under TLS takes beside its own.
const ENCRYPT: usize = 64 * 1024;
/// How long the kernel waits in one call for a client to read, before we look at the clock.
const SEND_TURN: Duration = Duration::from_secs(5);
/// A peer that is gone without a word is noticed after this and five probes.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// Sets what a TCP connection needs; best effort, for it works without.
    pub(crate) fn prepare(&self) {
        if let Self::Tcp(stream) = self {
            let _ = stream.set_nodelay(true);
            let _ = sockopt::set_socket_keepalive(stream, true);
            let _ = sockopt::set_tcp_keepidle(stream, KEEPALIVE);
            let _ = sockopt::set_tcp_keepintvl(stream, KEEPALIVE / 6);
            let _ = sockopt::set_tcp_keepcnt(stream, 5);
        }
    }

    /// Ends the connection: whoever reads or writes it fails from now on.
    pub(crate) fn cut(&self) {
        self.shut(std::net::Shutdown::Both);
    }

    /// Reads nothing more than has arrived; replies are still written.
    pub(crate) fn stop_reading(&self) {
        self.shut(std::net::Shutdown::Read);
    }

    fn shut(&self, how: std::net::Shutdown) {
        // It fails if the client has gone first.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }

    /// How long a call may wait; `None` is for ever.
    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(write))
            }
            Self::Tcp(stream) => stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(write)),
        }
    }

    /// Whether something has arrived, or the other end is gone.
    pub(crate) fn is_readable(&self) -> bool {
        let mut polled = [PollFd::new(self, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&*stream).read(buf),
            Socket::Tcp(stream) => (&*stream).read(buf),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&*stream).write_vectored(bufs),
            Socket::Tcp(stream) => (&*stream).write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What was read from the socket and not yet asked for. Under TLS it is encrypted.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    ahead: bool,
}

impl Incoming {
    fn buffered(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Waits for more, once nothing is left.
    fn fill(&mut self, socket: &Socket, room: usize) -> io::Result<usize> {
        self.buffer.resize(room, 0);
        self.start = 0;
        self.end = 0;
        let mut socket = socket;
        self.end = uninterrupted(|| socket.read(&mut self.buffer))?;
        Ok(self.end)
    }
}

/// What was encrypted and not yet sent: nothing, but during a call.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    encrypted: Vec<u8>,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: Arc<Socket>,
    /// How long a client may take to read one piece of a reply.
    patience: Duration,
    tls: Option<Mutex<ServerConnection>>,
}

impl Wire {
    pub(crate) fn new(socket: Arc<Socket>, patience: Duration) -> Self {
        Self { socket, patience, tls: None }
    }

    pub(crate) fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }

    /// Goes on under TLS. Ends with an error at the deadline, or where the client is not one of ours.
    pub(crate) fn start_tls(&mut self, config: Arc<ServerConfig>, deadline: Instant) -> io::Result<()> {
        let mut session = ServerConnection::new(config).map_err(io::Error::other)?;
        session.set_buffer_limit(Some(ENCRYPT));
        let mut socket = Timed { socket: &self.socket, deadline };
        while session.is_handshaking() {
            if session.complete_io(&mut socket)? == (0, 0) {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        self.tls = Some(Mutex::new(session));
        Ok(())
    }

    /// The handshake is over: from now on small reads are read ahead, and a client may be silent for as long as it likes.
    pub(crate) fn begin_transmission(&self, incoming: &mut Incoming) -> io::Result<()> {
        incoming.ahead = true;
        self.socket.set_timeouts(None, Some(SEND_TURN.min(self.patience)))
    }

    /// Fills `buf`. `false` if the client has ended the connection before its first byte.
    pub(crate) fn receive(&self, incoming: &mut Incoming, buf: &mut [u8]) -> io::Result<bool> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.receive_some(incoming, rest)? {
                0 if done == 0 => return Ok(false),
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                count => done += count,
            }
        }
        Ok(true)
    }

    fn receive_some(&self, incoming: &mut Incoming, buf: &mut [u8]) -> io::Result<usize> {
        match &self.tls {
            Some(tls) => self.receive_decrypted(tls, incoming, buf),
            None if incoming.buffered().is_empty() && (!incoming.ahead || buf.len() >= AHEAD) => {
                uninterrupted(|| (&*self.socket).read(buf))
            }
            None => {
                if incoming.buffered().is_empty() && incoming.fill(&self.socket, AHEAD)? == 0 {
                    return Ok(0);
                }
                let count = incoming.buffered().len().min(buf.len());
                buf[..count].copy_from_slice(&incoming.buffered()[..count]);
                incoming.start += count;
                Ok(count)
            }
        }
    }

    fn receive_decrypted(
        &self,
        tls: &Mutex<ServerConnection>,
        incoming: &mut Incoming,
        buf: &mut [u8],
    ) -> io::Result<usize> {
        loop {
            if let Some(count) = decrypt(&mut lock(tls), incoming, buf)? {
                return Ok(count);
            }
            if incoming.fill(&self.socket, RECORD)? == 0 {
                // Without a farewell, which may be an attack: but to cut a client off is all that it could do.
                return Ok(0);
            }
        }
    }

    /// Whether a read would find something at once.
    pub(crate) fn has_more(&self, incoming: &Incoming) -> bool {
        // What is left of a TLS record may be no whole one; then the socket tells nothing wrong either, only late.
        !incoming.buffered().is_empty() || self.socket.is_readable()
    }

    /// Writes all of `parts`. An error if the client does not read them in time.
    pub(crate) fn send(&self, outgoing: &mut Outgoing, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        let deadline = Instant::now() + self.patience;
        let Some(tls) = &self.tls else { return send_all(&self.socket, parts, deadline) };
        let mut parts = parts;
        while !parts.is_empty() {
            {
                let mut session = lock(tls);
                let count = session.writer().write_vectored(parts)?;
                IoSlice::advance_slices(&mut parts, count);
                skip_empty(&mut parts);
                take_encrypted(&mut session, outgoing)?;
            }
            send_all(&self.socket, &mut [IoSlice::new(&outgoing.encrypted)], deadline)?;
            outgoing.encrypted.clear();
        }
        Ok(())
    }

    /// Says farewell where the protocol has one, and ends the connection.
    pub(crate) fn close(&self, outgoing: &mut Outgoing) {
        if let Some(tls) = &self.tls {
            let mut session = lock(tls);
            session.send_close_notify();
            let taken = take_encrypted(&mut session, outgoing);
            drop(session);
            if taken.is_ok() {
                // The client may be gone already.
                let _ = (&*self.socket).write(&outgoing.encrypted);
            }
        }
        self.socket.cut();
    }
}

fn lock(tls: &Mutex<ServerConnection>) -> MutexGuard<'_, ServerConnection> {
    tls.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Decrypts what has come: the bytes that it gave, 0 at the client's farewell, or `None` if more must come first.
fn decrypt(
    session: &mut ServerConnection,
    incoming: &mut Incoming,
    buf: &mut [u8],
) -> io::Result<Option<usize>> {
    loop {
        match session.reader().read(buf) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            done => return done.map(Some),
        }
        if incoming.buffered().is_empty() {
            return Ok(None);
        }
        let count = session.read_tls(&mut incoming.buffered())?;
        if count == 0 {
            return Err(ErrorKind::InvalidData.into());
        }
        incoming.start += count;
        session.process_new_packets().map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
    }
}

fn take_encrypted(session: &mut ServerConnection, outgoing: &mut Outgoing) -> io::Result<()> {
    while session.wants_write() {
        session.write_tls(&mut outgoing.encrypted)?;
    }
    Ok(())
}

fn skip_empty(parts: &mut &mut [IoSlice<'_>]) {
    IoSlice::advance_slices(parts, 0);
}

fn send_all(socket: &Socket, parts: &mut [IoSlice<'_>], deadline: Instant) -> io::Result<()> {
    let (mut parts, mut socket) = (parts, socket);
    skip_empty(&mut parts);
    while !parts.is_empty() {
        match uninterrupted(|| socket.write_vectored(parts)) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut parts, count),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if !parts.is_empty() && Instant::now() >= deadline {
            return Err(io::Error::new(ErrorKind::TimedOut, "the client does not read its replies"));
        }
    }
    Ok(())
}

fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// A socket that fails at a deadline, whatever the client does until then.
struct Timed<'a> {
    socket: &'a Socket,
    deadline: Instant,
}

impl Timed<'_> {
    fn wait(&self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(ErrorKind::TimedOut, "the handshake took too long"));
        }
        self.socket.set_timeouts(Some(left), Some(left))
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.wait()?;
        uninterrupted(|| (&mut &*self.socket).read(buf))
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.wait()?;
        uninterrupted(|| (&mut &*self.socket).write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The connection during the handshake, as a plain stream with a deadline.
#[derive(Debug)]
pub(crate) struct Handshake<'a> {
    pub(crate) wire: &'a Wire,
    pub(crate) incoming: &'a mut Incoming,
    pub(crate) outgoing: &'a mut Outgoing,
    pub(crate) deadline: Instant,
}

impl Handshake<'_> {
    fn wait(&self) -> io::Result<()> {
        Timed { socket: &self.wire.socket, deadline: self.deadline }.wait()
    }
}

impl Read for Handshake<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.wait()?;
        self.wire.receive_some(self.incoming, buf)
    }
}

impl Write for Handshake<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.wait()?;
        self.wire.send(self.outgoing, &mut [IoSlice::new(buf)])?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
