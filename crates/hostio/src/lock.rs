//! Image locks as QEMU takes them, so that its tools and Frazil see each other.
//!
//! QEMU (`block/file-posix.c`) locks single bytes with open file description locks: byte `100 + p` is read-locked by
//! who uses permission `p`, byte `200 + p` by who does not let others use it. To take a permission one read-locks
//! one's own bytes, and then asks whether a write lock would be granted on the opposite ones.
#![allow(unsafe_code, reason = "fcntl(F_OFD_SETLK, F_OFD_GETLK) has no safe wrapper")]

use std::fs::File;
use std::os::fd::AsRawFd;

use block::{Error, ErrorKind, Result};

const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// `BLK_PERM_CONSISTENT_READ`.
const READ: i64 = 0;
/// `BLK_PERM_WRITE`.
const WRITE: i64 = 1;
/// `BLK_PERM_RESIZE`.
const RESIZE: i64 = 3;

/// Locks for reading an image that nobody may write, or for being its only writer. [`ErrorKind::Busy`] names the
/// conflict.
pub(crate) fn acquire(file: &File, writable: bool) -> Result<()> {
    set(file, libc::F_RDLCK, USED + READ)?;
    set(file, libc::F_RDLCK, UNSHARED + WRITE)?;
    set(file, libc::F_RDLCK, UNSHARED + RESIZE)?;
    check(file, UNSHARED + READ)?;
    for permission in [WRITE, RESIZE] {
        check(file, USED + permission)?;
        if writable {
            // One's own unshared bytes do not count: a conflict is only with another open file description.
            set(file, libc::F_RDLCK, USED + permission)?;
            check(file, UNSHARED + permission)?;
        }
    }
    Ok(())
}

/// From the only writer to a reader that lets others read.
pub(crate) fn downgrade(file: &File) -> Result<()> {
    [USED + WRITE, USED + RESIZE].into_iter().try_for_each(|byte| set(file, libc::F_UNLCK, byte))
}

/// Makes `writer` the only writer of an image that `reader`, another opening of the same file by this process, has locked
/// for reading. `reader` goes on reading. There is no instant at which another process could begin to write.
/// [`ErrorKind::Busy`] if others read it, and then all is as before.
pub(crate) fn hand_over(reader: &File, writer: &File) -> Result<()> {
    forbid_writers(writer)?;
    unshared(reader, libc::F_UNLCK)?;
    let taken = acquire(writer, true);
    if taken.is_err() {
        // Granted, for `writer` has the same lock, and nobody wants more of it.
        forbid_writers(reader)?;
    }
    taken
}

/// Keeps everybody else from writing, as each reader does.
pub(crate) fn forbid_writers(file: &File) -> Result<()> {
    unshared(file, libc::F_RDLCK)
}

fn unshared(file: &File, kind: i32) -> Result<()> {
    [UNSHARED + WRITE, UNSHARED + RESIZE].into_iter().try_for_each(|byte| set(file, kind, byte))
}

fn range(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as libc::c_short, l_whence: 0, l_start: byte, l_len: 1, l_pid: 0 }
}

fn set(file: &File, kind: i32, byte: i64) -> Result<()> {
    let lock = range(kind, byte);
    // SAFETY: the descriptor is open, and the kernel reads one `flock` that outlives the call.
    let status = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    match status {
        0 => Ok(()),
        _ => refuse_or_tolerate(std::io::Error::last_os_error()),
    }
}

fn check(file: &File, byte: i64) -> Result<()> {
    let mut lock = range(libc::F_WRLCK, byte);
    // SAFETY: the descriptor is open, and the kernel reads and writes one `flock` that outlives the call.
    let status = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if status != 0 {
        return refuse_or_tolerate(std::io::Error::last_os_error());
    }
    if i32::from(lock.l_type) == libc::F_UNLCK { Ok(()) } else { Err(busy()) }
}

fn busy() -> Error {
    Error::new(ErrorKind::Busy, "in use by another process (QEMU, a QEMU tool, or another frazil)")
}

/// Some network file systems have no locks. QEMU goes on without them there, and so do we.
fn refuse_or_tolerate(error: std::io::Error) -> Result<()> {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(busy()),
        Some(libc::ENOLCK | libc::EOPNOTSUPP) => Ok(()),
        _ => Err(Error::from(error).context("lock the image")),
    }
}
