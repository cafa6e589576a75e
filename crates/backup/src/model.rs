//! What clients ask for, in the words of QEMU's `qapi/block-core.json` and `qapi/transaction.json`.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use snapshot::{CreateRequest, JobOptions};

/// What of a disk is copied: QEMU's `MirrorSyncMode`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum Sync {
    /// All of it.
    Full,
    /// What is not in a backing file. A chain is one disk, so here that is all of it.
    Top,
    /// Nothing.
    None,
    /// What is dirty in a bitmap, which is clean afterwards.
    Incremental,
    /// What is dirty in a bitmap.
    Bitmap,
}

/// What becomes of the bitmap: QEMU's `BitmapSyncMode`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum BitmapMode {
    /// It is clean if the job succeeds.
    OnSuccess,
    /// It stays as it is.
    Never,
    /// What was copied is clean, even if the job fails.
    Always,
}

/// What a job does about failed I/O: QEMU's `BlockdevOnError`, of which `auto` is `report` here.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// Fails.
    #[default]
    #[serde(alias = "auto")]
    Report,
    /// Leaves the piece out and goes on.
    Ignore,
    /// Pauses on want of room, and fails of anything else.
    Enospc,
    /// Pauses; the piece is tried again when it is resumed.
    Stop,
}

/// What all backups take: QEMU's `BackupCommon`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupOptions {
    /// What every job can be told. Its id is the device's if absent.
    #[serde(flatten)]
    pub job: JobOptions,
    /// A disk, or a `snapshot-access` node.
    pub device: String,
    /// What is copied.
    pub sync: Sync,
    /// The bitmap that says what to copy, or that becomes clean by a whole copy.
    pub bitmap: Option<String>,
    /// What becomes of it; with `incremental` it is always on success.
    pub bitmap_mode: Option<BitmapMode>,
    /// Whether to compress what is written.
    #[serde(default)]
    pub compress: bool,
    /// What to do if the source can not be read.
    #[serde(default)]
    pub on_source_error: OnError,
    /// What to do if the target can not be written.
    #[serde(default)]
    pub on_target_error: OnError,
}

/// `blockdev-backup`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupRequest {
    /// What and how.
    #[serde(flatten)]
    pub options: BackupOptions,
    /// The node that is written to.
    pub target: String,
}

/// How the file comes to be that a backup is written to: QEMU's `NewImageMode`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum NewImageMode {
    /// It is there.
    Existing,
    /// It is made; one that is there is emptied.
    #[default]
    AbsolutePaths,
}

/// `drive-backup`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DriveBackupRequest {
    /// What and how.
    #[serde(flatten)]
    pub options: BackupOptions,
    /// The file or device that is written to.
    #[serde(flatten)]
    pub target: FileTarget,
}

/// A file or device to write an image to, which no node of the client's is on.
#[derive(Clone, Debug, Deserialize)]
pub struct FileTarget {
    /// Where.
    pub(crate) target: PathBuf,
    /// The image's format; the disk's if it is made and this is absent.
    pub(crate) format: Option<String>,
    /// How it comes to be.
    #[serde(default)]
    pub(crate) mode: NewImageMode,
}

/// How the jobs of a transaction end: QEMU's `ActionCompletionMode`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum CompletionMode {
    /// Each by itself.
    #[default]
    Individual,
    /// All well, or none.
    Grouped,
}

/// A bitmap: QEMU's `BlockDirtyBitmap`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapRef {
    /// The disk or node that it is of.
    pub node: String,
    /// Its name.
    pub name: String,
}

/// `block-dirty-bitmap-add`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapAdd {
    /// The disk or node.
    pub node: String,
    /// Its name.
    pub name: String,
    /// Bytes that one bit speaks for.
    pub granularity: Option<u32>,
    /// Whether it outlives the daemon.
    #[serde(default)]
    pub persistent: bool,
    /// Whether it does not record yet.
    #[serde(default)]
    pub disabled: bool,
}

/// `block-dirty-bitmap-merge`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapMerge {
    /// The disk or node of the target.
    pub node: String,
    /// The bitmap that is changed.
    pub target: String,
    /// Those that are read.
    pub bitmaps: Vec<BitmapSource>,
}

/// A bitmap to merge from: of the same node by its name, or of any.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum BitmapSource {
    /// Of the target's node.
    Local(String),
    /// Of another one.
    External(BitmapRef),
}

/// One of the things that a transaction does: QEMU's `TransactionAction`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type", content = "data")]
pub enum Action {
    /// Fails, and the transaction with it.
    Abort {},
    /// Makes a bitmap.
    BlockDirtyBitmapAdd(BitmapAdd),
    /// Removes one.
    BlockDirtyBitmapRemove(BitmapRef),
    /// Makes one clean.
    BlockDirtyBitmapClear(BitmapRef),
    /// Has one record.
    BlockDirtyBitmapEnable(BitmapRef),
    /// Has one record no more.
    BlockDirtyBitmapDisable(BitmapRef),
    /// Makes dirty in one what is in others.
    BlockDirtyBitmapMerge(BitmapMerge),
    /// Begins a backup to a node.
    BlockdevBackup(BackupRequest),
    /// Begins a backup to a file.
    DriveBackup(DriveBackupRequest),
    /// Takes a snapshot, Frazil's own, of the same instant.
    SnapshotCreate(CreateRequest),
}

impl Action {
    /// The file that it names, if it is one that names a file.
    pub fn filename(&self) -> Option<&Path> {
        match self {
            Self::DriveBackup(request) => Some(&request.target.target),
            _ => None,
        }
    }
}
