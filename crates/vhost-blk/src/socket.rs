//! The socket's file: made private, taken over when stale, removed when ours.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use block::{Context, Error, ErrorKind, Result};
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// A listening socket's file. Dropping it removes the file, unless somebody has put another in its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    id: Identity,
}

/// Tells a file from another that took its place: device, inode, and when it was made, for inodes are used again.
type Identity = (u64, u64, Option<SystemTime>);

fn identity(path: &Path) -> std::io::Result<Identity> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino(), found.created().ok()))
}

/// Listens at `path`, mode 0600. A socket left behind by a dead process is replaced; one where somebody listens, or a
/// file of another kind, is refused.
pub(crate) fn listen(path: &Path) -> Result<(UnixListener, SocketFile)> {
    bind(path).context(|| format!("listen at {}", path.display()))
}

fn bind(path: &Path) -> Result<(UnixListener, SocketFile)> {
    remove_stale(path)?;
    let address = SocketAddrUnix::new(path).map_err(std::io::Error::from)?;
    let socket = socket(SocketFlags::CLOEXEC)?;
    // Before binding, so that there is no instant at which others could connect: the file gets the socket's mode.
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(std::io::Error::from)?;
    rustix::net::bind(&socket, &address).map_err(std::io::Error::from)?;
    rustix::net::listen(&socket, 8).map_err(std::io::Error::from)?;
    Ok((socket.into(), SocketFile { path: path.to_owned(), id: identity(path)? }))
}

fn socket(flags: SocketFlags) -> Result<rustix::fd::OwnedFd> {
    let made = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    Ok(made.map_err(std::io::Error::from)?)
}

fn remove_stale(path: &Path) -> Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        found if !found.as_ref().is_ok_and(|found| found.file_type().is_socket()) => {
            found?;
            return Err(Error::new(ErrorKind::Busy, "there is a file which is not a socket"));
        }
        _ => {}
    }
    let address = SocketAddrUnix::new(path).map_err(std::io::Error::from)?;
    // Not blocking: a full backlog would hold up the connection, and says enough.
    match rustix::net::connect(socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?, &address) {
        Err(Errno::CONNREFUSED) => Ok(std::fs::remove_file(path)?),
        Err(Errno::NOENT) => Ok(()),
        Ok(()) | Err(Errno::AGAIN) => Err(Error::new(ErrorKind::Busy, "another process listens there")),
        Err(errno) => Err(std::io::Error::from(errno).into()),
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = identity(&self.path).is_ok_and(|found| found == self.id);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), "could not remove the socket: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_file_is_private_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vda.sock");
        let (_listener, file) = listen(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vda.sock");
        let (listener, file) = listen(&path).unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), ErrorKind::Busy);
        drop(listener);
        let (_listener, _file) = listen(&path).unwrap();
        // The first one finds that the file is no longer its own.
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn other_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }
}
