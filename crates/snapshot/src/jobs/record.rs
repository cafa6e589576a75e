//! What the manifest remembers of jobs, so that the next run of the daemon goes on with them.

use serde::{Deserialize, Serialize};

use super::model::JobType;

/// A job that has not concluded.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct JobRecord {
    pub(crate) id: String,
    pub(crate) task: Task,
    /// Nobody asked for it but Frazil itself.
    pub(crate) automatic: bool,
    #[serde(default = "yes")]
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
    pub(crate) speed: u64,
    pub(crate) paused: bool,
    /// Empty until it is about to write its first byte.
    #[serde(default)]
    pub(crate) moves: Vec<Move>,
}

/// What a job was asked to do. Layers are named by their numbers, which stay as chains change.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub(crate) enum Task {
    /// Merge the layers above `base`, up to `top`, down into `base`; if `by_hand`, once a client completes it.
    Commit {
        disk: String,
        base: u32,
        top: u32,
        #[serde(default)]
        by_hand: bool,
    },
    /// Pull the layers above `base`, or all if there is none, up into `top`.
    Stream { disk: String, base: Option<u32>, top: u32 },
    /// Merge the layers from `lowest` to `highest` whichever way copies less.
    Merge { disk: String, lowest: u32, highest: u32 },
    /// Delete a snapshot, of all its disks.
    Delete { snapshot: String },
}

fn yes() -> bool {
    true
}

impl JobRecord {
    /// Whether it has begun to do away with a snapshot.
    pub(crate) fn takes_away(&self, name: &str) -> bool {
        !self.moves.is_empty() && matches!(&self.task, Task::Delete { snapshot } if snapshot == name)
    }
}

impl Task {
    pub(crate) fn kind(&self) -> JobType {
        match self {
            Self::Commit { .. } | Self::Merge { .. } => JobType::Commit,
            Self::Stream { .. } => JobType::Stream,
            Self::Delete { .. } => JobType::SnapshotDelete,
        }
    }
}

/// Which way layers are merged.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Direction {
    /// Into the lowest.
    Down,
    /// Into the highest.
    Up,
}

/// One disk's part of a job: neighbouring layers that become one.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Move {
    pub(crate) disk: String,
    pub(crate) direction: Direction,
    pub(crate) lowest: u32,
    pub(crate) highest: u32,
    /// Up to this byte of the disk all is copied, on stable storage.
    pub(crate) copied: u64,
}

impl Move {
    /// The number of the layer that stays.
    pub(crate) fn target(&self) -> u32 {
        match self.direction {
            Direction::Down => self.lowest,
            Direction::Up => self.highest,
        }
    }
}
