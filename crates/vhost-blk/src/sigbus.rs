//! Memory of a front-end that is no longer there when it is touched.
//!
//! A front-end may shrink the file of its guest's memory after it was mapped (or the host may find that a page of it is
//! broken). Whoever touches such a page is sent SIGBUS, and by default that is the end of the process, of all its disks.
//! So what is mapped for a front-end is *guarded*: the handler puts zeroes in the place of the whole mapping, tells the
//! mapping's owner, and the thread goes on. The owner ends its session. The kernel's own copies (`preadv`, io_uring)
//! send no signal: they fail with EFAULT.
//!
//! # What a handler may do
//! It runs wherever a thread touches memory, with locks held, so it takes none and allocates nothing: it looks through
//! a table of atomics, and makes two system calls (`mmap`, `write`) that touch nothing of this process but their
//! arguments. A signal for other memory goes to whoever handled it before (Rust's own, for stacks that overflow), or
//! ends the process.
//!
//! # Invariant
//! A range is guarded from before its memory is touched until after it was touched last, and while it is mapped: so
//! the entry of the thread's own range is whole and does not change while the handler looks, and no other range that is
//! in the table overlaps it. Entries that change meanwhile are of others, and are skipped.
#![allow(unsafe_code, reason = "a signal handler, and memory that is mapped over another")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering, fence};

use block::{Error, ErrorKind, Result};

/// Ranges at most, of all disks: each has all of its guest's memory. QEMU's has some ten, and up to 256 that are
/// hot-plugged; the framework takes 509.
pub(crate) const ENTRIES: usize = 1 << 15;

/// One guarded range. Its numbers are valid while `version` is even and not 0, and is the same after they were read.
#[derive(Debug)]
struct Entry {
    version: AtomicU32,
    start: AtomicUsize,
    end: AtomicUsize,
    /// An event descriptor that is written to when the range was hit.
    tell: AtomicI32,
}

static TABLE: [Entry; ENTRIES] = [const {
    Entry {
        version: AtomicU32::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        tell: AtomicI32::new(-1),
    }
}; ENTRIES];

/// Who handled the signal before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// A guarded range; it is guarded no longer when this is dropped.
#[derive(Debug)]
pub(crate) struct Guarded(&'static Entry);

/// Guards `len` bytes from `start` on, a whole mapping. `tell` is an event descriptor that is written to when it was
/// hit; it stays open as long as the result lives.
pub(crate) fn guard(start: usize, len: usize, tell: BorrowedFd<'_>) -> Result<Guarded> {
    install()?;
    let free = |entry: &&Entry| {
        let version = entry.version.load(Ordering::Relaxed);
        // Odd while it changes, and as long as it is free for those that look for one.
        entry.end.load(Ordering::Acquire) == 0
            && version.is_multiple_of(2)
            && entry
                .version
                .compare_exchange(version, version + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    };
    let Some(entry) = TABLE.iter().find(free) else {
        return Err(Error::new(
            ErrorKind::Busy,
            format!("{ENTRIES} pieces of guests' memory are mapped already"),
        ));
    };
    fence(Ordering::Release);
    entry.start.store(start, Ordering::Relaxed);
    entry.tell.store(tell.as_raw_fd(), Ordering::Relaxed);
    entry.end.store(start.saturating_add(len), Ordering::Relaxed);
    entry.version.fetch_add(1, Ordering::Release);
    Ok(Guarded(entry))
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.0.version.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::Release);
        self.0.start.store(0, Ordering::Relaxed);
        self.0.end.store(0, Ordering::Relaxed);
        self.0.version.fetch_add(1, Ordering::Release);
    }
}

impl Entry {
    /// The range and whom to tell, if `addr` is in it.
    fn covering(&self, addr: usize) -> Option<(usize, usize, i32)> {
        let version = self.version.load(Ordering::Acquire);
        let range = (self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        let tell = self.tell.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let whole = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        (whole && (range.0..range.1).contains(&addr)).then_some((range.0, range.1, tell))
    }
}

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<std::result::Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: an action of all zeroes is a valid one.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = handle as *const () as usize;
        // On the stack for signals, which Rust gives each thread: a thread's own may be what overflowed.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let mut before = action;
        // SAFETY: both are valid; what the first one names keeps to what a handler may do.
        match unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) } {
            0 => drop(BEFORE.set(before)),
            _ => return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
        }
        // SAFETY: as above.
        match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
        }
    });
    installed.map_err(io::Error::from_raw_os_error)
}

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid one.
    let info = unsafe { &*info };
    // SAFETY: it is there for signals of the kernel's own, and others are not looked at further.
    let addr = unsafe { info.si_addr() }.addr();
    // SAFETY: the thread's own, which whatever was interrupted may be about to read.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    // Those sent by a process have codes up to 0.
    if info.si_code <= 0 || !replace(addr) {
        give_up();
    }
    // SAFETY: as above.
    unsafe { *errno = kept };
}

/// Puts zeroes in the place of the guarded range around `addr`, and tells; `false` if there is none.
fn replace(addr: usize) -> bool {
    let Some((start, end, tell)) = TABLE.iter().find_map(|entry| entry.covering(addr)) else { return false };
    // The whole of it: a piece would not be enough where pages are huge, and many pieces would take many signals.
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range is a mapping of a front-end's memory, which stays as long as it is guarded (the module's
    // invariant), and which nobody has a Rust reference to.
    let mapped = unsafe { libc::mmap(ptr::without_provenance_mut(start), end - start, prot, flags, -1, 0) };
    let one = 1_u64.to_ne_bytes();
    // SAFETY: the descriptor is open as long as the range is guarded; `one` has eight bytes.
    unsafe { libc::write(tell, one.as_ptr().cast(), one.len()) };
    mapped != libc::MAP_FAILED
}

/// The next signal, which follows at once as the memory is touched again, is for whoever handled it before.
fn give_up() {
    match BEFORE.get() {
        // SAFETY: it was in force before.
        Some(before) => unsafe { libc::sigaction(libc::SIGBUS, before, ptr::null_mut()) },
        // SAFETY: the default is always valid.
        None => unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) as i32 },
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::AsFd;
    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    /// Four pages of a file, and the file.
    fn pages() -> (MmapRegion, std::fs::File) {
        let file = std::fs::File::from(memfd_create("pages", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(4 * 4096).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        (MmapRegion::from_file(offset, 4 * 4096).unwrap(), file)
    }

    fn guarded(region: &MmapRegion, event: &EventFd) -> Guarded {
        // SAFETY: it is open as long as the test runs.
        let tell = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        guard(region.as_ptr().addr(), region.size(), tell).unwrap()
    }

    #[test]
    fn memory_that_goes_reads_as_zeroes_and_its_owner_alone_is_told() {
        let (ours, file) = pages();
        let (theirs, _other) = pages();
        let events = [EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap()];
        let _guards = [guarded(&ours, &events[0]), guarded(&theirs, &events[1])];
        for region in [&ours, &theirs] {
            region.as_volatile_slice().write_obj(7_u8, 3 * 4096).unwrap();
        }
        ftruncate(file.as_fd(), 4096).unwrap();
        let read = |region: &MmapRegion, at| region.as_volatile_slice().read_obj::<u8>(at).unwrap();
        assert_eq!((read(&ours, 3 * 4096), read(&theirs, 3 * 4096)), (0, 7));
        ours.as_volatile_slice().write_obj(9_u8, 2 * 4096).unwrap();
        assert_eq!(read(&ours, 2 * 4096), 9);
        assert_eq!(events[0].read().unwrap(), 1, "one signal is enough for all of it");
        assert!(events[1].read().is_err());
    }

    #[test]
    fn huge_pages_go_too() {
        const LEN: usize = 4 << 20;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = std::fs::File::from(memfd_create("huge", flags).unwrap());
        file.set_len(LEN as u64).unwrap();
        let region = MmapRegion::<()>::from_file(FileOffset::new(file.try_clone().unwrap(), 0), LEN).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let _guard = guarded(&region, &event);
        file.set_len(0).unwrap();
        assert_eq!(region.as_volatile_slice().read_obj::<u8>(LEN - 1).unwrap(), 0);
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn a_range_that_is_let_go_is_free_for_the_next() {
        let (region, _file) = pages();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        for _ in 0..2 * ENTRIES {
            drop(guarded(&region, &event));
        }
        let addr = region.as_ptr().addr();
        assert!(TABLE.iter().all(|entry| entry.covering(addr).is_none()));
        let _guard = guarded(&region, &event);
        assert_eq!(TABLE.iter().filter(|entry| entry.covering(addr + 4 * 4096 - 1).is_some()).count(), 1);
        assert!(TABLE.iter().all(|entry| entry.covering(addr + 4 * 4096).is_none()));
    }
}
