//! Where clients connect: Unix sockets, TCP addresses, and sockets that a service manager has opened for us.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use block::{Context, Error, ErrorKind, Result};
use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::wire::Socket;

/// Where to listen.
#[derive(Debug)]
pub enum Address {
    /// A Unix socket, mode 0600, for this user's processes. A socket left behind by a dead process is replaced.
    Unix(PathBuf),
    /// A host and port, as `127.0.0.1:10809`, `[::1]:10809` or a name. Port 0 takes a free one.
    Tcp(String),
    /// A socket that listens already, Unix or TCP ([`hostio::inherited`]). Its file, if it has one, stays when we are done.
    Inherited(OwnedFd),
}

/// A socket that listens.
#[derive(Debug)]
pub(crate) enum Listening {
    Unix(hostio::Listener),
    Tcp(TcpListener),
}

impl Listening {
    pub(crate) fn open(address: Address) -> Result<Self> {
        let listening = match address {
            Address::Unix(path) => Self::Unix(hostio::Listener::bind(&path)?),
            Address::Tcp(address) => {
                Self::Tcp(bind_tcp(&address).context(|| format!("listen at {address}"))?)
            }
            Address::Inherited(socket) => {
                Self::inherit(socket).context(|| "listen at a socket that was passed on")?
            }
        };
        // A client that is gone again by the time it is accepted must not hold us up.
        let flags = rustix::fs::fcntl_getfl(&listening).map_err(io::Error::from)?;
        rustix::fs::fcntl_setfl(&listening, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
        Ok(listening)
    }

    fn inherit(socket: OwnedFd) -> Result<Self> {
        let listens = sockopt::socket_acceptconn(&socket).map_err(io::Error::from)?;
        let kind = sockopt::socket_type(&socket).map_err(io::Error::from)?;
        if !listens || kind != SocketType::STREAM {
            return Err(Error::new(ErrorKind::InvalidInput, "it is no stream socket that listens"));
        }
        match sockopt::socket_domain(&socket).map_err(io::Error::from)? {
            AddressFamily::UNIX => Ok(Self::Unix(hostio::Listener::inherited(socket)?)),
            AddressFamily::INET | AddressFamily::INET6 => Ok(Self::Tcp(socket.into())),
            _ => Err(Error::new(ErrorKind::Unsupported, "it is neither Unix nor TCP")),
        }
    }

    /// The next client. [`io::ErrorKind::WouldBlock`] if there is none, or one that may not connect.
    pub(crate) fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Unix(listener) => {
                let stream = hostio::accept(listener.socket())?;
                stream.map(Socket::Unix).ok_or_else(|| io::ErrorKind::WouldBlock.into())
            }
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Socket::Tcp(stream)),
        }
    }

    /// Where TCP clients connect.
    pub(crate) fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            _ => None,
        }
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.socket().as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

fn bind_tcp(address: &str) -> Result<TcpListener> {
    let addresses: Vec<_> = address.to_socket_addrs()?.collect();
    Ok(TcpListener::bind(&*addresses)?)
}
