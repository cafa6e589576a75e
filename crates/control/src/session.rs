//! One client's connection, from the greeting to the end.

use std::cell::Cell;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::Value;
use snapshot::ClientId;

use crate::Service;
use crate::commands::{Caller, dispatch};
use crate::error::CommandError;
use crate::message::{self, encode, parse_request};
use crate::outbox::Outbox;
use crate::stream::{Stream, StreamError};

/// How long a client may not read a single byte while its socket buffer is full.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Between two progress events.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// A connection, shared by its reader, its writer, and whoever sends it events.
#[derive(Debug)]
pub(crate) struct Session {
    client: ClientId,
    stream: UnixStream,
    outbox: Outbox,
}

impl Session {
    pub(crate) fn new(client: ClientId, stream: UnixStream) -> Self {
        Self { client, stream, outbox: Outbox::default() }
    }

    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Takes no more commands; the one that runs is still answered.
    pub(crate) fn stop(&self) {
        // Fails only if the client is gone, and then there is nothing to stop.
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    /// Cuts the connection.
    pub(crate) fn cut(&self) {
        self.outbox.abort();
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Whether nobody can hear an answer any more: the client has closed its socket, or was cut off. One that only sends no
    /// more still listens.
    fn is_gone(&self) -> bool {
        let mut polled = [PollFd::new(&self.stream, PollFlags::empty())];
        let polls = rustix::event::poll(&mut polled, Some(&Timespec::default()));
        polls.is_ok() && polled.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
    }

    /// Serves the client until it has gone, or [`stop`](Self::stop), and all that was to be written is written.
    pub(crate) fn serve(&self, service: &dyn Service) -> io::Result<()> {
        self.stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        thread::scope(|scope| {
            thread::Builder::new().name("qmp-write".to_owned()).spawn_scoped(scope, || self.write())?;
            // Ends the writer even if a command panics; the panic stays this client's.
            let _finish = Finish(&self.outbox);
            self.outbox.reply(encode(&message::greeting()), false);
            self.read(service)
        })
    }

    fn write(&self) {
        while let Some(line) = self.outbox.take() {
            if let Err(error) = (&self.stream).write_all(&line) {
                tracing::debug!(%error, "a control client does not read its replies");
                break;
            }
        }
        self.cut();
    }

    fn read(&self, service: &dyn Service) -> io::Result<()> {
        let mut stream = Stream::default();
        let mut negotiated = false;
        let mut buffer = [0; 4096];
        loop {
            let count = match (&self.stream).read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut input = buffer.get(..count).unwrap_or_default();
            while let Some(item) = stream.next(&mut input) {
                let fatal = item.as_ref().is_err_and(StreamError::is_fatal);
                let reply = self.answer(service, &mut negotiated, item);
                if !self.outbox.reply(encode(&reply), negotiated) || fatal {
                    return Ok(());
                }
            }
        }
    }

    fn answer(
        &self,
        service: &dyn Service,
        negotiated: &mut bool,
        item: Result<Value, StreamError>,
    ) -> Value {
        let value = match item {
            Ok(value) => value,
            Err(error) => return message::reply(None, Err(CommandError::generic(error.to_string()))),
        };
        let last = Cell::new(None::<Instant>);
        let progress = |name: &str, data: Value| {
            if last.get().is_none_or(|last| last.elapsed() >= PROGRESS_INTERVAL) {
                last.set(Some(Instant::now()));
                self.outbox.offer(encode(&message::event(name, data, SystemTime::now())));
            }
            if self.is_gone() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let (id, request) = parse_request(value);
        let caller =
            Caller { service, client: self.client, progress: &progress, is_gone: &|| self.is_gone() };
        message::reply(id, request.and_then(|request| dispatch(&caller, negotiated, request)))
    }
}

/// Finishes an outbox when dropped.
struct Finish<'a>(&'a Outbox);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.finish();
    }
}
