//! Vectored I/O over raw memory: through io_uring, or here and now.
//!
//! Everything works on borrowed descriptors and bare `iovec`s, because the memory is a guest's: it belongs to nobody
//! in Rust's sense, and it changes while it is read. So the functions that are given memory are `unsafe`, and say what
//! the caller promises.
#![allow(
    unsafe_code,
    reason = "io_uring and preadv2/pwritev2 take bare pointers to memory that is not Rust's"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use block::{Context, Result};
use io_uring::{IoUring, opcode, squeue, types};

/// An io_uring with what a virtqueue's worker needs of it: submissions are batched until [`submit`](Ring::submit),
/// completions are taken one by one, and its descriptor is readable while there are any.
///
/// Dropping it does not wait. The kernel goes on with what was submitted, so who gave it memory first takes every
/// completion.
pub struct Ring {
    ring: IoUring,
}

/// A submission that ended.
#[derive(Debug)]
pub struct Completion {
    /// What the submitter called it.
    pub tag: u64,
    /// Bytes moved (perhaps fewer than asked for), or the error.
    pub result: io::Result<u32>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("entries", &self.ring.params().sq_entries()).finish()
    }
}

impl Ring {
    /// A ring for batches of up to `entries` submissions (a power of two). More may be in flight: a full batch is
    /// submitted to make room.
    pub fn new(entries: u32) -> Result<Self> {
        let ring = IoUring::new(entries);
        Ok(Self { ring: ring.context(|| "create an io_uring (is it allowed: kernel.io_uring_disabled?)")? })
    }

    /// Queues a read into `count` iovecs from `offset`.
    ///
    /// # Safety
    /// The iovecs, and the memory they name, stay valid until the completion with this `tag` has been taken. `fd` stays
    /// open until [`submit`](Self::submit) has succeeded.
    pub unsafe fn readv(
        &mut self,
        fd: BorrowedFd<'_>,
        iovecs: &[libc::iovec],
        offset: u64,
        tag: u64,
    ) -> Result<()> {
        let entry = opcode::Readv::new(types::Fd(fd.as_raw_fd()), iovecs.as_ptr(), iovecs.len() as u32);
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.push(&entry.offset(offset).build().user_data(tag)) }
    }

    /// Queues a write of `count` iovecs to `offset`.
    ///
    /// # Safety
    /// As for [`readv`](Self::readv).
    pub unsafe fn writev(
        &mut self,
        fd: BorrowedFd<'_>,
        iovecs: &[libc::iovec],
        offset: u64,
        tag: u64,
    ) -> Result<()> {
        let entry = opcode::Writev::new(types::Fd(fd.as_raw_fd()), iovecs.as_ptr(), iovecs.len() as u32);
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.push(&entry.offset(offset).build().user_data(tag)) }
    }

    /// Queues an `fdatasync`. `fd` stays open until [`submit`](Self::submit) has succeeded, else another file that got
    /// its number is synced.
    pub fn sync_data(&mut self, fd: BorrowedFd<'_>, tag: u64) -> Result<()> {
        let entry = opcode::Fsync::new(types::Fd(fd.as_raw_fd())).flags(types::FsyncFlags::DATASYNC);
        // SAFETY: a sync names no memory.
        unsafe { self.push(&entry.build().user_data(tag)) }
    }

    /// # Safety
    /// What the entry points to stays valid until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> Result<()> {
        // SAFETY: the caller's promise.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        self.submit()?;
        // SAFETY: the caller's promise.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.map_err(|full| io::Error::new(io::ErrorKind::ResourceBusy, full)).context(|| "queue an I/O")
    }

    /// Hands what was queued to the kernel. After an error it is still queued.
    pub fn submit(&mut self) -> Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                submitted => {
                    submitted.context(|| "submit to io_uring")?;
                }
            }
        }
        Ok(())
    }

    /// Whether there is a completion to be taken.
    pub fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Takes one completion, if there is one.
    pub fn next_completion(&mut self) -> Option<Completion> {
        if self.ring.completion().is_empty() && self.ring.submission().cq_overflow() {
            // The kernel keeps what did not fit until it is asked. If it can not now, the ring stays readable.
            let _ = self.ring.submit_and_wait(0);
        }
        let entry = self.ring.completion().next()?;
        let result = match entry.result() {
            bytes @ 0.. => Ok(bytes.unsigned_abs()),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        };
        Some(Completion { tag: entry.user_data(), result })
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the ring, from which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

/// Reads what the page cache already holds, without waiting for a device: the number of bytes, perhaps fewer than
/// asked for, or `None` if it would have to wait (or if the file system can not tell).
///
/// # Safety
/// The memory that the iovecs name is valid during the call.
pub unsafe fn read_cached(fd: BorrowedFd<'_>, iovecs: &[libc::iovec], offset: u64) -> Option<u64> {
    let (count, offset) = (c_count(iovecs), offset.cast_signed());
    // SAFETY: the iovecs are a slice, and the caller answers for what they name.
    let done = unsafe { libc::preadv2(fd.as_raw_fd(), iovecs.as_ptr(), count, offset, libc::RWF_NOWAIT) };
    u64::try_from(done).ok().filter(|&bytes| bytes > 0)
}

/// Reads into the iovecs from `offset`, waiting if need be, and returns how many bytes it got: fewer than asked for
/// perhaps, none at the end of the file.
///
/// # Safety
/// The memory that the iovecs name is valid during the call.
pub unsafe fn read_now(fd: BorrowedFd<'_>, iovecs: &[libc::iovec], offset: u64) -> io::Result<u64> {
    let (fd, count, offset) = (fd.as_raw_fd(), c_count(iovecs), offset.cast_signed());
    uninterrupted(|| match iovecs {
        // A list would cost the kernel a copy of it.
        // SAFETY: the caller answers for what the iovec names.
        [one] => unsafe { libc::pread(fd, one.iov_base, one.iov_len, offset) },
        // SAFETY: the iovecs are a slice, and the caller answers for what they name.
        _ => unsafe { libc::preadv(fd, iovecs.as_ptr(), count, offset) },
    })
}

/// Writes from the iovecs at `offset`, and returns how many bytes it took (perhaps fewer than given).
///
/// # Safety
/// The memory that the iovecs name is valid during the call.
pub unsafe fn write_now(fd: BorrowedFd<'_>, iovecs: &[libc::iovec], offset: u64) -> io::Result<u64> {
    let (fd, count, offset) = (fd.as_raw_fd(), c_count(iovecs), offset.cast_signed());
    uninterrupted(|| match iovecs {
        // SAFETY: as for `read_now`.
        [one] => unsafe { libc::pwrite(fd, one.iov_base, one.iov_len, offset) },
        // SAFETY: as for `read_now`.
        _ => unsafe { libc::pwritev(fd, iovecs.as_ptr(), count, offset) },
    })
}

/// Makes a system call that moves bytes, again as long as signals end it early.
fn uninterrupted(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<u64> {
    loop {
        match u64::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// The kernel refuses more than `UIO_MAXIOV` (1024) with `EINVAL`.
fn c_count(iovecs: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn iovec(bytes: &mut [u8]) -> libc::iovec {
        libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
    }

    fn wait(ring: &mut Ring) -> Completion {
        loop {
            if let Some(completion) = ring.next_completion() {
                return completion;
            }
            ring.ring.submit_and_wait(1).unwrap();
        }
    }

    #[test]
    fn what_was_written_through_the_ring_is_read_back() {
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let mut ring = Ring::new(2).unwrap();
        let (mut head, mut tail, mut found) = ([1; 512], [2; 512], [0; 1024]);
        let (write, read) = ([iovec(&mut head), iovec(&mut tail)], [iovec(&mut found)]);
        // SAFETY: the buffers live to the end of the test, and every completion is waited for.
        unsafe { ring.writev(file.as_fd(), &write, 4096, 7) }.unwrap();
        ring.submit().unwrap();
        let done = wait(&mut ring);
        assert_eq!((done.tag, done.result.unwrap()), (7, 1024));
        ring.sync_data(file.as_fd(), 8).unwrap();
        ring.submit().unwrap();
        assert_eq!(wait(&mut ring).tag, 8);
        // SAFETY: as above.
        unsafe { ring.readv(file.as_fd(), &read, 4096, 9) }.unwrap();
        ring.submit().unwrap();
        assert_eq!(wait(&mut ring).result.unwrap(), 1024);
        assert_eq!((found[0], found[511], found[512], found[1023]), (1, 1, 2, 2));
    }

    #[test]
    fn more_than_fits_is_submitted_to_make_room() {
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let mut ring = Ring::new(2).unwrap();
        for tag in 0..64 {
            ring.sync_data(file.as_fd(), tag).unwrap();
        }
        ring.submit().unwrap();
        let mut tags: Vec<_> = (0..64).map(|_| wait(&mut ring).tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, (0..64).collect::<Vec<_>>());
    }

    #[test]
    fn errors_and_short_transfers_are_told() {
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let mut bytes = [3; 100];
        let whole = [iovec(&mut bytes)];
        let (head, tail) = bytes.split_at_mut(30);
        let cut = [iovec(head), iovec(tail)];
        for iovecs in [&whole[..], &cut[..]] {
            // SAFETY: the buffer outlives the calls.
            assert_eq!(unsafe { write_now(file.as_fd(), iovecs, 0) }.unwrap(), 100);
            // SAFETY: as above.
            assert_eq!(unsafe { read_cached(file.as_fd(), iovecs, 60) }.unwrap_or(40), 40);
            // SAFETY: as above.
            assert_eq!(unsafe { read_now(file.as_fd(), iovecs, 60) }.unwrap(), 40);
            // SAFETY: as above.
            assert_eq!(unsafe { read_now(file.as_fd(), iovecs, 100) }.unwrap(), 0);
        }
        let read_only: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
        // SAFETY: as above.
        let error = unsafe { write_now(read_only.as_fd(), &whole, 0) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}
