//! A disk's socket, and the sessions at it.
//!
//! ```text
//!   seat 0 ─▶ door ─▶ wait for a front-end, seat it ─▶ serve it to its end ─┐
//!   seat 1 ─▶ door ─▶ …                                                     │
//!      └────────────────────────────────────────────────────────────────────┘
//! ```
//! A thread a seat. One is at the door and waits for the next front-end, the other one, if it has none, for the door. Two
//! are connected at once only while a guest is moved from one to the other, see [`floor`](crate::floor).

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use block::{Context, Disk, Error, ErrorKind, Gate, Parking, Pulse, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};

use crate::allowance::Allowance;
use crate::cache::Field;
use crate::device::Device;
use crate::engine::ID_LEN;
use crate::errors::OnFailure;
use crate::floor::Floor;
use crate::guest::Memory;
use crate::inspect::Inspector;
use crate::relay;
use crate::vring::SharedMemory;

/// Front-ends that may be connected at once: one whose guest runs, and one that its guest is being moved to. Others wait
/// in the socket's backlog.
const SEATS: usize = 2;

/// The framework names the queues of a thread in a word's bits.
const MAX_QUEUES: u16 = 64;

/// How long to wait before another try, when a session could not be set up (no descriptors, no memory).
const RETRY: Duration = Duration::from_secs(1);

/// What a session tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SessionEvent {
    /// A front-end has connected. Its queues may not be set up yet.
    Connected,
    /// It is gone, and nothing of it is in flight.
    Disconnected {
        /// Others that are still connected.
        left: usize,
    },
}

/// What to serve, and where.
pub struct DeviceConfig {
    /// The disk's name, for logs and threads.
    pub name: String,
    /// The socket's path; see [`Server::start`].
    pub socket: PathBuf,
    /// What the guest reads as the disk's serial: at most 20 bytes of ASCII.
    pub serial: String,
    /// Virtqueues, 1 to 64, each with a worker thread. A front-end may use fewer; QEMU refuses to start with more.
    pub queues: u16,
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// The disk's gate. The workers of every session stand before it.
    pub gate: Arc<Gate>,
    /// What tells how long the disk's requests take. The workers of every session feed it.
    pub pulse: Arc<Pulse>,
    /// What becomes of changes that the host can not carry out, and which of them wait.
    pub parking: Arc<Parking>,
    /// What its front-ends may have mapped.
    pub allowance: Allowance,
    /// Told of requests that the host could not carry out.
    pub on_failure: OnFailure,
    /// Told of sessions, of one event after the other, from a session's thread: it delays others while it runs.
    pub on_session: Box<dyn Fn(SessionEvent) + Send + Sync>,
}

impl DeviceConfig {
    /// The serial as a request for it is answered, filled up with zeroes. [`Server::start`] has checked its length.
    pub(crate) fn serial_bytes(&self) -> [u8; ID_LEN] {
        let mut bytes = self.serial.bytes();
        std::array::from_fn(|_| bytes.next().unwrap_or(0))
    }

    fn check(&self) -> Result<()> {
        let refuse = |story: String| Err(Error::new(ErrorKind::InvalidInput, story));
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return refuse(format!("{} queues; a device has 1 to {MAX_QUEUES}", self.queues));
        }
        if self.serial.len() > ID_LEN
            || !self.serial.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
        {
            return refuse(format!("the serial `{}` is not at most {ID_LEN} ASCII characters", self.serial));
        }
        Ok(())
    }
}

/// A disk being served.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Front-ends.
    connected: Mutex<usize>,
    /// Held by the thread that waits for the next front-end, until that one is seated.
    door: Mutex<()>,
    stopping: AtomicBool,
    /// Readable once `stopping` is set.
    stop: OwnedFd,
    sessions: Mutex<Vec<Session>>,
    cache: Arc<Field>,
    floor: Arc<Floor>,
}

/// A session that is connected.
#[derive(Debug)]
struct Session {
    number: u64,
    front: UnixStream,
    /// On which the front-end is told of changes, if it has given one.
    channel: Option<OwnedFd>,
}

/// Tells the front-ends of a server what has changed.
#[derive(Clone, Debug)]
pub struct Notifier(Arc<Shared>);

impl Notifier {
    /// The disk's capacity is another one. `true` if each front-end was told, so that its guest sees it at once. One that
    /// did not negotiate the feature `BACKEND_REQ` reads it the next time it connects.
    pub fn resized(&self) -> bool {
        let sessions = lock(&self.0.sessions);
        let told = |session: &&Session| match session.channel.as_ref().map(relay::tell_config_change) {
            Some(Ok(())) => true,
            None => false,
            Some(Err(error)) => {
                tracing::warn!("a front-end could not be told of the new size: {error}");
                false
            }
        };
        sessions.iter().filter(told).count() == sessions.len().max(1)
    }
}

impl Server {
    /// Listens at the socket, mode 0600, and serves whoever connects, the rings of one at a time. A stale socket file is
    /// replaced; [`ErrorKind::Busy`] if somebody listens there.
    pub fn start(config: DeviceConfig) -> Result<Self> {
        config.check()?;
        let socket = hostio::Listener::bind(&config.socket)?;
        let loopback = hostio::Loopback::beside(&config.socket)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?;
        let shared = Arc::new(Shared {
            connected: Mutex::new(0),
            door: Mutex::new(()),
            stopping: AtomicBool::new(false),
            stop,
            sessions: Mutex::default(),
            cache: Arc::default(),
            floor: Arc::default(),
        });
        let (name, post) = (format!("{}-session", config.name), Arc::new(Post { config, socket, loopback }));
        // Dropped at an error, it ends those that have been started.
        let mut server = Self { shared, threads: Vec::new() };
        for _ in 0..SEATS {
            let (shared, post) = (Arc::clone(&server.shared), Arc::clone(&post));
            let thread = thread::Builder::new().name(name.clone()).spawn(move || shared.run(&post));
            server.threads.push(thread.context(|| "start a session's thread")?);
        }
        Ok(server)
    }

    /// Whether a front-end is connected.
    pub fn connected(&self) -> bool {
        *lock(&self.shared.connected) > 0
    }

    /// The way to tell its front-ends of changes.
    pub fn notifier(&self) -> Notifier {
        Notifier(Arc::clone(&self.shared))
    }

    /// Ends the sessions, with all their requests answered, and removes the socket.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Only a counter near its end would refuse, and that one is readable.
        let _ = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        for session in &*lock(&self.shared.sessions) {
            // It may be gone already.
            let _ = session.front.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a session's thread panicked");
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Where front-ends come to, and for which disk.
struct Post {
    config: DeviceConfig,
    socket: hostio::Listener,
    loopback: hostio::Loopback,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn run(&self, post: &Post) {
        loop {
            let mut door = Some(lock(&self.door));
            let Some(front) = self.next_client(post.socket.socket()) else { return };
            // It is kept, at the door, until there are descriptors and memory for it.
            while let Err(error) = self.serve(post, &front, &mut door) {
                tracing::error!(disk = post.config.name, "could not serve a front-end: {error}");
                self.pause();
                if self.is_stopping() {
                    break;
                }
            }
        }
    }

    /// The next front-end that may connect; `None` when it is time to stop.
    fn next_client(&self, listener: &UnixListener) -> Option<UnixStream> {
        while !self.is_stopping() {
            let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            let accepted = match poll(&mut fds, None) {
                Ok(_) if !fds[0].revents().is_empty() && !self.is_stopping() => hostio::accept(listener),
                Ok(_) | Err(Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
            match accepted {
                Ok(None) => {}
                Ok(front) => return front,
                Err(error) => {
                    tracing::error!("could not wait for a front-end: {error}");
                    self.pause();
                }
            }
        }
        None
    }

    fn keep(&self, number: u64, channel: OwnedFd) {
        if let Some(session) = lock(&self.sessions).iter_mut().find(|session| session.number == number) {
            session.channel = Some(channel);
        }
    }

    /// A front-end is there. Told before it can send a request, so that nobody takes the disk for unused while it is read.
    fn arrived(&self, config: &DeviceConfig) {
        let mut connected = lock(&self.connected);
        *connected += 1;
        (config.on_session)(SessionEvent::Connected);
    }

    /// It is gone, with all that was its own.
    fn left(&self, config: &DeviceConfig) {
        let mut connected = lock(&self.connected);
        *connected -= 1;
        (config.on_session)(SessionEvent::Disconnected { left: *connected });
    }

    fn pause(&self) {
        let timeout = Timespec { tv_sec: RETRY.as_secs().cast_signed(), tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(&self.stop, PollFlags::IN)], Some(&timeout));
    }

    /// Serves a front-end to its end. A used daemon can not take another connection, so each gets its own, and a device with
    /// it. On an error it has not begun to, and the door is as it was.
    fn serve(&self, post: &Post, front: &UnixStream, door: &mut Option<MutexGuard<'_, ()>>) -> Result<()> {
        let config = &post.config;
        let memory = SharedMemory::new(Memory::new());
        let device = Arc::new(Device::new(config, &self.cache, &self.floor)?);
        let daemon = VhostUserDaemon::new(config.name.clone(), Arc::clone(&device), memory);
        let mut seated = false;
        let served = match daemon {
            Ok(mut daemon) => {
                let served = device.watch(&daemon).context(|| "watch a worker's events").and_then(|()| {
                    self.arrived(config);
                    seated = true;
                    self.converse(post, &device, &mut daemon, front, door)
                });
                // The framework leaves the rings running when a front-end goes, or when there was none after all.
                device.close();
                served
                // Here the daemon goes, and its threads are joined.
            }
            Err(error) => {
                device.end_threads();
                Err(other(&error))
            }
        };
        device.close_exits();
        // With all that is mapped: who comes next may need all of the disk's share.
        drop(device);
        if seated {
            self.left(config);
        }
        served
    }

    /// Seats a front-end, and passes on what it says until it goes.
    fn converse(
        &self,
        post: &Post,
        device: &Arc<Device>,
        daemon: &mut VhostUserDaemon<Arc<Device>>,
        front: &UnixStream,
        door: &mut Option<MutexGuard<'_, ()>>,
    ) -> Result<()> {
        let Post { config, loopback, .. } = post;
        let framework = loopback.connect()?;
        daemon.start(&mut Listener::from(loopback.listener().try_clone()?)).map_err(|error| other(&error))?;
        let number = device.session();
        lock(&self.sessions).push(Session { number, front: front.try_clone()?, channel: None });
        *door = None;
        tracing::info!(disk = config.name, "a front-end has connected");
        // Who stops from here on finds the session; who did before is found here.
        let relayed = match self.is_stopping() {
            true => Ok(()),
            false => {
                let keep = |channel| self.keep(number, channel);
                let mut inspector = Inspector::new(device, &keep);
                relay::run(front, &framework, device.maps().gone(), |message| inspector.inspect(message))
            }
        };
        lock(&self.sessions).retain(|session| session.number != number);
        // The framework reads to the end what has been passed on.
        drop(framework);
        // Before that is waited for: a worker that its front-end holds up may hold a ring's lock, and is freed here.
        device.close();
        let ended = daemon.wait();
        if let Err(error) = relayed {
            tracing::warn!(disk = config.name, "the session is ended: {error}");
        }
        match ended {
            Ok(()) | Err(DaemonError::HandleRequest(VhostUserError::Disconnected)) => {
                tracing::info!(disk = config.name, "the front-end has disconnected");
            }
            Err(error) => tracing::warn!(disk = config.name, "the session ended: {error}"),
        }
        Ok(())
    }
}

fn other(error: &DaemonError) -> Error {
    Error::new(ErrorKind::Io, error.to_string())
}
