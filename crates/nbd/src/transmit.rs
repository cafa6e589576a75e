//! The transmission phase: who reads requests, who executes them ("Transmission phase").
//!
//! ```text
//!            turn to read (Incoming)             one at a time (Outgoing)
//!  socket ─────────────▶ any thread ── execute ──────────▶ socket
//!             │              ▲
//!             └── passed on ─┘   before a request is executed, if the client has sent more
//! ```
//!
//! A connection has one thread. It reads a request, executes it, replies. Once a client is seen to send requests before it
//! has its replies, the turn to read is passed on before each execution, and threads are added, up to [`MAX_THREADS`],
//! that many of the server's spare ones are left; they go after a while without work. So no more requests are in flight
//! than there are threads; what more a client sends waits in its socket.
//!
//! # Invariants
//! - A thread has one buffer of [`PIECE`] bytes at most, whatever a request asks for: longer ones are done in pieces.
//! - No extent of the disk, and no lock but that of the replies, is held while the socket is waited for.
//! - A reply is sent in one go, or in chunks that say whose they are; replies of several threads do not mix.

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::context::MetaContext;
use crate::export::Use;
use crate::proto::reply::Style;
use crate::proto::request::{Command, Request, flag};
use crate::wire::{Incoming, Outgoing, Wire};

/// How much of a request is executed at once, and the size of a thread's buffer.
pub(crate) const PIECE: u64 = 512 * 1024;
/// Threads of a connection, and so its requests in flight.
const MAX_THREADS: usize = 8;
/// For so many requests it is remembered that the client does not wait for its replies.
const EAGER: usize = 64;
/// A thread beyond the first goes after so long without work.
const IDLE: Duration = Duration::from_secs(10);

/// Threads that all connections together may have beyond their first ones.
#[derive(Debug)]
pub(crate) struct Spare(AtomicUsize);

impl Spare {
    pub(crate) fn new(count: usize) -> Self {
        Self(AtomicUsize::new(count))
    }

    fn take(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    /// How many are left.
    #[cfg(test)]
    pub(crate) fn left(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn give(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A connection in the transmission phase.
#[derive(Debug)]
pub(crate) struct Transmission {
    pub(crate) wire: Wire,
    pub(crate) export: Use,
    pub(crate) style: Style,
    pub(crate) contexts: Vec<Arc<dyn MetaContext>>,
    /// Of the export, as the client was told: what is past it does not exist for this client.
    pub(crate) size: u64,
    pub(crate) outgoing: Mutex<Outgoing>,
    spare: Arc<Spare>,
    crew: Mutex<Crew>,
    turn: Condvar,
    left: Condvar,
    /// Requests that are executed while another thread has the turn to read.
    executing: AtomicUsize,
    /// The thread that executes a request has kept the turn to read.
    kept: AtomicBool,
    /// For how many more requests it is taken that the client sends them before it has its replies.
    eager: AtomicUsize,
}

/// The threads of a connection.
#[derive(Debug)]
struct Crew {
    /// The turn to read, if nobody has it.
    incoming: Option<Incoming>,
    threads: usize,
    waiting: usize,
    /// Nothing more is read.
    ended: bool,
}

/// What is agreed on with the client.
pub(crate) struct Terms {
    pub(crate) export: Use,
    pub(crate) style: Style,
    pub(crate) contexts: Vec<Arc<dyn MetaContext>>,
    pub(crate) size: u64,
}

impl Transmission {
    /// Serves the client until it goes, and returns when its last request is done.
    pub(crate) fn serve(wire: Wire, incoming: Incoming, outgoing: Outgoing, terms: Terms, spare: Arc<Spare>) {
        let crew = Crew { incoming: Some(incoming), threads: 1, waiting: 0, ended: false };
        let this = Arc::new(Self {
            wire,
            export: terms.export,
            style: terms.style,
            contexts: terms.contexts,
            size: terms.size,
            outgoing: Mutex::new(outgoing),
            spare,
            crew: Mutex::new(crew),
            turn: Condvar::new(),
            left: Condvar::new(),
            executing: AtomicUsize::new(0),
            kept: AtomicBool::new(false),
            eager: AtomicUsize::new(0),
        });
        this.work(false);
        let crew = this.left.wait_while(this.crew(), |crew| crew.threads > 1);
        drop(crew.unwrap_or_else(PoisonError::into_inner));
        this.wire.close(&mut this.outgoing());
    }

    fn crew(&self) -> MutexGuard<'_, Crew> {
        self.crew.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a reply, or a whole chunk of one.
    pub(crate) fn send(&self, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        // What is there before the client has its reply was sent without waiting for it.
        if self.kept.load(Ordering::Relaxed) && self.wire.socket().is_readable() {
            self.eager.store(EAGER, Ordering::Relaxed);
        }
        self.wire.send(&mut self.outgoing(), parts)
    }

    /// The right to write to the client.
    pub(crate) fn outgoing(&self) -> MutexGuard<'_, Outgoing> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each thread does: the first one, and `helper`s.
    fn work(self: &Arc<Self>, helper: bool) {
        let mut buffer = Vec::new();
        let mut kept = None;
        while let Some(mut incoming) = kept.take().or_else(|| self.take_turn(helper)) {
            match self.next(&mut incoming) {
                Ok(Some(request)) => match self.handle(request, incoming, &mut buffer) {
                    Ok(turn) => kept = turn,
                    Err(error) => return self.give_up(&error),
                },
                // In-flight requests of other threads are still answered.
                Ok(None) => return self.end(),
                Err(error) => return self.give_up(&error),
            }
        }
    }

    /// The next request, or `None` if the client goes in peace.
    fn next(&self, incoming: &mut Incoming) -> io::Result<Option<Request>> {
        let extended = self.style == Style::Extended;
        let mut header = [0; Request::EXTENDED_LEN];
        let header = if extended { &mut header[..] } else { &mut header[..Request::LEN] };
        if !self.wire.receive(incoming, header)? {
            return Ok(None);
        }
        let no_request = || io::Error::new(io::ErrorKind::InvalidData, "no request where one must be");
        let request = Request::decode(header, extended).ok_or_else(no_request)?;
        Ok((request.command != Command::Disconnect).then_some(request))
    }

    /// Executes one request. Returns the turn to read, if it was not passed on.
    fn handle(
        self: &Arc<Self>,
        request: Request,
        mut incoming: Incoming,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Option<Incoming>> {
        let last = self.receive_payload(&request, &mut incoming, buffer)?;
        if self.is_shared(&request, &incoming) {
            self.executing.fetch_add(1, Ordering::Relaxed);
            self.pass_turn(incoming);
            let executed = self.execute(&request, last, buffer);
            self.executing.fetch_sub(1, Ordering::Relaxed);
            return executed.map(|()| None);
        }
        self.kept.store(true, Ordering::Relaxed);
        let executed = self.execute(&request, last, buffer);
        self.kept.store(false, Ordering::Relaxed);
        executed.map(|()| Some(incoming))
    }

    /// Whether others should read on while this request is executed: it may take long, or the client does not wait for its
    /// reply.
    fn is_shared(&self, request: &Request, incoming: &Incoming) -> bool {
        if self.executing.load(Ordering::Relaxed) > 0 || self.wire.has_more(incoming) {
            self.eager.store(EAGER, Ordering::Relaxed);
            return true;
        }
        let is_quick = matches!(request.command, Command::Read | Command::Write | Command::BlockStatus)
            && !request.has(flag::FUA);
        let remembered = |left: usize| left.checked_sub(1);
        self.eager.fetch_update(Ordering::Relaxed, Ordering::Relaxed, remembered).is_ok() || !is_quick
    }

    fn take_turn(&self, helper: bool) -> Option<Incoming> {
        let mut crew = self.crew();
        crew.waiting += 1;
        let turn = loop {
            if crew.ended {
                break None;
            }
            if let Some(incoming) = crew.incoming.take() {
                break Some(incoming);
            }
            let timed_out;
            (crew, timed_out) = match helper {
                true => {
                    let (crew, waited) =
                        self.turn.wait_timeout(crew, IDLE).unwrap_or_else(PoisonError::into_inner);
                    (crew, waited.timed_out())
                }
                false => (self.turn.wait(crew).unwrap_or_else(PoisonError::into_inner), false),
            };
            if timed_out && crew.incoming.is_none() {
                break None;
            }
        };
        crew.waiting -= 1;
        turn
    }

    fn pass_turn(self: &Arc<Self>, incoming: Incoming) {
        let mut crew = self.crew();
        crew.incoming = Some(incoming);
        if crew.waiting > 0 {
            drop(crew);
            return self.turn.notify_one();
        }
        if crew.ended || crew.threads >= MAX_THREADS || !self.spare.take() {
            return;
        }
        crew.threads += 1;
        drop(crew);
        let helper = Helper(Arc::clone(self));
        // Without a thread, one of those that there are will read on when it is done: the helper is dropped.
        let _ = thread::Builder::new().name("nbd-helper".to_owned()).spawn(move || helper.0.work(true));
    }

    /// No more is read; what is in flight is answered.
    fn end(&self) {
        self.crew().ended = true;
        self.turn.notify_all();
    }

    fn give_up(&self, error: &io::Error) {
        tracing::debug!(export = self.export.name(), %error, "lost an NBD client");
        self.wire.socket().cut();
        self.end();
    }
}

/// A thread beyond a connection's first; dropped when it ends, however that comes about.
struct Helper(Arc<Transmission>);

impl Drop for Helper {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.wire.socket().cut();
            self.0.end();
        }
        self.0.spare.give();
        self.0.crew().threads -= 1;
        self.0.left.notify_all();
    }
}
