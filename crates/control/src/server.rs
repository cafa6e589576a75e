//! The server: accepts clients, and ends.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use block::Result;
use hostio::Listener;
use rustix::event::{PollFd, PollFlags, poll};
use snapshot::{ClientId, Event};

use crate::Service;
use crate::clients::{Clients, MAX_CLIENTS};
use crate::events::Announcer;

/// How long to wait before accepting again when the process has no descriptor or thread left.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// A running QMP server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    /// Gone once stopped.
    running: Option<Running>,
    announcer: Announcer,
}

#[derive(Debug)]
struct Running {
    /// Closing the stream wakes the thread that accepts, which then ends.
    wake: UnixStream,
    accepting: JoinHandle<()>,
    releasing: JoinHandle<()>,
}

impl Server {
    /// Takes clients from `listener` and serves `service`; what `announcer` is told goes to every client that has negotiated.
    ///
    /// # Errors
    /// A thread cannot be made.
    pub fn start(listener: Listener, service: Arc<dyn Service>, announcer: Announcer) -> Result<Self> {
        listener.socket().set_nonblocking(true)?;
        let (wake, woken) = UnixStream::pair()?;
        let spawn = |name: &str| thread::Builder::new().name(name.to_owned());
        let releasing = spawn("qmp-events").spawn({
            let announcer = announcer.clone();
            move || announcer.release()
        })?;
        let clients = Arc::clone(&announcer.clients);
        let accepting = spawn("qmp-accept").spawn(move || accept(&listener, &woken, &clients, &service));
        let accepting = accepting.inspect_err(|_| announcer.end())?;
        Ok(Self { running: Some(Running { wake, accepting, releasing }), announcer })
    }

    /// Takes no more clients and no more commands, removes the socket, and waits up to `grace` for the commands that
    /// run to be answered. Clients that are left then are cut off; a command that runs still ends in its own time. All
    /// clients are told `last`, if it is given.
    pub fn stop(&mut self, last: Option<&Event>, grace: Duration) {
        // Not by shutting the listener down: one that was passed on is to be used again.
        let Some(Running { wake, accepting, releasing }) = self.running.take() else { return };
        drop(wake);
        // Its panic, if any, was reported when it happened.
        let _ = accepting.join();
        last.iter().for_each(|event| self.announcer.tell_last(event));
        self.announcer.clients.stop(grace);
        self.announcer.end();
        let _ = releasing.join();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop(None, Duration::ZERO);
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

#[cfg(test)]
mod tests;
