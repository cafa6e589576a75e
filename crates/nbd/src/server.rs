//! The server: accepts clients, knows who is connected, ends.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use block::Result;
use rustix::event::{PollFd, PollFlags, poll};

use crate::export::{Export, ExportStatus, Exports, Removal};
use crate::listen::{Address, Listening};
use crate::negotiate::{self, Negotiator, Outcome};
use crate::tls::Tls;
use crate::transmit::{Spare, Terms, Transmission};
use crate::wire::{Handshake, Incoming, Outgoing, Socket, Wire};

/// How long to wait before accepting again when the process has no descriptor or thread left, or too many clients came.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// How long the end waits for what disks do for clients that were cut off.
const DISKS: Duration = Duration::from_secs(5);
/// Threads that all connections together may have beyond their first ones.
const SPARE_THREADS: usize = 64;

/// How a server treats its clients.
#[derive(Debug)]
pub struct Config {
    /// How many may be connected at once. One more takes the place of whoever has been connected the longest without choosing
    /// an export, and is turned away if all have chosen.
    pub max_connections: usize,
    /// How long a client may take from connecting to choosing an export.
    pub handshake: Duration,
    /// How long a client may take to read one piece of a reply, half a MiB at most. Not zero.
    pub patience: Duration,
    /// With it, clients must begin TLS before anything else.
    pub tls: Option<Tls>,
    /// How many are connected, of this server and of all others that count here.
    pub connected: Arc<AtomicUsize>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_connections: 100,
            handshake: Duration::from_secs(30),
            patience: Duration::from_secs(60),
            tls: None,
            connected: Arc::default(),
        }
    }
}

/// An NBD server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    listening: Mutex<Vec<Accepting>>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    exports: Exports,
    spare: Arc<Spare>,
    clients: Mutex<Clients>,
    left: Condvar,
}

/// Who is connected.
#[derive(Debug, Default)]
struct Clients {
    /// In the order in which they came.
    sockets: BTreeMap<u64, Arc<Socket>>,
    /// Those that have not yet chosen an export.
    undecided: BTreeSet<u64>,
    next: u64,
    stopped: bool,
}

/// A socket that listens, and its thread.
#[derive(Debug)]
struct Accepting {
    address: Option<SocketAddr>,
    /// Closing it wakes the thread, which then ends.
    wake: UnixStream,
    thread: JoinHandle<()>,
}

impl Server {
    /// A server without exports, at which nobody can connect yet.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let shared = Shared {
            config,
            exports: Exports::default(),
            spare: Arc::new(Spare::new(SPARE_THREADS)),
            clients: Mutex::default(),
            left: Condvar::new(),
        };
        Self { shared: Arc::new(shared), listening: Mutex::default() }
    }

    /// Takes clients at one more address. Returns where TCP clients connect.
    ///
    /// # Errors
    /// The address can not be listened at, or [`Address::Inherited`] is no socket for that.
    pub fn listen(&self, address: Address) -> Result<Option<SocketAddr>> {
        let socket = Listening::open(address)?;
        let address = socket.tcp_address();
        let (wake, woken) = UnixStream::pair()?;
        let shared = Arc::clone(&self.shared);
        let accept = move || shared.accept(&socket, &woken);
        let thread = thread::Builder::new().name("nbd-accept".to_owned()).spawn(accept)?;
        self.listening().push(Accepting { address, wake, thread });
        Ok(address)
    }

    /// Where TCP clients connect, in the order in which the addresses were added.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listening().iter().filter_map(|accepting| accepting.address).collect()
    }

    /// Offers one more export.
    ///
    /// # Errors
    /// [`Busy`](block::ErrorKind::Busy) if there is one of its name, [`InvalidInput`](block::ErrorKind::InvalidInput) if NBD
    /// can not say one of its names.
    pub fn add_export(&self, export: Export) -> Result<()> {
        self.shared.exports.add(export)
    }

    /// Offers an export no more. Clients that it cut off may have requests in flight yet, which end in their own time:
    /// [`Export::on_gone`] tells when.
    ///
    /// # Errors
    /// [`NotFound`](block::ErrorKind::NotFound), or [`Busy`](block::ErrorKind::Busy) if it is in use and that matters.
    pub fn remove_export(&self, name: &str, how: Removal) -> Result<()> {
        self.shared.exports.remove(name, how)
    }

    /// The exports, by name.
    pub fn exports(&self) -> Vec<ExportStatus> {
        self.shared.exports.status()
    }

    /// How many clients are connected, those that have not yet chosen an export included.
    pub fn clients(&self) -> usize {
        self.shared.clients().sockets.len()
    }

    /// Takes no more clients and no more requests, and waits up to `grace` for those in flight; then cuts off who is left
    /// and waits, at most 5 s more, for what the disks still do for them. All exports are removed; one whose disk hangs is gone
    /// when that has answered ([`Export::on_gone`]). A server that was shut down stays so.
    pub fn shutdown(&self, grace: Duration) {
        for accepting in std::mem::take(&mut *self.listening()) {
            drop(accepting.wake);
            // Its panic, if any, was reported when it happened.
            let _ = accepting.thread.join();
        }
        let mut clients = self.shared.clients();
        clients.stopped = true;
        clients.sockets.values().for_each(|socket| socket.stop_reading());
        let is_connected = |clients: &mut Clients| !clients.sockets.is_empty();
        let (clients, _) = self
            .shared
            .left
            .wait_timeout_while(clients, grace, is_connected)
            .unwrap_or_else(PoisonError::into_inner);
        clients.sockets.values().for_each(|socket| socket.cut());
        let (clients, _) = self
            .shared
            .left
            .wait_timeout_while(clients, DISKS, is_connected)
            .unwrap_or_else(PoisonError::into_inner);
        if !clients.sockets.is_empty() {
            tracing::warn!(
                clients = clients.sockets.len(),
                "a disk does not answer, and NBD clients wait for it"
            );
        }
        drop(clients);
        self.shared.exports.clear();
    }

    fn listening(&self) -> MutexGuard<'_, Vec<Accepting>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown(Duration::ZERO);
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes clients until `woken` finds its other end closed.
    fn accept(self: &Arc<Self>, listening: &Listening, woken: &UnixStream) {
        loop {
            let mut polled = [PollFd::new(listening, PollFlags::IN), PollFd::new(woken, PollFlags::IN)];
            let ready = poll(&mut polled, None);
            if !polled[1].revents().is_empty() {
                return;
            }
            let accepted = ready.map_err(io::Error::from).and_then(|_| listening.accept());
            match accepted.and_then(|socket| self.admit(socket)) {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => {
                    tracing::warn!(%error, "could not take an NBD client");
                    // Whoever keeps trying must not fill the log.
                    thread::sleep(EXHAUSTED);
                }
                Ok(()) => {}
            }
        }
    }

    fn admit(self: &Arc<Self>, socket: Socket) -> io::Result<()> {
        let Some(place) = self.enter(socket) else {
            return Err(io::Error::other(format!("there are {} already", self.config.max_connections)));
        };
        let serve = move || {
            if let Err(error) = place.serve() {
                tracing::debug!(%error, "lost an NBD client in its handshake");
            }
        };
        thread::Builder::new().name("nbd-client".to_owned()).spawn(serve).map(drop)
    }

    fn enter(self: &Arc<Self>, socket: Socket) -> Option<Place> {
        let is_full = |clients: &mut Clients| clients.sockets.len() >= self.config.max_connections;
        let mut clients = self.clients();
        if is_full(&mut clients) {
            // Whoever only connects must not keep others out.
            let oldest = clients.undecided.first().and_then(|number| clients.sockets.get(number));
            oldest?.cut();
            let left = self.left.wait_timeout_while(clients, EXHAUSTED, is_full);
            clients = left.unwrap_or_else(PoisonError::into_inner).0;
        }
        if clients.stopped || is_full(&mut clients) {
            return None;
        }
        let (number, socket) = (clients.next, Arc::new(socket));
        clients.next += 1;
        clients.sockets.insert(number, Arc::clone(&socket));
        clients.undecided.insert(number);
        self.config.connected.fetch_add(1, Ordering::Relaxed);
        Some(Place { shared: Arc::clone(self), number, socket })
    }
}

/// A client's place among [`Clients`], given up on drop.
struct Place {
    shared: Arc<Shared>,
    number: u64,
    socket: Arc<Socket>,
}

impl Place {
    /// Serves the client until it goes.
    fn serve(&self) -> io::Result<()> {
        self.socket.prepare();
        let config = &self.shared.config;
        let deadline = Instant::now() + config.handshake;
        let tls = if config.tls.is_some() { negotiate::Tls::Required } else { negotiate::Tls::None };
        let mut negotiator = Negotiator::new(&self.shared.exports, tls);
        let mut wire = Wire::new(Arc::clone(&self.socket), config.patience);
        let (mut incoming, mut outgoing) = (Incoming::default(), Outgoing::default());
        let chosen = loop {
            let mut stream =
                Handshake { wire: &wire, incoming: &mut incoming, outgoing: &mut outgoing, deadline };
            match (negotiator.run(&mut stream)?, &config.tls) {
                (Outcome::Chosen(chosen), _) => break chosen,
                (Outcome::StartTls, Some(tls)) => wire.start_tls(tls.config(), deadline)?,
                (Outcome::StartTls | Outcome::End, _) => {
                    wire.close(&mut outgoing);
                    return Ok(());
                }
            }
        };
        drop(negotiator);
        let entered = self.shared.exports.enter(&chosen.export, self.number, &self.socket);
        let export = entered.ok_or_else(|| io::Error::other("the export was removed meanwhile"))?;
        // Before the client knows.
        self.shared.clients().undecided.remove(&self.number);
        Handshake { wire: &wire, incoming: &mut incoming, outgoing: &mut outgoing, deadline }
            .write_all(&chosen.farewell)?;
        wire.begin_transmission(&mut incoming)?;
        let negotiate::Chosen { style, contexts, size, .. } = chosen;
        let terms = Terms { export, style, contexts, size };
        Transmission::serve(wire, incoming, outgoing, terms, Arc::clone(&self.shared.spare));
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Whatever happened, the client hears that it is over.
        self.socket.cut();
        let mut clients = self.shared.clients();
        clients.sockets.remove(&self.number);
        clients.undecided.remove(&self.number);
        self.shared.config.connected.fetch_sub(1, Ordering::Relaxed);
        drop(clients);
        self.shared.left.notify_all();
    }
}

#[cfg(test)]
mod tests;
