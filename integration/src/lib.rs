//! Real guests under QEMU, on disks that Frazil serves.
//!
//! ```text
//!   test ──── Scratch ─ folder of images, sockets, logs; kept after a failure
//!    │
//!    ├─────── Daemon ── frazil serve … ◄── vhost-user-blk ──┐
//!    │           ▲ frazil snapshot …                        │
//!    └─────── Guest ─── QEMU ── kernel + initramfs (Image) ─┘
//!                 ▲ control port: one line of shell at a time (guest/init)
//!                 └ agent port: qemu-ga, Frazil's to use
//! ```
//!
//! Lifecycle: whatever was started is killed by its process id when its value is dropped, in the middle of an error or
//! a panic too. Every wait has a limit, and its error shows the end of the guest's console or the program's log.
//!
//! The guest is built here from Debian packages that `integration/deps` has unpacked: an uncompressed kernel, which
//! QEMU starts directly, and an initramfs with busybox, qemu-ga, file system tools and `guest-workload`. It has no disk
//! of its own, so every disk in it is one under test.

mod daemon;
mod error;
mod guest;
mod image;
mod process;
mod pull;
mod qmp;
mod rig;
mod scratch;
mod verify;
mod wait;

pub use daemon::{Daemon, Served, Snapshot, SnapshotDisk};
pub use error::{Context, Error, Result};
pub use guest::{Builder, Driver, FileSystem, Guest, Hardware, Kind, Progress};
pub use image::{Image, program};
pub use process::Process;
pub use pull::{pull_all, pull_changes};
pub use qmp::Qmp;
pub use rig::Rig;
pub use scratch::Scratch;
pub use verify::{Expectation, check_images, verify, verify_images};
pub use wait::eventually;
