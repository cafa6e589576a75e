//! What `blockdev-add` is told: QEMU's `BlockdevOptions`, as far as a backup has a use for it.

use std::path::PathBuf;

use serde::Deserialize;

/// A node to add. The schema has checked which members there are.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeOptions {
    /// Its name.
    pub(super) node_name: Option<String>,
    #[serde(default)]
    pub(super) read_only: bool,
    #[serde(default)]
    pub(super) cache: CacheOptions,
    #[serde(flatten)]
    pub(super) driver: Driver,
}

/// QEMU's `BlockdevCacheOptions`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct CacheOptions {
    #[serde(default)]
    pub(super) direct: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case", tag = "driver")]
pub(super) enum Driver {
    File {
        filename: PathBuf,
    },
    #[serde(rename = "host_device")]
    HostDevice {
        filename: PathBuf,
    },
    Raw {
        file: Reference,
    },
    Qcow2 {
        file: Reference,
    },
    CopyBeforeWrite {
        file: Reference,
        target: Reference,
    },
    SnapshotAccess {
        file: Reference,
    },
}

impl Driver {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::HostDevice { .. } => "host_device",
            Self::Raw { .. } => "raw",
            Self::Qcow2 { .. } => "qcow2",
            Self::CopyBeforeWrite { .. } => "copy-before-write",
            Self::SnapshotAccess { .. } => "snapshot-access",
        }
    }
}

/// A node that another one needs: QEMU's `BlockdevRef`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Reference {
    Name(String),
    Definition(Box<NodeOptions>),
}

impl Reference {
    /// As in QEMU, what is defined within a node that is not written is not written either.
    pub(super) fn within(mut self, writable: bool) -> Self {
        if let Self::Definition(options) = &mut self {
            options.read_only |= !writable;
        }
        self
    }
}
