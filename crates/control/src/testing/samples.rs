//! What the service that pretends shows: one of each, with everything in it.

use std::path::PathBuf;

use backup::NodeInfo;
use block::{IoStatus, WriteErrors};
use hostio::Cache;
use snapshot::probe::{FsKind, FsVerdict, Verdict};
use snapshot::{
    BitmapInfo, BlockJobInfo, CheckpointDisk, CheckpointRecord, DiskLayer, DiskProbe, DiskStatus, Grade,
    ImageFormat, JobInfo, JobStatus, SnapshotDisk, SnapshotRecord, Timing,
};
use time::OffsetDateTime;

/// A snapshot of these disks, frozen.
pub(super) fn snapshot(name: String, disks: &[String]) -> SnapshotRecord {
    let image = |id: &String| SnapshotDisk {
        id: id.clone(),
        path: PathBuf::from("/images/base.raw"),
        format: ImageFormat::Raw,
    };
    SnapshotRecord {
        name,
        time: OffsetDateTime::UNIX_EPOCH,
        grade: Grade::Filesystem,
        reason: "2 of 2 file systems were frozen".to_owned(),
        frozen_count: Some(2),
        thawed_count: Some(2),
        timing: Timing { prepare: 1.5, freeze: Some(20.0), frozen: Some(25.25), ..Timing::default() },
        sealed: true,
        disks: disks.iter().map(image).collect(),
    }
}

pub(super) fn checkpoint(name: String, disks: Vec<String>) -> CheckpointRecord {
    let part = |id| CheckpointDisk { id, boundary: 1, capacity: 1 << 30 };
    CheckpointRecord {
        name,
        time: OffsetDateTime::UNIX_EPOCH,
        grade: Grade::Crash,
        reason: "the guest was not asked".to_owned(),
        disks: disks.into_iter().map(part).collect(),
    }
}

pub(super) fn probe() -> DiskProbe {
    let volume = FsVerdict {
        partition: Some(1),
        name: None,
        label: None,
        offset: 1 << 20,
        size: 1 << 30,
        kind: FsKind::Ext4,
        verdict: Verdict::Clean,
        detail: "needs_recovery is not set".to_owned(),
        unknowable: FsKind::Ext4.unknowable().to_owned(),
    };
    DiskProbe { id: "vda".to_owned(), volumes: vec![volume] }
}

/// A job as the older commands show it.
pub(super) fn block_job(job: JobInfo) -> BlockJobInfo {
    BlockJobInfo {
        r#type: job.r#type,
        device: job.id,
        len: job.total_progress,
        offset: job.current_progress,
        busy: job.status == JobStatus::Running,
        paused: job.status == JobStatus::Paused,
        speed: 0,
        io_status: IoStatus::Ok,
        ready: false,
        status: job.status,
        auto_finalize: true,
        auto_dismiss: true,
        error: job.error,
    }
}

pub(super) fn node() -> NodeInfo {
    NodeInfo {
        node_name: "target".to_owned(),
        driver: "raw",
        filename: PathBuf::from("/backups/vda.raw"),
        virtual_size: 1 << 30,
        read_only: false,
        dirty_bitmaps: Vec::new(),
    }
}

pub(super) fn bitmap() -> BitmapInfo {
    BitmapInfo {
        name: "b".to_owned(),
        count: 1 << 16,
        granularity: 1 << 16,
        recording: true,
        busy: false,
        persistent: true,
        inconsistent: false,
    }
}

/// A base and an overlay.
pub(super) fn disk(capacity: u64, io_status: IoStatus) -> DiskStatus {
    let layer = |number: u32, path: &str, format| DiskLayer {
        node_name: format!("vda.{number}"),
        path: PathBuf::from(path),
        format,
        virtual_size: 1 << 30,
        actual_size: Some(4096 << number),
        sync_failed: number == 0,
    };
    let base = layer(0, "/images/base.raw", ImageFormat::Raw);
    let overlay = layer(1, "/images/vda.1.qcow2", ImageFormat::Qcow2);
    DiskStatus {
        id: "vda".to_owned(),
        capacity,
        read_only: false,
        connected: true,
        cache: Cache::None,
        write_errors: WriteErrors::Enospc,
        io_status,
        parked: 2,
        in_flight: 5,
        layers: vec![base, overlay],
    }
}
