//! Listening sockets: private from their first instant, and in nobody's way after a crash.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use block::{Context, Error, ErrorKind, Result};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// A Unix socket that listens, and its file. Dropping it removes the file first, so that whoever comes in between finds
/// nothing and is not left hanging; a file that somebody else has put in its place stays.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    id: Identity,
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
        let listener = Self { socket: socket.into(), path: path.to_owned(), id: identity(path)? };
        rustix::net::listen(&listener.socket, BACKLOG).map_err(std::io::Error::from)?;
        Ok(listener)
    }

    /// The socket, to accept from.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.id) {
            // If it can not be removed, it is stale from now on, and the next one replaces it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
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
    use std::os::unix::net::UnixStream;

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
    fn other_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }
}
