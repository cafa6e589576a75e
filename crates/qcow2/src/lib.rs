//! qcow2 images: the format's codec, mapping, allocation, refcounts, and a journal against `kill -9`.
//!
//! # Lifecycle
//!
//! ```text
//!   create() ─▶ Image::open(Writable) ─▶ resolve / complete / zero / discard / flush ─▶ seal() ─▶ flush ─▶ close()
//!                   ▲      │ kill -9: tables as of the last flush, and the journal
//!                   └──────┘ replayed at the next open on the same boot of the host
//! ```
//!
//! [`create()`] writes an empty image. [`Image`] is a [`block::Disk`]: it says where bytes are, the caller moves them.
//! [`Image::seal`] ends the writing in an instant; the flush after it leaves an image in which `qemu-img check` finds
//! nothing at all. A killed process leaves at most leaked clusters, and loses no write that it acknowledged.
//!
//! # Invariants
//!
//! - An entry changes under the lock of writes, home and state together. What a request resolved to keeps its meaning
//!   until its I/O ends: a cluster that is freed is used again only when no extent of its time is held any more, no table
//!   on stable storage names it, and no record of the journal does.
//! - Only clusters and tables that are marked as the image's own are written where they are; shared and compressed ones
//!   move. So internal snapshots keep what they hold.
//! - An aborted write publishes nothing, and the room it was given is the next one's: neither table nor refcount knows of
//!   it.
//! - Nothing read from a file is believed: every offset is checked to be aligned, inside the file and, for writing,
//!   off the image's own tables; every size is bounded before memory is taken for it.
//!
//! # I/O model
//!
//! Entries are in RAM in *slices* of a few hundred, as many as a given room allows. Reads, and writes to where data
//! already is, take one read lock for a look at a slice. A slice that is not there is read by whoever needs it. Writes
//! to new room take one short lock at each end; those of a part of a new subcluster copy the rest of it from below, at most
//! once. Where two such writes meet, one waits for the other with its waker.
//!
//! # Write ordering
//!
//! 1. Data is written (by the caller), then its journal record (page cache), then it is visible, then acknowledged.
//! 2. A flush writes refcounts and whole new L2 tables; *syncs* (and so the data too); names new refcount
//!    blocks in the refcount table, those that count others first, and *syncs*; writes L2 and L1 entries; *syncs*; empties the
//!    journal's half; counts less what is named no more.
//! 3. So, of tables on stable storage: what an L2 or L1 entry names is there and counted. Refcounts can leak, never be
//!    short. Only refcounts of clusters that are about to be named are raised, so a clean image has no leaks either.
//! 4. A failed sync is final: the image is latched. A failed *write* of a flush keeps its batch for the next flush.
//!
//! `docs/formats.md` has the details, byte by byte, and what is refused.

mod alloc;
mod bitmaps;
mod bytes;
mod check;
mod close;
mod compressed;
mod create;
mod entry;
mod epoch;
mod extensions;
mod flush;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod grow;
mod header;
mod header_update;
mod image;
mod journal;
mod mapping;
mod metadata;
mod open;
mod pack;
mod packed;
mod pending;
mod publish;
mod read;
mod recover;
mod refcount_bits;
mod refcounts;
mod slices;
mod snapshots;
#[cfg(test)]
mod testing;
mod work;
mod write;
mod zero;

pub use check::{Report, check};
pub use compressed::Compression;
pub use create::{CreateOptions, create};
pub use header::Header;
pub use header_update::set_backing;
pub use image::{Image, Mode, Parts};
pub use journal::Journal;
