//! The QMP server and its commands.
//!
//! Frazil is operated through the protocol that operates QEMU: JSON over a Unix socket, commands one way, replies and
//! events the other. `docs/qmp.md` tells how to use it, `docs/qapi` is the schema, and part of the program.
//!
//! # Threads
//! ```text
//!                     accept ──────────▶ a place among the clients (64 at most)
//!                                          │
//!   client ──bytes──▶ reader: Stream ──▶ Request ──▶ dispatch ──▶ Service (create, export, ...)
//!                                                       │ reply
//!   client ◀──lines── writer ◀──────── Outbox ◀─────────┤ (waits for room)
//!                                         ▲
//!   events ──▶ Announcer ──▶ Throttle ───┘  (never waits: a client that does not read is cut off)
//! ```
//! A client has two threads and the commands run on its reader. So a client's commands are done and answered in
//! order, a command that takes seconds holds up nobody else, and no client can hold up the daemon.
//!
//! # Lifecycle of a connection
//! ```text
//!   greeting ──▶ negotiation ──qmp_capabilities──▶ commands and events ──end of input──▶ drained, closed
//!                                                        └──stops reading, too long a command──▶ cut off
//! ```
//! A client that half-closes its socket after its last command still receives every reply. One that disappears in the
//! middle of a command has no influence on it.
//!
//! # Invariants
//! - Memory is bounded: at most [`MAX_CLIENTS`] connections, each with one incomplete command of 64 KiB, one that is
//!   being done, and about 1 MiB of lines to be written.
//! - No event reaches a client before the reply to its `qmp_capabilities`. What a command causes is told before its reply, what
//!   becomes of a job before any reply that knows of it; but for what was told less than a second ago.
//! - Arguments are checked before a command has any effect; unknown ones are refused.
//! - What a client sends can end its own connection and nothing else.

mod blocks;
pub mod client;
mod clients;
mod commands;
mod error;
mod events;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod message;
mod outbox;
mod schema;
mod server;
mod service;
mod session;
mod stats;
mod stream;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod throttle;

pub use clients::MAX_CLIENTS;
pub use events::Announcer;
pub use server::Server;
pub use service::{DaemonStatus, Service};
