//! The vhost-user-blk device and its sessions.
//!
//! # Lifecycle
//! ```text
//!  Server::start ─▶ listening ─▶ connected ─▶ closing: drain, join ─▶ listening …  ─▶ Server::stop
//!                     ▲  a Device, a daemon and N workers are made ▲
//!                     └────────── for each session, and gone after it
//! ```
//! A [`Server`] owns a disk's socket for as long as it lives. One front-end is served at a time, others wait in the
//! socket's backlog. What a front-end negotiated ends with its session; the [`Disk`](block::Disk), its
//! [`Gate`](block::Gate) and the write cache's setting outlive it.
//!
//! # I/O model
//! ```text
//!   guest memory          worker thread i (one a virtqueue)                    host
//!  ┌────────────┐ pop   ┌──────┐  ┌──────┐  resolve  ┌───────┐ iovecs   ┌──────────┐
//!  │ ring i     │──────▶│ gate │─▶│ slot │──────────▶│ extent│─────────▶│ io_uring,│
//!  │ buffers    │◀──────│ lane │◀─│      │◀──────────│ guard │◀─────────│ pwritev  │
//!  └────────────┘ used  └──────┘  └──────┘ complete  └───────┘          └──────────┘
//! ```
//! A worker has its own io_uring, its own slots for requests, and shares nothing with the others but the disk. Guest
//! memory goes to the kernel as it is; a slot holds on to the memory map until its request has been answered.
//!
//! # Invariants
//! - Nothing that a driver puts in its rings ends a worker, a session or the process.
//! - A request is counted in flight, at the gate and at its queue, from before it is popped until its used ring entry
//!   is written.
//! - GET_VRING_BASE is answered, and memory is unmapped after a session, only when nothing of it is in flight. Both
//!   wait for requests alone, never for the gate, and not for parked ones: those end with an error then.
//! - A parked request (see [`block::Parking`]) is in flight for its queue, but not for the gate.

mod allowance;
mod answer;
mod cache;
mod chain;
mod complaint;
mod config;
mod device;
mod dirty;
mod engine;
mod errors;
mod floor;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod guest;
mod inflight;
mod inspect;
mod lot;
mod maps;
mod patience;
mod queue_state;
mod relay;
mod request;
mod server;
mod sigbus;
mod slot;
mod vring;
mod wake;
mod worker;

pub use allowance::Allowance;
pub use errors::{IoFailure, OnFailure};
pub use server::{DeviceConfig, Notifier, Server, SessionEvent};
