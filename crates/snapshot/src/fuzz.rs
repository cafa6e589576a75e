//! The bodies of the fuzz targets: each takes any bytes, and panics if the crate does other than a plain model of it.
//!
//! `fuzz/` hands them to libFuzzer; the tests here run them for a moment on mutated seeds, so that they stay true.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a panic is how a fuzz target speaks"
)]

mod files;
mod probe;
#[cfg(test)]
mod tests;

pub use files::{bits, state};
pub use probe::probe;

/// A fuzz target's body.
pub type Target = fn(&[u8]);

/// All targets, by the names that they have in `fuzz/`.
pub const TARGETS: [(&str, Target); 3] = [("probe", probe), ("state", state), ("bits", bits)];
