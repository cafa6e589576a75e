//! The NBD server against the clients that people use: libnbd's `nbdinfo`, `nbdcopy` and `nbdsh`, QEMU's `qemu-img` and
//! `qemu-io`, and fio.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod certificates;
mod copies;
mod served;
mod tls;
mod told;
mod writes;
