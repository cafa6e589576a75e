//! What backup programs need: the surface that QEMU gives them for its block layer, over Frazil's disks.
//!
//! ```text
//!   blockdev-add ──▶ Nodes:   file ◀── raw, qcow2            what a backup is written to
//!                             disk ◀── copy-before-write ◀── snapshot-access   what it is read from
//!                                           │ qom-set drive
//!   transaction ──▶ check all ──▶ one cut of all disks ──▶ bitmaps, jobs
//!                                           │
//!                                     Pin (snapshot crate): the disk as it was, redirect-on-write
//! ```
//!
//! # A filter that copies nothing
//! QEMU's `copy-before-write` filter makes each write of the guest wait until the old bytes have been copied to the fleecing
//! image. Here a disk that has such a filter put on is cut: what the guest writes from then on goes to a new overlay, and
//! what `snapshot-access` shows is the layers beneath. So the fleecing image stays empty, the guest never waits for a
//! backup, and none of the filter's errors and time-outs can happen.
//!
//! The same view is what an image over a disk shows (`backing`), to which a backup with `sync: none` goes or such a filter; the job
//! copies what was overwritten at its end.
//!
//! # Lifecycle
//! A node lives until `blockdev-del`, and not beyond the daemon, as in QEMU. It can not go while a job, an export or another
//! node uses it. A job is on the daemon's list of jobs (`snapshot`, `Labor`), and ends with the daemon.
//!
//! # Invariants
//! - A transaction does all of its actions or none. What can fail for what a client asked is found out before the cut.
//! - All that happens at the instant of a transaction happens at one cut of all its disks.
//! - A bitmap that a job uses is changed only when the job has succeeded, and then in one piece. A job that fails, is called
//!   off or dies with the daemon leaves it as it was, so the next incremental copies a little too much and never too little.

mod actions;
mod address;
mod copying;
mod exports;
mod fleece;
mod labor;
mod model;
mod nodes;
mod serving;
mod transaction;

pub use actions::Backups;
pub use address::SocketAddress;
pub use exports::{ExportInfo, ExportOptions, ServerOptions, TlsCredentials};
pub use model::{
    Action, BackupOptions, BackupRequest, BitmapAdd, BitmapMerge, BitmapMode, BitmapRef, BitmapSource,
    CompletionMode, DriveBackupRequest, FileTarget, NewImageMode, OnError, Sync,
};
pub use nodes::{ImageOptions, NodeInfo, NodeOptions};
pub use serving::{ServeRequest, Serving};
