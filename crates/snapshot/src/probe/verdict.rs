//! What a probe says of one file system.

use serde::{Deserialize, Serialize};

/// What was found in one partition, or on a disk without a partition table.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FsVerdict {
    /// The partition's number as Linux counts (logical ones from 5 on); absent for the disk as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<u32>,
    /// The partition's name in its table; only GPT has names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The file system's own label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The first byte of the partition on the disk.
    pub offset: u64,
    /// Bytes in the partition, by its table; the file system in it may be smaller.
    pub size: u64,
    /// What it is.
    pub kind: FsKind,
    /// Whether it is clean.
    pub verdict: Verdict,
    /// Why, in words, from the fields that decided.
    pub detail: String,
    /// What nobody can know from these fields alone ([`FsKind::unknowable`]).
    pub unknowable: String,
}

/// The formats that the probe knows by their signatures.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FsKind {
    /// The second extended file system; it has no journal.
    Ext2,
    /// The same with a journal and nothing newer.
    Ext3,
    /// The same with any feature of ext4's.
    Ext4,
    /// SGI's.
    Xfs,
    /// Btrfs, or one device of it.
    Btrfs,
    /// FAT12, FAT16 and FAT32.
    Vfat,
    /// Windows'.
    Ntfs,
    /// The BSDs' fast file system, first version.
    Ufs1,
    /// Its second version.
    Ufs2,
    /// A physical volume of LVM.
    Lvm,
    /// An encrypted volume.
    Luks,
    /// A member of a Linux software RAID.
    MdRaid,
    /// Swap space.
    Swap,
    /// A BSD disk label: partitions within this one.
    BsdLabel,
    /// A partition whose type says that it holds no file system, such as a boot loader's.
    Reserved,
    /// None of these.
    Unknown,
}

/// Whether a file system would come up from this snapshot as it is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It says of itself that it is consistent: its journal holds nothing that is not in its place already.
    Clean,
    /// Consistent once its journal is replayed, which its driver does when it mounts.
    Replay,
    /// It needs its checker: it has no journal to replay, or it has noted errors.
    Dirty,
    /// Not a file system, or one behind a layer that is not looked into.
    Opaque,
    /// It could not be decided; the detail says why.
    Unknown,
}

impl FsKind {
    /// What the fields that the probe reads can not tell of this format; for people, and part of every verdict.
    pub fn unknowable(self) -> &'static str {
        match self {
            Self::Ext2 => {
                "without a journal the flag says unmounted or not, and a freeze does not always set it back; \
                 whether structures are sound, only e2fsck knows"
            }
            Self::Ext3 | Self::Ext4 => {
                "whether structures and file contents are sound; with data=writeback files may hold stale \
                 blocks; errors noted only in the journal are not read"
            }
            Self::Xfs => {
                "whether structures and file contents are sound; deleted files that were open are freed by log \
                 recovery and do not show; the log records' checksums and a realtime device are not read"
            }
            Self::Btrfs => {
                "whether trees and file contents are sound; other devices of the same file system and checksums \
                 other than crc32c are not read"
            }
            Self::Vfat => {
                "the dirty bits are advice: some drivers never set them, and Linux keeps its bit set while mounted \
                 for writing, synced or not; there is no journal"
            }
            Self::Ntfs => {
                "whether structures and file contents are sound; the log's records, and a hibernated Windows \
                 that still holds changes in hiberfil.sys, are not read"
            }
            Self::Ufs1 | Self::Ufs2 => {
                "while mounted for writing it says not clean, suspended or not; the journal's content is not \
                 read; NFSv4 ACLs on FreeBSD and a journal on NetBSD share a flag"
            }
            Self::Lvm | Self::Luks | Self::MdRaid | Self::BsdLabel => "all that is behind this layer",
            Self::Swap => "a hibernated system that still holds changes in it",
            Self::Reserved => "whether what it holds is complete",
            Self::Unknown => "everything but that no known signature decides",
        }
    }
}

/// What a format's parser says of a volume that carries its signature.
#[derive(Debug)]
pub(super) struct Finding {
    pub(super) kind: FsKind,
    pub(super) verdict: Verdict,
    pub(super) label: Option<String>,
    pub(super) detail: String,
}

impl Finding {
    pub(super) fn new(kind: FsKind, verdict: Verdict, detail: impl Into<String>) -> Self {
        Self { kind, verdict, label: None, detail: detail.into() }
    }

    pub(super) fn labelled(mut self, label: Option<String>) -> Self {
        self.label = label;
        self
    }
}
