//! The words of the house: what a disk, a storage, an extent, an error and the gate are.
//!
//! ```text
//!    guest request                        host file
//!         │                                   ▲
//!         ▼            resolve                │  data I/O by whoever resolved
//!   [`Disk`] ────────────────────────▶ [`Extent`]s ──▶ [`Storage`]
//!         ▲                                   │
//!         └──────── [`WriteGuard::complete`] ─┘
//! ```
//!
//! # I/O model
//! A [`Disk`] never moves a guest's data. It *resolves* a range of the disk to [`Extent`]s of host files; the caller
//! (a virtqueue's worker) does the I/O with whatever means it has, and then *completes* the write. Dropping a
//! [`WriteGuard`] aborts: nothing that the disk shows has changed. This way the decision is made under a lock, or
//! with none at all, and the I/O always outside of it.
//!
//! A resolution that must wait for another request (two writers that need the same new subcluster, two flushes)
//! returns [`Poll::Pending`](std::task::Poll) and wakes the given [`Waker`](std::task::Waker) later. It never blocks,
//! so a worker that holds guards can not wait for itself.
//!
//! # Invariants
//! - An acknowledged write survives the death of the process; a flushed one survives the loss of power.
//! - What is not flushed holds, sector by sector, its old or its new content after a loss of power, never a third.
//! - A [`Gate`] that is closed and drained means: no request is in flight on that disk, and none will be taken.
//!
//! This crate asks nothing of the kernel, so all that is built on it is tested in memory (feature `testing`).

mod bitmap;
mod disk;
mod error;
mod gate;
mod layer;
mod parking;
mod pulse;
mod raw;
mod stack;
mod storage;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use bitmap::DirtyBitmap;
pub use disk::{
    Disk, Extent, Flush, FlushStep, PendingWrite, Source, WriteGuard, blocking, read_disk, write_disk,
};
pub use error::{Context, Error, ErrorKind, Result};
pub use gate::{Closed, Gate, Lane, Wait};
pub use layer::{Layer, Place, Run};
pub use parking::{Bay, IoStatus, Parking, WriteErrors};
pub use pulse::{Beat, Ended, Kind, LATENCY_BUCKETS, Outcome, Pulse, Reading, Stats, Tally};
pub use raw::RawDisk;
pub use stack::Stack;
pub use storage::{ByteRange, Storage, write_zeroes};

/// Bytes in a sector, the unit of virtio-blk's addresses and of atomicity after a loss of power
/// (virtio 1.3, section 5.2.6: "always 512 bytes").
pub const SECTOR: u64 = 512;
