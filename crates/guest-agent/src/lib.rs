//! Client of the QEMU guest agent (`qemu-ga`), for one purpose: file systems that hold still while a snapshot is cut.
//!
//! ```text
//!   control thread            QEMU                              guest
//!  ┌──────────────┐  Unix   ┌─────────────────┐  virtio-serial ┌──────────┐  FIFREEZE  ┌──────────────┐
//!  │ Agent        │ socket  │ chardev ── port │ ────────────── │ qemu-ga  │ ─────────▶ │ file systems │
//!  │  └─ Session ─┼────────▶│ org.qemu.       │                └──────────┘  FITHAW    └──────────────┘
//!  └──────────────┘         │ guest_agent.0   │
//!                           └─────────────────┘
//! ```
//!
//! # Lifecycle
//!
//! An [`Agent`] is an address: nothing need listen there yet. [`Agent::connect`] opens a [`Session`]; keep that one from
//! the first question to the confirmed thaw, as opening another costs about 100 ms. One snapshot is:
//!
//! ```text
//! connect ─ info ─ file_systems ─ (coverage) ─ pre_sync ─ freeze ─ …the cut… ─ thaw ─ drop
//! ```
//!
//! `file_systems` and `pre_sync` must come before `freeze`: a frozen agent answers only ping, info, sync, status, thaw.
//! **Dropping a session does not thaw the guest.** Who freezes keeps a record of the thaw that it owes, elsewhere.
//!
//! # Invariants
//!
//! - *Each call ends by its deadline*, an absolute instant, whatever the agent does: says nothing, floods, or sends a
//!   byte now and then. Sending is under the deadline too.
//! - *Memory is bounded*: a reply is at most [`REPLY_MAX`] bytes, and what is thrown away is never kept.
//! - *A reply belongs to its question.* The protocol has no reliable ids, so after any failure the connection is dropped,
//!   and the next call opens another and synchronizes it (`0xFF`, `guest-sync-delimited`, everything before the matching
//!   reply discarded): a late reply can never be taken for another's.
//! - *A freeze of unknown outcome is answered with a thaw.* If the reply to a freeze did not come, the next call that
//!   gets through thaws the guest before anything else. The agent runs one command at a time, so an answered sync
//!   proves that the late freeze is over, and the thaw that follows is final.
//!
//! # I/O model
//!
//! Blocking calls on the caller's thread: a non-blocking socket and `poll(2)` with what remains until the deadline.
//!
//! # Trust
//!
//! The guest is not trusted. It can lie about its own file systems, and so spoil its own snapshots; it cannot make us
//! panic, hang or grow, nor put control characters into our messages.

mod coverage;
mod error;
#[cfg(test)]
mod fake;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod link;
mod pre_sync;
mod session;
mod text;

pub use coverage::{Coverage, DiskAddress, FileSystem, Means, Target, coverage};
pub use error::AgentError;
pub use link::REPLY_MAX;
pub use pre_sync::{PreSync, SyncMeans};
pub use session::{Agent, AgentInfo, FreezeStatus, Session, Thawed};
