//! The bodies of the fuzz targets: each takes any bytes, and panics if the device does other than a plain model of it.
//!
//! `fuzz/` hands them to libFuzzer; the tests here run them for a moment on mutated seeds, so that they stay true.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a panic is how a fuzz target speaks"
)]

mod guest;
mod inflight;
mod messages;
#[cfg(test)]
mod tests;
mod virtio;

pub use inflight::inflight;
pub use messages::vhost_user_messages;
pub use virtio::virtio_requests;

/// A fuzz target's body.
pub type Target = fn(&[u8]);

/// All targets, by the names that they have in `fuzz/`.
pub const TARGETS: [(&str, Target); 3] = [
    ("virtio_requests", virtio_requests),
    ("inflight", inflight),
    ("vhost_user_messages", vhost_user_messages),
];
