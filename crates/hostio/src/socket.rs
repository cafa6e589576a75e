//! Listening sockets: private from their first instant, and in nobody's way after a crash.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use block::{Context, Error, ErrorKind, Result};
use rustix::fs::{AtFlags, Mode, OFlags, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::small::parent;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// A Unix socket that listens, and its file. Dropping it removes the file first, so that whoever comes in between finds
/// nothing and is not left hanging; a file that somebody else has put in its place stays.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    /// `None` if it is another's.
    file: Option<(PathBuf, Identity)>,
}

/// Tells a file from another that took its place: device, inode, and when it was made, for inodes are used again.
type Identity = (u64, u64, Option<SystemTime>);

fn identity(path: &Path) -> std::io::Result<Identity> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino(), found.created().ok()))
}

impl Listener {
    /// Listens at `path`, mode 0600. A socket left behind by a dead process is replaced; one where somebody listens, or
    /// a file of another kind, is [`ErrorKind::Busy`].
    pub fn bind(path: &Path) -> Result<Self> {
        Self::try_bind(path).context(|| format!("listen at {}", path.display()))
    }

    fn try_bind(path: &Path) -> Result<Self> {
        let address = SocketAddrUnix::new(path).map_err(std::io::Error::from)?;
        remove_stale(path, &address)?;
        let socket = socket(SocketFlags::CLOEXEC)?;
        // Before binding, so that there is no instant at which others could connect: the file gets the socket's mode.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(std::io::Error::from)?;
        rustix::net::bind(&socket, &address).map_err(std::io::Error::from)?;
        let listener = Self { socket: socket.into(), file: Some((path.to_owned(), identity(path)?)) };
        rustix::net::listen(&listener.socket, BACKLOG).map_err(std::io::Error::from)?;
        Ok(listener)
    }

    /// One that listens already, and belongs to who passed it on ([`inherited`](fn@crate::inherited)): its file stays, and
    /// it must not be shut down, for others will listen on it.
    ///
    /// Errors: [`ErrorKind::InvalidInput`] if it is no Unix stream socket that listens.
    pub fn inherited(socket: OwnedFd) -> Result<Self> {
        let listens = sockopt::socket_acceptconn(&socket).map_err(std::io::Error::from)?;
        let kind = sockopt::socket_type(&socket).map_err(std::io::Error::from)?;
        let domain = sockopt::socket_domain(&socket).map_err(std::io::Error::from)?;
        match listens && kind == SocketType::STREAM && domain == AddressFamily::UNIX {
            true => Ok(Self { socket: socket.into(), file: None }),
            false => {
                let story = "a socket that was passed on is no Unix stream socket that listens";
                Err(Error::new(ErrorKind::InvalidInput, story))
            }
        }
    }

    /// The socket, to accept from.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, id)) = &self.file
            && identity(path).is_ok_and(|found| found == *id)
        {
            // If it can not be removed, it is stale from now on, and the next one replaces it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Connections of this process with itself, for those who can only be given a listener: one that has a file in the file
/// system for the instant of its making, and no name afterwards.
#[derive(Debug)]
pub struct Loopback {
    listener: UnixListener,
    /// The socket's file, by which it is still found.
    file: OwnedFd,
}

impl Loopback {
    /// Makes one; its file is for an instant beside `path`, with mode 0600.
    pub fn beside(path: &Path) -> Result<Self> {
        Self::make(parent(path)?).context(|| format!("make a socket beside {}", path.display()))
    }

    fn make(folder: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let folder = rustix::fs::open(folder, flags | OFlags::DIRECTORY, Mode::empty())
            .map_err(std::io::Error::from)?;
        let name = format!(".frazil-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let listener = socket(SocketFlags::CLOEXEC)?;
        fchmod(&listener, Mode::RUSR | Mode::WUSR).map_err(std::io::Error::from)?;
        // By way of the descriptor, for the folder's own path may leave no room for a name in an address.
        let address = SocketAddrUnix::new(format!("{}/{name}", by_descriptor(&folder)))
            .map_err(std::io::Error::from)?;
        rustix::net::bind(&listener, &address).map_err(std::io::Error::from)?;
        let file = rustix::fs::openat(&folder, &name, flags | OFlags::NOFOLLOW, Mode::empty());
        rustix::fs::unlinkat(&folder, &name, AtFlags::empty()).map_err(std::io::Error::from)?;
        rustix::net::listen(&listener, BACKLOG).map_err(std::io::Error::from)?;
        Ok(Self { listener: listener.into(), file: file.map_err(std::io::Error::from)? })
    }

    /// One end of a new connection. The other is the next that the listener accepts.
    pub fn connect(&self) -> Result<UnixStream> {
        UnixStream::connect(by_descriptor(&self.file)).context(|| "connect to a socket of our own")
    }

    /// The listener.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

/// A path to an open file that needs no name.
fn by_descriptor(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn socket(flags: SocketFlags) -> Result<OwnedFd> {
    let made = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    Ok(made.map_err(std::io::Error::from)?)
}

fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(Error::new(ErrorKind::Busy, "there is a file which is not a socket"));
        }
        Ok(_) => {}
    }
    // Not blocking: a full backlog would hold up the connection, and says enough.
    match rustix::net::connect(socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?, address) {
        Err(Errno::CONNREFUSED) => Ok(std::fs::remove_file(path)?),
        Err(Errno::NOENT) => Ok(()),
        Ok(()) | Err(Errno::AGAIN) => Err(Error::new(ErrorKind::Busy, "another process listens there")),
        Err(errno) => Err(std::io::Error::from(errno).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_file_is_private_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err().kind(), ErrorKind::Busy);
        UnixStream::connect(&path).unwrap();
        drop(listener);
    }

    #[test]
    fn a_socket_that_took_the_name_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = Listener::bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_process_connects_to_itself_without_a_file() {
        use std::io::{Read, Write};
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("x".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let loopback = Loopback::beside(&deep.join("vda.sock")).unwrap();
        assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 0);
        for round in 0..3 {
            let mut one = loopback.connect().unwrap();
            let (mut other, _) = loopback.listener().accept().unwrap();
            one.write_all(&[round]).unwrap();
            let mut found = [9];
            other.read_exact(&mut found).unwrap();
            assert_eq!(found, [round]);
        }
    }

    #[test]
    fn other_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }
}
