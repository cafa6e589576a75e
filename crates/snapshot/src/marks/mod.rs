//! Marks: what changed on a disk since an instant, told from its layers.
//!
//! An overlay holds exactly what was written since it became active. So nobody keeps account of writes: they cost nothing,
//! and what survives a `kill -9` or a loss of power is told right afterwards, since the same tables say what was written and
//! where it is.
//!
//! ```text
//!   Manager ──▶ checkpoint   instants, by name
//!    (cut)  ──▶ bitmap       QEMU's dirty bitmaps
//!                  │
//!               changes ──▶ history   which layers and bits files lie between two instants (numbers only)
//!                  │           ▲
//!               draft ─────────┘      before a job merges layers: what they tell goes to bits files
//!                  └──▶ files, bits
//! ```
//!
//! # Invariants
//! - **Never too little.** What is not among the changes between two instants is the same at both. What can not be told any
//!   more, because a file is damaged, is an error that asks for a full backup. Too much is told only by rounding, and of
//!   jobs that were called off.
//! - **No mark without its instant on stable storage.** The layers beneath a cut are synced before the manifest names a mark
//!   made at it: else a loss of power could change what the mark stands for.
//! - **Folded before moved.** The manifest that names a job's move names the bits files with what the layers told until
//!   then, and those are synced before it.
//! - **One draft at a time.** Who changes marks holds the turn, from reading the manifest to removing the files that it names
//!   no more.
//!
//! `docs/incremental.md` has the reasons.

mod bitmap;
mod bits;
mod changes;
mod checkpoint;
mod commands;
mod cutting;
mod draft;
mod entry;
mod files;
mod history;
mod tally;

pub use bitmap::{BitmapInfo, BitmapName, DEFAULT_GRANULARITY, MarkChange};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use bits::read as read_bits;
pub use changes::{Changes, Point};
pub use checkpoint::CheckpointRequest;
pub use commands::BitmapLock;
pub(crate) use commands::Marks;
pub use cutting::{CutRequest, Pin, Taken};
pub(crate) use draft::Draft;
pub use entry::{CheckpointDisk, CheckpointRecord};
pub(crate) use entry::{DiskMarks, PinEntry};
pub(crate) use files::Files as BitsFiles;
pub(crate) use history::Boundary;
