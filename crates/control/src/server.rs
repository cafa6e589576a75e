//! The server: accepts clients, hands events to all of them, ends.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use block::Result;
use hostio::Listener;
use rustix::event::{PollFd, PollFlags, poll};
use snapshot::{ClientId, Event};

use crate::Service;
use crate::message::{self, encode};
use crate::outbox::Delivery;
use crate::session::Session;
use crate::throttle::Throttle;

/// How many clients may be connected at once; one more is turned away before the greeting.
pub const MAX_CLIENTS: usize = 64;

/// How long to wait before accepting again when the process has no descriptor or thread left.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// A running QMP server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    /// Closing the stream wakes the thread, which then ends. Gone once stopped.
    accepting: Option<(UnixStream, JoinHandle<()>)>,
    clients: Arc<Clients>,
}

impl Server {
    /// Takes clients from `listener` and serves `service`; what `events` yields goes to every client that has negotiated.
    ///
    /// # Errors
    /// A thread cannot be made.
    pub fn start(listener: Listener, service: Arc<dyn Service>, events: Receiver<Event>) -> Result<Self> {
        listener.socket().set_nonblocking(true)?;
        let (wake, woken) = UnixStream::pair()?;
        let clients = Arc::new(Clients::default());
        let accepting = thread::Builder::new().name("qmp-accept".to_owned()).spawn({
            let clients = Arc::clone(&clients);
            move || accept(&listener, &woken, &clients, &service)
        })?;
        let server = Self { accepting: Some((wake, accepting)), clients };
        // It ends with the sender, so nobody joins it; it must not keep the clients alive.
        let clients = Arc::downgrade(&server.clients);
        thread::Builder::new().name("qmp-events".to_owned()).spawn(move || distribute(&events, &clients))?;
        Ok(server)
    }

    /// Takes no more clients and no more commands, removes the socket, and waits up to `grace` for the commands that
    /// run to be answered. Clients that are left then are cut off; a command that runs still ends in its own time. All
    /// clients are told `last`, if it is given.
    pub fn stop(&mut self, last: Option<&Event>, grace: Duration) {
        // Not by shutting the listener down: one that was passed on is to be used again.
        let Some((wake, accepting)) = self.accepting.take() else { return };
        drop(wake);
        // Its panic, if any, was reported when it happened.
        let _ = accepting.join();
        last.and_then(line).iter().for_each(|line| self.clients.send(line));
        self.clients.stop(grace);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop(None, Duration::ZERO);
    }
}

/// Who is connected.
#[derive(Debug, Default)]
struct Clients {
    sessions: Mutex<BTreeMap<ClientId, Arc<Session>>>,
    left: Condvar,
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ClientId, Arc<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a client, unless there are too many.
    fn enter(self: &Arc<Self>, number: ClientId, stream: UnixStream) -> Option<Place> {
        let mut sessions = self.lock();
        if sessions.len() >= MAX_CLIENTS {
            return None;
        }
        let session = Arc::new(Session::new(number, stream));
        sessions.insert(number, Arc::clone(&session));
        Some(Place { clients: Arc::clone(self), number, session })
    }

    /// Sends an event to its addressee if that is still there, else to all.
    fn send(&self, Line { addressee, text: line }: &Line) {
        let sessions = self.lock();
        let addressee = addressee.filter(|client| sessions.contains_key(client));
        let told =
            sessions.iter().filter(|(client, _)| addressee.is_none_or(|addressee| addressee == **client));
        for (_, session) in told {
            if session.outbox().event(line) == Delivery::Overflow {
                tracing::warn!("cut off a control client that does not read its events");
                session.cut();
            }
        }
    }

    fn stop(&self, grace: Duration) {
        let sessions = self.lock();
        sessions.values().for_each(|session| session.stop());
        let (sessions, _) = self
            .left
            .wait_timeout_while(sessions, grace, |sessions| !sessions.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        sessions.values().for_each(|session| session.cut());
    }
}

/// A client's place among [`Clients`], given up on drop.
struct Place {
    clients: Arc<Clients>,
    number: ClientId,
    session: Arc<Session>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.lock().remove(&self.number);
        self.clients.left.notify_all();
    }
}

/// Takes clients until `woken` finds its other end closed.
fn accept(listener: &Listener, woken: &UnixStream, clients: &Arc<Clients>, service: &Arc<dyn Service>) {
    for number in 0.. {
        let mut polled = [PollFd::new(listener.socket(), PollFlags::IN), PollFd::new(woken, PollFlags::IN)];
        let ready = poll(&mut polled, None);
        if !polled[1].revents().is_empty() {
            return;
        }
        match ready.map_err(io::Error::from).and_then(|_| hostio::accept(listener.socket())) {
            Ok(stream) => stream.into_iter().for_each(|stream| admit(number, stream, clients, service)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                tracing::warn!(%error, "could not accept a control client");
                thread::sleep(EXHAUSTED);
            }
        }
    }
}

fn admit(number: ClientId, stream: UnixStream, clients: &Arc<Clients>, service: &Arc<dyn Service>) {
    let Some(place) = clients.enter(number, stream) else {
        tracing::warn!(limit = MAX_CLIENTS, "turned a control client away, there are too many");
        // Whoever keeps trying must not fill the log.
        return thread::sleep(EXHAUSTED);
    };
    let service = Arc::clone(service);
    let serve = move || {
        if let Err(error) = place.session.serve(&*service) {
            tracing::debug!(%error, "lost a control client");
        }
    };
    if let Err(error) = thread::Builder::new().name("qmp-client".to_owned()).spawn(serve) {
        tracing::warn!(%error, "no thread for a control client");
        thread::sleep(EXHAUSTED);
    }
}

/// Sends events to the clients until the sender or the server is gone.
fn distribute(events: &Receiver<Event>, clients: &Weak<Clients>) {
    let mut throttle = Throttle::default();
    loop {
        let received = match throttle.next() {
            Some(due) => events.recv_timeout(due.saturating_duration_since(Instant::now())),
            None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        let Some(clients) = clients.upgrade() else { return };
        let now = match received {
            Ok(event) => line(&event).and_then(|line| throttle.offer(event.name(), line, Instant::now())),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        for line in now.into_iter().chain(throttle.due(Instant::now())) {
            clients.send(&line);
        }
    }
}

/// An event, ready to be sent.
#[derive(Debug)]
struct Line {
    addressee: Option<ClientId>,
    text: Arc<[u8]>,
}

fn line(event: &Event) -> Option<Line> {
    let data = serde_json::to_value(event)
        .inspect_err(|error| tracing::error!(%error, event = event.name(), "an event cannot be told"))
        .ok()?;
    let text = encode(&message::event(event.name(), data, SystemTime::now())).into();
    Some(Line { addressee: event.addressee(), text })
}

#[cfg(test)]
mod tests;
