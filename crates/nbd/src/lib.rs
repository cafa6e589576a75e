//! An NBD server: disks that clients on this host or elsewhere read, write, and ask what is where.
//!
//! ```text
//!   listener ─▶ handshake ─────────────▶ transmission ────────────▶ [`block::Disk`]
//!               [negotiate] (over TLS)   [transmit], [execute]       extents, preadv
//!                 deadline                turns to read, replies
//!                                         out of order
//! ```
//!
//! It speaks fixed newstyle with structured replies or extended headers, metadata contexts and TLS; which is what QEMU,
//! libnbd and the Linux kernel use. The protocol is the specification's, `doc/proto.md` of NetworkBlockDevice/nbd, of
//! which comments name the sections. `docs/nbd.md` says what is offered.
//!
//! # Lifecycle
//! A [`Server`] is made, listens at any number of [`Address`]es, and is given [`Export`]s, which come and go. It ends with
//! [`Server::shutdown`]. A connection serves one export, from the client's choice until either side ends it. An export
//! that was removed is gone when the last request of its last client is done ([`Export::on_gone`]).
//!
//! # I/O model
//! Threads, and no runtime: one a connection, and more while a client has several requests in flight. Data is read
//! from the host's files into a thread's buffer and from there sent with the reply's head, in one call.
//!
//! # Invariants
//! - **Nobody else is disturbed.** While a client is waited for, nothing of a disk is held: no lock, no extent, no guard.
//! - **Bounded.** A connection takes a thread, a descriptor and half a MiB; up to seven more threads with their buffers while
//!   it has requests in flight, of a number that all share. Connections are counted. What a client says of lengths and
//!   counts decides about no allocation.
//! - **Time.** A handshake has a deadline, and so has the reading of a reply. A client that has chosen an export may be
//!   silent for as long as it likes.
//! - **Nothing is told.** Errors are told to clients by their kind; paths and the like are for the log. Without TLS where it
//!   is required, not even names of exports are told.

mod context;
mod execute;
mod export;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod listen;
mod negotiate;
mod proto;
mod server;
#[cfg(any(test, feature = "fuzzing"))]
mod testing;
mod tls;
mod transmit;
mod wire;

pub use context::{BitmapContext, Extents, MetaContext, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
pub use export::{Export, ExportStatus, Removal};
pub use listen::Address;
pub use server::{Config, Server};
pub use tls::Tls;
