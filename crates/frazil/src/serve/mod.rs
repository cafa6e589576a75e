//! The daemon: puts the crates together, runs until it is told to stop, leaves clean images.
//!
//! ```text
//!   start                                            stop
//!     the sandbox, before anything is opened
//!     Manager (state directory, chains, thaw owed)     QMP server: SHUTDOWN is told, no more commands
//!     a vhost-user device a disk                       NBD server: clients are cut off, exports end
//!     QMP server                                       Manager: the cut under way ends, the guest is thawed
//!     READY=1 to systemd                               devices: sessions end, rings are drained
//!                                                      Manager: all that was acknowledged is synced
//! ```

mod confine;
mod guest;
mod metrics;
mod service;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use block::{Context, Disk, Error, ErrorKind, Result};
use control::{Announcer, Service};
use guest_agent::Agent;
use hostio::Listener;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use snapshot::{
    AllowedFolders, Chain, DiskConfig, ErrorAction, Event, FreezeDefaults, FreezeOwner, Guest, IoOperation,
    Manager, ShutdownCause,
};
use tracing::{info, warn};
use vhost_blk::{Allowance, DeviceConfig, OnFailure, Server, SessionEvent};

use crate::config::{self, Config};
use confine::Confinement;
use guest::AgentGuest;
use metrics::Metrics;
use service::Daemon;

/// How long clients whose commands run are waited for at the end.
const GRACE: Duration = Duration::from_secs(5);

/// The name of the socket that systemd may pass on in place of `--control`; by their names clients can ask for the others,
/// to be served over NBD.
const CONTROL: &str = "control";

/// Why the daemon ends.
enum Stop {
    Signal(i32),
    Quit,
}

/// Serves the disks until it is told to stop.
pub(crate) fn run(config: Config) -> Result<()> {
    // Before there is any other thread, and before an image is looked at.
    let confinement = Confinement::begin(&config)?;
    if !config.users.is_empty() {
        hostio::admit_only(&config.users);
    }
    let (stop, stopped) = channel();
    watch_signals(stop.clone()).context(|| "watch for signals")?;
    // Before chains are opened, which may be long. Without it short ones are served all the same.
    if let Err(error) = hostio::raise_open_files() {
        warn!(%error, "long chains may not be served");
    }
    let mut sockets = inherited()?;
    let passed = sockets.remove(CONTROL);
    let manager = Arc::new(open(&config)?);
    let devices = config.disks.iter().map(|disk| start_device(&manager, disk, config.disks.len()));
    let devices = devices.collect::<Result<Vec<_>>>()?;
    let ids = config.disks.iter().map(|disk| disk.id.clone());
    let notifiers = ids.zip(devices.iter().map(Server::notifier)).collect();
    let daemon = Arc::new(Daemon::new(Arc::clone(&manager), &config, sockets, notifiers, confinement, stop));
    let metrics =
        config.metrics.as_ref().map(|address| Metrics::start(address, Arc::clone(&daemon) as _, &manager));
    let metrics = metrics.transpose()?;
    // Last: whoever finds it finds all the rest.
    let listener = match passed {
        Some(socket) => Listener::inherited(socket).context(|| "take the control socket of systemd")?,
        None => Listener::bind(&config.control)?,
    };
    let announcer = Announcer::default();
    let clients = announcer.clone();
    manager.subscribe(move |event| clients.tell(event));
    let mut control = control::Server::start(listener, Arc::clone(&daemon) as _, announcer)?;
    info!(disks = config.disks.len(), control = %config.control.display(), "serving");
    tell_systemd(&[NotifyState::Ready]);

    let reason = wait(&stopped);
    tell_systemd(&[NotifyState::Stopping]);
    control.stop(Some(&Event::Shutdown { guest: false, reason }), GRACE);
    drop((control, metrics));
    daemon.end_exports();
    if let Err(error) = manager.end_changes() {
        warn!(%error, "what was prepared could not be undone wholly");
    }
    devices.into_iter().for_each(Server::stop);
    manager.shut_down().context(|| "sync the disks at the end")
}

/// What systemd has passed on, by name.
fn inherited() -> Result<BTreeMap<String, OwnedFd>> {
    let passed = hostio::inherited()?;
    let count = passed.len();
    let sockets: BTreeMap<_, _> = passed.into_iter().collect();
    match sockets.len() == count {
        true => Ok(sockets),
        false => {
            let story = "two sockets of systemd have one name: give each its own FileDescriptorName=";
            Err(Error::new(ErrorKind::InvalidInput, story))
        }
    }
}

/// The state directory of a daemon that does not run, as the commands without a guest need it.
pub(crate) fn offline(state: &Path, allow_folders: &[PathBuf]) -> Result<Box<dyn Service>> {
    let manager = Manager::open_offline(state, AllowedFolders::new(allow_folders)?)?;
    Ok(Box::new(Daemon::offline(manager, state)))
}

fn open(config: &Config) -> Result<Manager> {
    let disks: Vec<_> = config.disks.iter().map(disk_config).collect();
    let defaults = FreezeDefaults { owner: config.freeze_owner, policy: config.freeze };
    let guest = config.agent.as_ref().filter(|_| config.freeze_owner == FreezeOwner::Frazil).map(|agent| {
        let serials = config.disks.iter().map(|disk| disk.serial.clone()).collect();
        Box::new(AgentGuest::new(Agent::new(agent), serials, config.pre_sync)) as Box<dyn Guest>
    });
    let folders = AllowedFolders::new(&config.allow_folders)?;
    Manager::open(&config.state, &disks, folders, defaults, guest)
}

fn disk_config(disk: &config::DiskConfig) -> DiskConfig {
    DiskConfig {
        id: disk.id.clone(),
        path: disk.path.clone(),
        format: disk.format,
        read_only: disk.readonly,
        cache: disk.cache,
        metadata_cache: disk.metadata_cache,
        write_errors: disk.werror,
        max_overlays: disk.max_overlays,
    }
}

/// Serves one of so many disks.
fn start_device(manager: &Arc<Manager>, disk: &config::DiskConfig, disks: usize) -> Result<Server> {
    let chain: &Arc<Chain> = manager.chain(&disk.id)?;
    let told = Arc::clone(chain);
    let config = DeviceConfig {
        name: disk.id.clone(),
        socket: disk.socket.clone(),
        serial: disk.serial.clone(),
        queues: disk.queues,
        disk: Arc::clone(chain) as Arc<dyn Disk>,
        gate: Arc::clone(chain.gate()),
        pulse: Arc::clone(chain.pulse()),
        parking: Arc::clone(chain.parking()),
        allowance: Allowance::share(disks),
        on_failure: tell_failures(Arc::clone(manager), disk.id.clone()),
        on_session: Box::new(move |event| {
            told.set_connected(event != SessionEvent::Disconnected { left: 0 });
        }),
    };
    Server::start(config).context(|| format!("serve disk {} at {}", disk.id, disk.socket.display()))
}

/// Makes events of the requests that the host could not carry out.
fn tell_failures(manager: Arc<Manager>, device: String) -> OnFailure {
    Arc::new(move |failure| {
        manager.tell(Event::IoError {
            device: device.clone(),
            operation: if failure.write { IoOperation::Write } else { IoOperation::Read },
            action: if failure.parked { ErrorAction::Stop } else { ErrorAction::Report },
            nospace: failure.no_space,
            reason: failure.reason,
        });
    })
}

fn watch_signals(stop: Sender<Stop>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever() {
            // Nobody hears it once the daemon is ending anyway.
            let _ = stop.send(Stop::Signal(signal));
        }
    })?;
    Ok(())
}

fn wait(stopped: &Receiver<Stop>) -> ShutdownCause {
    match stopped.recv() {
        Ok(Stop::Signal(signal)) => {
            info!(signal, "stopping");
            ShutdownCause::HostSignal
        }
        Ok(Stop::Quit) | Err(_) => {
            info!("stopping, as a client asked");
            ShutdownCause::HostQmpQuit
        }
    }
}

/// Does nothing where systemd did not start us.
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "systemd could not be told");
    }
}
