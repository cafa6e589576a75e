//! Jobs: work on chains in the background, while guests run and cuts go on.
//!
//! A job merges neighbouring layers into one, *down* into the lowest (commit) or *up* into the highest (stream). The disk,
//! and every snapshot that stays, read the same at any instant before, in and after it.
//!
//! ```text
//!   client ──▶ Jobs ──▶ a thread: Work ── prepare ─▶ copy ─▶ switch
//!    (commands)  │ list     │  ▲              │          │        │
//!                │          ▼  │ pause_point  ▼          ▼        ▼
//!                └───────▶ Job (Machine)   manifest   target   header, manifest, chain
//! ```
//!
//! # Invariants
//! - **What a job writes is not seen.** Down: only ranges that the layers above the target hold themselves. Up: only what
//!   shows through the target anyway. So there is no lock between a job and the guest, and a job can end anywhere.
//! - **No snapshot is lost but the one that is deleted.** All merged layers but the highest hold none, or only that. It is
//!   marked in the manifest before the first byte that changes what it holds, and nobody reads it from then on.
//! - **The active layer is never merged.** A new one is put on it first, as a cut does.
//! - **A cut never waits for copying.** A job holds the right to change chains only for its pivot and its switch.
//! - **A job outlives its process.** The manifest names it before it begins, and what it is about to write to.
//!
//! `docs/architecture.md` has the reasons; [`machine`] what a job may become.

mod commands;
mod copy;
mod group;
mod hosted;
mod job;
mod machine;
mod model;
mod notes;
mod pace;
mod plan;
mod record;
mod runner;
mod switch;
mod tidy;
mod work;
mod world;

pub(crate) use commands::named;
pub use group::JobGroup;
pub use hosted::{HostedJob, Labor, Seat};
pub use job::{Halt, Job};
pub use machine::Verb as JobVerb;
pub use model::{
    BlockJobInfo, ClientId, CommitRequest, DeleteRequest, JobEnd, JobInfo, JobOptions, JobStatus, JobType,
    StreamRequest,
};
pub(crate) use notes::tell as tell_cut_short;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use plan::{plan, replan, tidy};
pub(crate) use record::JobRecord;
pub(crate) use runner::Jobs;
pub(crate) use world::{Readers, Reading, World};

#[cfg(test)]
mod tests;
