//! Where clients of NBD connect.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result};
use nbd::Address;
use serde::{Deserialize, Serialize};

/// Where to listen: QEMU's `SocketAddressLegacy`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", tag = "type", content = "data")]
pub enum SocketAddress {
    /// TCP.
    Inet {
        /// A name or address.
        host: String,
        /// A number.
        port: String,
    },
    /// A socket in the file system.
    Unix {
        /// Its path.
        path: PathBuf,
    },
    /// A socket that the daemon's service manager has opened for it.
    Fd {
        /// Its name there.
        str: String,
    },
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet { host, port } => write!(f, "{host}:{port}"),
            Self::Unix { path } => write!(f, "{}", path.display()),
            Self::Fd { str } => write!(f, "socket '{str}'"),
        }
    }
}

/// Sockets that were passed on to the daemon, by name. They stay open, so that who connects while none is served waits.
#[derive(Debug, Default)]
pub(crate) struct Sockets(pub(crate) BTreeMap<String, OwnedFd>);

impl Sockets {
    /// Where to listen, in the server's words.
    pub(crate) fn address_of(&self, address: &SocketAddress) -> Result<Address> {
        Ok(match address {
            SocketAddress::Unix { path } => {
                absolute(path)?;
                Address::Unix(path.clone())
            }
            SocketAddress::Inet { host, port } if host.contains(':') => {
                Address::Tcp(format!("[{host}]:{port}"))
            }
            SocketAddress::Inet { host, port } => Address::Tcp(format!("{host}:{port}")),
            SocketAddress::Fd { str } => {
                let story = || format!("no socket '{str}' was passed to the daemon (LISTEN_FDNAMES)");
                let missing = || Error::new(ErrorKind::InvalidInput, story());
                Address::Inherited(self.0.get(str).ok_or_else(missing)?.try_clone()?)
            }
        })
    }

    /// Where clients connect to a Unix socket.
    pub(crate) fn path_of(&self, address: &SocketAddress) -> String {
        let passed = match address {
            SocketAddress::Fd { str } => self.0.get(str).and_then(|socket| socket.try_clone().ok()),
            _ => None,
        };
        let bound = passed.and_then(|socket| UnixListener::from(socket).local_addr().ok());
        let path = bound.as_ref().and_then(|address| address.as_pathname());
        path.map_or_else(|| address.to_string(), |path| path.display().to_string())
    }
}

/// The daemon's working directory means nothing to a client.
fn absolute(path: &Path) -> Result<()> {
    match path.is_absolute() {
        true => Ok(()),
        false => {
            Err(Error::new(ErrorKind::InvalidInput, format!("'{}' is not an absolute path", path.display())))
        }
    }
}
