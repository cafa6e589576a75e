//! What a snapshot is, as it is recorded, reported and sent as an event.

mod event;

use std::path::PathBuf;
use std::time::Duration;

use block::{IoStatus, WriteErrors};
use hostio::Cache;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

pub use event::{ErrorAction, Event, IoOperation, ShutdownCause};

/// How sure it is that the guest's file systems are clean in the snapshot.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grade {
    /// Every mounted, writable file system on our disks was frozen, and stayed so until after the cut.
    Filesystem,
    /// As after a loss of power at the instant of the cut; file systems replay their journals.
    Crash,
}

/// What to do about the guest agent.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FreezePolicy {
    /// No snapshot without a freeze of grade `filesystem`.
    Require,
    /// Freeze if it can be had, else take a snapshot of grade `crash` and say why.
    #[default]
    Prefer,
    /// Do not ask the agent.
    Never,
}

/// Who freezes the guest.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FreezeOwner {
    /// Frazil, through the agent's socket.
    #[default]
    Frazil,
    /// The caller has frozen the guest by other means (libvirt) before it asks, and thaws it after.
    External,
    /// Nobody.
    None,
}

/// The measured time of each step of a cut, in milliseconds; a step that did not take place is absent.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Timing {
    /// Overlays created and synced, manifest written. The guest runs.
    pub prepare: f64,
    /// The guest's dirty memory written out ahead of the freeze. The guest runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_sync: Option<f64>,
    /// From the freeze command to its reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<f64>,
    /// Closing the gates of all disks of the group.
    pub gate: f64,
    /// Waiting for the requests in flight.
    pub drain: f64,
    /// The switch to the overlays.
    pub pivot: f64,
    /// Opening the gates.
    pub open: f64,
    /// From the thaw command to its confirmation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thaw: Option<f64>,
    /// Syncing the old layers. The guest runs.
    pub seal: f64,
    /// How long no request was taken: from the closing of the first gate to the opening of the last.
    pub gate_closed: f64,
    /// How long the guest's file systems were frozen: from the freeze command to the confirmation of the thaw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<f64>,
    /// The longest time a request waited before a gate because of this cut.
    pub longest_wait: f64,
}

/// A [`Duration`] as [`Timing`] counts. One division, so that it prints with the digits that were measured and no more
/// (0.000652, not 0.0006519999999999999).
pub fn millis(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1e6
}

/// One disk's share of a snapshot: the image that now holds the frozen state.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotDisk {
    /// The disk's id, as given to `--disk`.
    pub id: String,
    /// The image; with what it names as its backing file it holds the whole state.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: ImageFormat,
}

/// The format of an image, always stated, never probed.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The bytes as they are.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// A snapshot, as recorded.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotRecord {
    /// Its name, unique among the daemon's snapshots.
    pub name: String,
    /// When the cut was made, on the host's clock.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// How clean the file systems are.
    pub grade: Grade,
    /// Why it has that grade, in words.
    pub reason: String,
    /// File systems that the agent said it froze; absent if it was not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_count: Option<u64>,
    /// File systems that the agent said it thawed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thawed_count: Option<u64>,
    /// The measured time of each step.
    pub timing: Timing,
    /// Whether the old layers are synced: until then a loss of the host's power may lose the snapshot.
    pub sealed: bool,
    /// The images that hold the frozen state, one a disk.
    pub disks: Vec<SnapshotDisk>,
}

/// The steps of a cut, in order (design: PREPARE, pre-sync, FREEZE, GATE, DRAIN, PIVOT, OPEN, THAW, SEAL).
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Overlays and manifest.
    Prepare,
    /// The guest writes out its dirty memory.
    PreSync,
    /// The guest's file systems stop.
    Freeze,
    /// No request is taken any more.
    Gate,
    /// The requests in flight end.
    Drain,
    /// The overlays become active.
    Pivot,
    /// Requests are taken again.
    Open,
    /// The guest's file systems go on.
    Thaw,
    /// The old layers are synced.
    Seal,
}

/// What to take a snapshot of, and how.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CreateRequest {
    /// The snapshot's name: letters, digits, `-`, `_`, `.`; at most 64, not starting with a dot or dash.
    pub name: String,
    /// The disks, all at one cut; all the daemon's disks if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
    /// What to do about the agent; the daemon's default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FreezePolicy>,
}

/// A disk that the daemon serves.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskStatus {
    /// The id given to `--disk`.
    pub id: String,
    /// Bytes.
    pub capacity: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// The way of its data I/O.
    pub cache: Cache,
    /// What becomes of changes that the host can not carry out.
    #[serde(rename = "werror")]
    pub write_errors: WriteErrors,
    /// Whether requests wait for the host, and why.
    pub io_status: IoStatus,
    /// How many do.
    pub parked: u64,
    /// Requests that were taken from the rings and are not answered, those that wait included.
    pub in_flight: u64,
    /// The chain's images, the base first, the active layer last.
    pub layers: Vec<DiskLayer>,
}

/// One image of a disk's chain.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskLayer {
    /// Its name as a node: the disk's id, a dot and the layer's number, which it keeps as long as it lives.
    pub node_name: String,
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Bytes that it shows: those of its disk when the next layer was put on it.
    pub virtual_size: u64,
    /// Bytes that it takes on the host; absent where the host does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Whether a sync of it has failed: nothing more is written to it until a restart.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sync_failed: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_have_no_digits_that_nobody_measured() {
        for nanos in (1..10_000).chain([1_000_000_000_001, 3_725_392]) {
            let text = millis(Duration::from_nanos(nanos)).to_string();
            let decimals = text.split_once('.').map_or(0, |(_, decimals)| decimals.len());
            assert!(decimals <= 6, "{nanos} ns are told as {text} ms");
        }
        assert_eq!(millis(Duration::from_micros(1500)), 1.5);
    }
}
