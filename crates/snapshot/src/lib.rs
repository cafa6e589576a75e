//! The cut: consistent snapshots of a group of disks.

mod model;

pub use model::{
    CreateRequest, DiskStatus, Event, FreezeOwner, FreezePolicy, Grade, ImageFormat, SnapshotDisk,
    SnapshotRecord, Step, Timing, millis,
};
