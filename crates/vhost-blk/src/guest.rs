//! A request's data in guest memory, as the kernel wants it.
#![allow(
    unsafe_code,
    reason = "guest memory is not Rust's: it is reached through bare pointers, and it changes"
)]

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;

use block::{Result, Storage};
use hostio::Ring;
use libc::iovec;
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, Permissions,
};

/// The guest's memory map.
pub(crate) type Memory = GuestMemoryMmap<()>;

/// A hold on a memory map. The outer reference count is a worker's own, so that the workers' requests do not share a
/// cache line through the inner one.
pub(crate) type Hold = Arc<Arc<Memory>>;

/// The kernel's limit of iovecs in one operation (`UIO_MAXIOV`).
pub(crate) const MAX_IOVECS: usize = 1024;

/// A piece of guest memory as a descriptor names it: not checked against the map.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Segment {
    pub(crate) addr: GuestAddress,
    pub(crate) len: u32,
}

/// The segments of one request, found in the memory map.
///
/// Invariant: every iovec names memory of the map in `hold`, which stays mapped as long as `hold` does, also after the
/// front-end has changed its memory table. The guest may change the bytes at any time, so none of them is ever
/// referenced, only copied by the kernel or with `ptr::copy`.
#[derive(Debug, Default)]
pub(crate) struct GuestBuffer {
    iovecs: Vec<iovec>,
    /// Bytes that [`advance`](GuestBuffer::advance) took off the front of an iovec, by its index.
    taken: Vec<(usize, usize)>,
    hold: Option<Hold>,
}

// SAFETY: the pointers are only reached through `&self` and `&mut self`, and what they name belongs to no thread.
unsafe impl Send for GuestBuffer {}

impl GuestBuffer {
    /// Lets go of the memory. The caller has taken the completions of everything it submitted.
    pub(crate) fn clear(&mut self) {
        self.iovecs.clear();
        self.taken.clear();
        self.hold = None;
    }

    /// The map it is in.
    pub(crate) fn memory(&self) -> Option<&Memory> {
        self.hold.as_ref().map(|hold| &***hold)
    }

    /// Takes hold of the map and finds the segments in it; `false` if one is not all in the map, or they are too many.
    /// A segment that runs from one region into the next becomes two iovecs.
    pub(crate) fn map(&mut self, hold: &Hold, segments: &[Segment], access: Permissions) -> bool {
        self.iovecs.clear();
        let memory = &**self.hold.insert(Arc::clone(hold));
        for segment in segments {
            let Ok(slices) = GuestMemory::get_slices(&**memory, segment.addr, segment.len as usize, access)
            else {
                return false;
            };
            for slice in slices {
                let Ok(slice) = slice else { return false };
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                self.iovecs.push(iovec { iov_base, iov_len: slice.len() });
            }
        }
        self.iovecs.len() <= MAX_IOVECS
    }

    /// The index one past the iovecs that hold the `len` bytes from iovec `first` on, which it cuts in two if they do
    /// not end there.
    pub(crate) fn cut(&mut self, first: usize, len: u64) -> usize {
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        let mut index = first;
        while left > 0 {
            let Some(found) = self.iovecs.get_mut(index) else { break };
            if found.iov_len > left {
                let rest =
                    iovec { iov_base: found.iov_base.wrapping_byte_add(left), iov_len: found.iov_len - left };
                found.iov_len = left;
                self.iovecs.insert(index + 1, rest);
            }
            left -= self.iovecs.get(index).map_or(left, |found| found.iov_len);
            index += 1;
        }
        index
    }

    /// Takes `done` bytes off the front of `range`, in place (nothing moves, for other ranges may be in the kernel's
    /// hands), and returns what is left.
    pub(crate) fn advance(&mut self, range: Range<usize>, done: u64) -> Range<usize> {
        let mut left = usize::try_from(done).unwrap_or(usize::MAX);
        let mut start = range.start;
        for found in self.iovecs.get_mut(range.clone()).unwrap_or_default() {
            if left < found.iov_len {
                if left > 0 {
                    found.iov_base = found.iov_base.wrapping_byte_add(left);
                    found.iov_len -= left;
                    self.taken.push((start, left));
                }
                break;
            }
            left -= found.iov_len;
            start += 1;
        }
        start..range.end
    }

    /// Undoes every [`advance`](Self::advance), so that all of it can be moved again. Nothing of it is in the kernel's
    /// hands.
    pub(crate) fn rewind(&mut self) {
        for (index, bytes) in self.taken.drain(..) {
            if let Some(found) = self.iovecs.get_mut(index) {
                found.iov_base = found.iov_base.wrapping_byte_sub(bytes);
                found.iov_len += bytes;
            }
        }
    }

    /// Whether `O_DIRECT` takes the iovecs of `range` as they are.
    pub(crate) fn is_aligned(&self, range: Range<usize>, alignment: usize) -> bool {
        self.part(range).iter().all(|found| (found.iov_base.addr() | found.iov_len).is_multiple_of(alignment))
    }

    /// Where in the guest's memory its bytes are, with those that were taken off the front.
    pub(crate) fn places(&self) -> impl Iterator<Item = (GuestAddress, u64)> {
        self.iovecs.iter().enumerate().filter_map(|(index, found)| {
            let taken: usize = self.taken.iter().filter(|(at, _)| *at == index).map(|(_, bytes)| bytes).sum();
            let start = found.iov_base.addr().checked_sub(taken)?;
            let offset = |region: &GuestRegionMmap<()>| {
                let offset = start.checked_sub(region.as_ptr().addr())?;
                (offset < region.size()).then_some(offset)
            };
            let (region, offset) =
                self.memory()?.iter().find_map(|region| Some((region, offset(region)?)))?;
            let addr = region.start_addr().checked_add(offset as u64)?;
            Some((addr, (taken + found.iov_len) as u64))
        })
    }

    /// All of its iovecs.
    pub(crate) fn whole(&self) -> Range<usize> {
        0..self.iovecs.len()
    }

    fn part(&self, range: Range<usize>) -> &[iovec] {
        self.iovecs.get(range).unwrap_or_default()
    }

    /// Zeroes the memory of `range`.
    pub(crate) fn fill_zero(&mut self, range: Range<usize>) {
        for found in self.part(range) {
            // SAFETY: the iovec names mapped memory (the type's invariant).
            unsafe { ptr::write_bytes(found.iov_base.cast::<u8>(), 0, found.iov_len) };
        }
    }

    /// Copies as many of `bytes` as fit to the front of these iovecs, and returns how many.
    pub(crate) fn copy_from(&mut self, range: Range<usize>, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        for found in self.part(range) {
            let (now, after) = rest.split_at(rest.len().min(found.iov_len));
            // SAFETY: the iovec names at least that much mapped memory, and `bytes` is not guest memory.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), found.iov_base.cast::<u8>(), now.len()) };
            rest = after;
        }
        bytes.len() - rest.len()
    }

    /// Reads from `storage` through the bounce buffer `scratch`: for storages without a descriptor, and for memory
    /// that `O_DIRECT` would not take.
    pub(crate) fn read_bounced(
        &mut self,
        range: Range<usize>,
        storage: &dyn Storage,
        mut offset: u64,
        scratch: &mut [u8],
    ) -> Result<()> {
        for found in self.part(range) {
            let mut at = 0;
            while at < found.iov_len {
                let len = scratch.len().min(found.iov_len - at);
                let (bytes, _) = scratch.split_at_mut(len);
                storage.read_at(bytes, offset)?;
                let to = found.iov_base.cast::<u8>().wrapping_add(at);
                // SAFETY: `at + len` is within the iovec, which names mapped memory; `bytes` is not guest memory.
                unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, len) };
                at += len;
                offset += len as u64;
            }
        }
        Ok(())
    }

    /// Writes to `storage` through the bounce buffer `scratch`.
    pub(crate) fn write_bounced(
        &self,
        range: Range<usize>,
        storage: &dyn Storage,
        mut offset: u64,
        scratch: &mut [u8],
    ) -> Result<()> {
        for found in self.part(range) {
            let mut at = 0;
            while at < found.iov_len {
                let len = scratch.len().min(found.iov_len - at);
                let (bytes, _) = scratch.split_at_mut(len);
                let from = found.iov_base.cast::<u8>().wrapping_add(at);
                // SAFETY: `at + len` is within the iovec, which names mapped memory; `bytes` is not guest memory.
                unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len) };
                storage.write_at(bytes, offset)?;
                at += len;
                offset += len as u64;
            }
        }
        Ok(())
    }

    /// Reads what the page cache holds, see [`hostio::read_cached`].
    pub(crate) fn read_cached(
        &mut self,
        range: Range<usize>,
        fd: BorrowedFd<'_>,
        offset: u64,
    ) -> Option<u64> {
        // SAFETY: the iovecs name mapped memory (the type's invariant).
        unsafe { hostio::read_cached(fd, self.part(range), offset) }
    }

    /// Reads or writes here and now, see [`hostio::read_now`] and [`hostio::write_now`].
    pub(crate) fn move_now(
        &mut self,
        write: bool,
        range: Range<usize>,
        fd: BorrowedFd<'_>,
        offset: u64,
    ) -> std::io::Result<u64> {
        let iovecs = self.part(range);
        if write {
            // SAFETY: the iovecs name mapped memory (the type's invariant).
            unsafe { hostio::write_now(fd, iovecs, offset) }
        } else {
            // SAFETY: as above.
            unsafe { hostio::read_now(fd, iovecs, offset) }
        }
    }

    /// Queues a read or a write on `ring`.
    ///
    /// # Safety
    /// Until its completion has been taken this buffer is neither dropped nor cleared nor cut nor mapped again, and
    /// `range` is not advanced.
    pub(crate) unsafe fn queue(
        &self,
        ring: &mut Ring,
        write: bool,
        range: Range<usize>,
        fd: BorrowedFd<'_>,
        offset: u64,
        tag: u64,
    ) -> Result<()> {
        let iovecs = self.part(range);
        if write {
            // SAFETY: the caller keeps the iovecs where they are, and `hold` keeps the memory mapped.
            unsafe { ring.writev(fd, iovecs, offset, tag) }
        } else {
            // SAFETY: as above.
            unsafe { ring.readv(fd, iovecs, offset, tag) }
        }
    }
}

#[cfg(test)]
#[path = "guest/tests.rs"]
mod tests;
