//! How much the front-ends of a disk may have mapped.
//!
//! The addresses of a process are finite, and a file that takes no room may be as long as all of them. Were there none left,
//! the next to ask for some would be the daemon itself, and it would end, with all its disks. So whatever a front-end has
//! mapped here (its guest's memory, in-flight records, logs of dirty pages) is charged: from before it is mapped until
//! after it is unmapped, also if only a request that is in flight, or parked, holds on to it.
//!
//! # Shares
//! Half of one is no use to a guest: each of its disks has all of its memory mapped. So what the daemon can spare is divided
//! evenly among its disks, and whatever their front-ends do takes nothing from those of another one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Error, ErrorKind, Result};

use crate::sigbus;

/// Bytes that all disks together may have mapped: of the 128 TiB that a process has (x86-64; elsewhere mostly more) it leaves an
/// eighth to the daemon.
const BYTES: u64 = 112 << 40;

/// Pieces that one disk may have mapped, if it has few neighbours. The framework offers a front-end 509; there may be two,
/// and pieces that they took away.
const PIECES: usize = 2048;

/// The kernel maps whole pages.
const PAGE: u64 = 4096;

/// What the front-ends of one disk may have mapped, all of them together.
#[derive(Clone, Debug)]
pub struct Allowance(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bytes: u64,
    pieces: usize,
    used: Mutex<Used>,
}

#[derive(Debug, Default, Eq, PartialEq)]
struct Used {
    bytes: u64,
    pieces: usize,
}

impl Allowance {
    /// The share of one disk of so many in this process: of 112 TiB, and of 32768 pieces, of which it is 2048 at most.
    pub fn share(disks: usize) -> Self {
        let disks = disks.max(1);
        let (bytes, pieces) = (BYTES / disks as u64, PIECES.min(sigbus::ENTRIES / disks));
        Self(Arc::new(Inner { bytes, pieces, used: Mutex::default() }))
    }

    /// Charges a piece of `len` bytes that is about to be mapped; [`ErrorKind::Busy`] if that is more than is left.
    pub(crate) fn charge(&self, len: u64) -> Result<Charge> {
        let Inner { bytes, pieces, .. } = &*self.0;
        let mut used = self.0.used();
        let next = Used { bytes: used.bytes.saturating_add(whole_pages(len)), pieces: used.pieces + 1 };
        if next.bytes > *bytes || next.pieces > *pieces {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "its front-ends would have {} GiB of memory mapped in {} pieces, and this disk's share is {} GiB in {pieces}: \
                     the daemon divides what it can map among its disks evenly; a larger guest needs a daemon with fewer disks",
                    next.bytes >> 30,
                    next.pieces,
                    bytes >> 30
                ),
            ));
        }
        *used = next;
        Ok(Charge { of: Arc::clone(&self.0), len })
    }
}

impl Inner {
    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn whole_pages(len: u64) -> u64 {
    len.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
}

/// What one piece of memory costs; given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    of: Arc<Inner>,
    len: u64,
}

impl Charge {
    /// Bytes of the piece.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut used = self.of.used();
        used.bytes -= whole_pages(self.len);
        used.pieces -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIB: u64 = 1 << 40;

    #[test]
    fn all_shares_together_leave_room_for_the_daemon() {
        for disks in [1, 2, 3, 64, 1000] {
            let Inner { bytes, pieces, .. } = &*Allowance::share(disks).0;
            assert!(bytes * disks as u64 <= 112 * TIB && bytes * disks as u64 > 111 * TIB, "{disks} disks");
            assert!((16..=2048).contains(pieces) && pieces * disks <= sigbus::ENTRIES, "{disks} disks");
        }
    }

    #[test]
    fn what_is_charged_is_given_back() {
        let share = Allowance::share(2);
        let all: Vec<_> = (0..56).map(|_| share.charge(TIB).unwrap()).collect();
        let story = share.charge(1).unwrap_err().to_string();
        assert!(story.contains("57344 GiB") && story.contains("fewer disks"), "{story}");
        assert_eq!(all.iter().map(Charge::len).sum::<u64>(), 56 * TIB);
        drop(all);
        assert!(share.charge(u64::MAX).is_err() && share.charge(56 * TIB + 1).is_err());
        // A byte is a page, and a piece.
        let all: Vec<_> = (0..2048).map(|_| share.charge(1).unwrap()).collect();
        assert_eq!(*share.0.used(), Used { bytes: 2048 * PAGE, pieces: 2048 });
        assert!(share.charge(1).is_err());
        drop(all);
        assert_eq!(*share.0.used(), Used::default());
    }
}
