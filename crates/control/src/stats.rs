//! What disks have been asked for, in the words of QEMU's `query-blockstats` (`qapi/block-core.json`).
//!
//! QEMU's types have members for what Frazil has not (zones, merged requests): they are 0, as QEMU's are for such a disk.

use std::time::Duration;

use backup::Backups;
use block::{Kind, LATENCY_BUCKETS, Stats, Tally};
use serde::Serialize;

/// QEMU's `BlockStats`.
#[derive(Debug, Serialize)]
pub(crate) struct BlockStats {
    device: String,
    qdev: String,
    #[serde(rename = "node-name")]
    node_name: String,
    stats: BlockDeviceStats,
}

/// QEMU's `BlockDeviceStats`.
#[derive(Debug, Default, Serialize)]
struct BlockDeviceStats {
    rd_bytes: u64,
    wr_bytes: u64,
    zone_append_bytes: u64,
    unmap_bytes: u64,
    rd_operations: u64,
    wr_operations: u64,
    zone_append_operations: u64,
    flush_operations: u64,
    unmap_operations: u64,
    rd_total_time_ns: u64,
    wr_total_time_ns: u64,
    zone_append_total_time_ns: u64,
    flush_total_time_ns: u64,
    unmap_total_time_ns: u64,
    wr_highest_offset: u64,
    rd_merged: u64,
    wr_merged: u64,
    zone_append_merged: u64,
    unmap_merged: u64,
    failed_rd_operations: u64,
    failed_wr_operations: u64,
    failed_zone_append_operations: u64,
    failed_flush_operations: u64,
    failed_unmap_operations: u64,
    invalid_rd_operations: u64,
    invalid_wr_operations: u64,
    invalid_zone_append_operations: u64,
    invalid_flush_operations: u64,
    invalid_unmap_operations: u64,
    account_invalid: bool,
    account_failed: bool,
    timed_stats: [(); 0],
    rd_latency_histogram: Histogram,
    wr_latency_histogram: Histogram,
    flush_latency_histogram: Histogram,
}

/// QEMU's `BlockLatencyHistogramInfo`.
#[derive(Debug, Default, Serialize)]
struct Histogram {
    boundaries: Vec<u64>,
    bins: Vec<u64>,
}

/// The disk `id` and what it has been asked for.
pub(crate) fn block_stats(id: String, stats: &Stats) -> BlockStats {
    BlockStats { qdev: Backups::qdev(&id), node_name: id.clone(), device: id, stats: device_stats(stats) }
}

fn device_stats(stats: &Stats) -> BlockDeviceStats {
    let (read, flush, unmap) = (stats.of(Kind::Read), stats.of(Kind::Flush), stats.of(Kind::Discard));
    let write = sum(stats.of(Kind::Write), &stats.of(Kind::WriteZeroes));
    BlockDeviceStats {
        rd_bytes: read.bytes,
        wr_bytes: write.bytes,
        unmap_bytes: unmap.bytes,
        rd_operations: read.done,
        wr_operations: write.done,
        flush_operations: flush.done,
        unmap_operations: unmap.done,
        rd_total_time_ns: nanos(read.time),
        wr_total_time_ns: nanos(write.time),
        flush_total_time_ns: nanos(flush.time),
        unmap_total_time_ns: nanos(unmap.time),
        wr_highest_offset: stats.highest_written,
        failed_rd_operations: read.failed,
        failed_wr_operations: write.failed,
        failed_flush_operations: flush.failed,
        failed_unmap_operations: unmap.failed,
        invalid_rd_operations: read.invalid,
        invalid_wr_operations: write.invalid,
        invalid_flush_operations: flush.invalid,
        invalid_unmap_operations: unmap.invalid,
        account_invalid: true,
        account_failed: true,
        rd_latency_histogram: histogram(&read),
        wr_latency_histogram: histogram(&write),
        flush_latency_histogram: histogram(&flush),
        ..BlockDeviceStats::default()
    }
}

fn sum(mut tally: Tally, other: &Tally) -> Tally {
    tally.done += other.done;
    tally.bytes += other.bytes;
    tally.failed += other.failed;
    tally.invalid += other.invalid;
    tally.time += other.time;
    tally.buckets.iter_mut().zip(other.buckets).for_each(|(bucket, other)| *bucket += other);
    tally
}

/// QEMU's bins end before their boundary, ours at it.
fn histogram(tally: &Tally) -> Histogram {
    let bounds = (0..LATENCY_BUCKETS).filter_map(Tally::bound);
    Histogram { boundaries: bounds.map(|bound| nanos(bound) + 1).collect(), bins: tally.buckets.to_vec() }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
