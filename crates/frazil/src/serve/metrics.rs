//! Metrics for Prometheus, in the OpenMetrics text format.
//!
//! ```text
//!   Service ── what is now, at each scrape ──┐
//!   Pulse ──── counts since the start ───────┼─▶ Gathered ─▶ http ─▶ a scraper
//!   events ─▶ Cuts, since the start ─────────┘
//! ```
//! Names follow the conventions of Prometheus: `frazil_`, base units, `_total` for what only grows.

mod cuts;
mod gathered;
mod http;

use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use block::{Context, Result};
use control::Service;
use hostio::Listener;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use rustix::net::{Shutdown, shutdown};
use snapshot::Manager;
use tracing::info;

use crate::config::MetricsAddress;
use cuts::Cuts;
use gathered::Gathered;

/// Serves metrics until it is dropped.
pub(super) struct Metrics {
    socket: Arc<Socket>,
    thread: Option<JoinHandle<()>>,
}

/// A socket that listens.
enum Socket {
    Unix(Listener),
    Tcp(TcpListener),
}

impl Socket {
    fn open(address: &MetricsAddress) -> Result<Self> {
        match address {
            MetricsAddress::Unix(path) => Listener::bind(path).map(Self::Unix),
            MetricsAddress::Tcp(address) => {
                let listener =
                    TcpListener::bind(address).context(|| format!("listen at {address} for metrics"))?;
                if let Ok(address) = listener.local_addr() {
                    info!(%address, "metrics");
                }
                Ok(Self::Tcp(listener))
            }
        }
    }

    fn accept(&self) -> std::io::Result<OwnedFd> {
        match self {
            Self::Unix(listener) => loop {
                if let Some(stream) = hostio::accept(listener.socket())? {
                    return Ok(stream.into());
                }
            },
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| stream.into()),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.socket().as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Metrics {
    /// Begins to serve what `service` and the manager's events tell.
    pub(super) fn start(
        address: &MetricsAddress,
        service: Arc<dyn Service>,
        manager: &Manager,
    ) -> Result<Self> {
        let socket = Arc::new(Socket::open(address)?);
        let cuts = Arc::<Mutex<Cuts>>::default();
        let counted = Arc::clone(&cuts);
        manager.subscribe(move |event| counted.lock().unwrap_or_else(PoisonError::into_inner).count(event));
        let mut registry = Registry::with_prefix("frazil");
        registry.register_collector(Box::new(Gathered { service, cuts }));
        let listening = Arc::clone(&socket);
        let text = move || {
            let mut text = String::new();
            encode(&mut text, &registry).map(|()| text).ok()
        };
        let spawn = thread::Builder::new().name("metrics".to_owned());
        let thread = spawn.spawn(move || http::serve(|| listening.accept(), Arc::new(text)));
        Ok(Self { socket, thread: Some(thread.context(|| "begin to serve metrics")?) })
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        // Whoever accepts is told by an error.
        let _ = shutdown(&*self.socket, Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
