//! Conformance, crash and protocol suites that need no virtual machine, and what they drive devices with.
//!
//! - [`Driver`]: an honest virtio-blk driver over vhost-user, for data and for load.
//! - [`Load`]: that driver kept busy, and what it measured.
//! - [`FrontEnd`]: rings by hand, for messages and for chains that no driver would make.
//! - [`python_programs`]: the client library that people drive QEMU with.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's means fail the test")]

mod driver;
mod front_end;
mod load;
mod python;
mod stats;

pub use driver::{Driver, DriverQueue, Request};
pub use front_end::{Desc, FrontEnd};
pub use load::{Load, Measured};
pub use python::{python_programs, run_tool};
pub use stats::{ProcessTime, kilobytes, open_files, percentile, threads};
