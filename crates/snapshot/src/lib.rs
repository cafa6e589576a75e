//! The cut: consistent snapshots of a group of disks.

mod backing;
#[cfg(test)]
mod bench;
mod chain;
mod copy;
mod cut;
mod debts;
mod edit;
mod events;
mod export;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod group;
mod housekeeping;
mod jobs;
mod journals;
mod layer;
mod manager;
mod manifest;
mod marks;
mod model;
mod naming;
pub mod probe;
mod request;
mod store;

pub use backing::AllowedFolders;
pub use chain::Chain;
pub use copy::{CopyFailure, DiskCopy};

pub use cut::{
    Clock, ClosedGates, Collector, Coverage, Cut, CutPlan, CutPorts, Debts, Events, FreezeOutcome,
    FreezeStatus, Freezer, GateGroup, Gates, Guest, GuestError, GuestResult, Held, Layers, Limits, Overrun,
    PivotedLayers, PreparedLayers, SystemClock, ThawOutcome, grade,
};
pub use export::Progress;
pub use jobs::{
    BlockJobInfo, ClientId, CommitRequest, DeleteRequest, Halt, HostedJob, Job, JobEnd, JobGroup, JobInfo,
    JobOptions, JobStatus, JobType, JobVerb, Labor, Seat, StreamRequest,
};
pub use layer::DEFAULT_METADATA_CACHE;
pub use manager::{DiskConfig, DiskProbe, FreezeDefaults, MAX_LEASE, Manager, SnapshotReader};
pub use marks::{
    BitmapInfo, BitmapLock, BitmapName, Changes, CheckpointDisk, CheckpointRecord, CheckpointRequest,
    CutRequest, DEFAULT_GRANULARITY, MarkChange, Pin, Point, Taken,
};
pub use model::{
    CreateRequest, DiskLayer, DiskStatus, ErrorAction, Event, FreezeOwner, FreezePolicy, Grade, ImageFormat,
    IoOperation, ShutdownCause, SnapshotDisk, SnapshotRecord, Step, Timing, millis,
};
