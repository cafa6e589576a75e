//! What `blockdev-add` is told: QEMU's `BlockdevOptions`, as far as a backup has a use for it.

use std::path::{Path, PathBuf};

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

impl NodeOptions {
    /// A node that no client names.
    pub(super) fn new(driver: Driver) -> Self {
        Self { node_name: None, read_only: false, cache: CacheOptions::default(), driver }
    }

    /// The files that it names, itself or in what is defined within it.
    pub fn filenames(&self) -> Vec<&Path> {
        match &self.driver {
            Driver::File { filename } | Driver::HostDevice { filename } => vec![filename],
            // What else than a disk is beneath an image is not opened.
            Driver::Raw { file } | Driver::Qcow2 { file, .. } | Driver::SnapshotAccess { file } => {
                file.filenames()
            }
            Driver::CopyBeforeWrite { file, target } => [file.filenames(), target.filenames()].concat(),
        }
    }
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
        /// What is beneath it: of use if it is a disk.
        backing: Option<Reference>,
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

/// An image to be made: QEMU's `BlockdevCreateOptions`, as far as a backup has a use for it.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct ImageOptions(pub(super) NewImage);

impl ImageOptions {
    /// The files that they name.
    pub fn filenames(&self) -> Vec<&Path> {
        match &self.0 {
            NewImage::File { filename, .. } => vec![filename],
            NewImage::Qcow2(options) => options.file.filenames(),
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case", tag = "driver")]
pub(super) enum NewImage {
    File {
        filename: PathBuf,
        size: u64,
        #[serde(default)]
        preallocation: Preallocation,
    },
    Qcow2(Qcow2Options),
}

/// QEMU's `BlockdevCreateOptionsQcow2`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Qcow2Options {
    pub(super) file: Reference,
    pub(super) size: u64,
    #[serde(default)]
    pub(super) version: Version,
    pub(super) cluster_size: Option<u64>,
    #[serde(default)]
    pub(super) extended_l2: bool,
    pub(super) backing_file: Option<String>,
    pub(super) backing_fmt: Option<String>,
    #[serde(default)]
    pub(super) preallocation: Preallocation,
    #[serde(default)]
    pub(super) lazy_refcounts: bool,
    pub(super) refcount_bits: Option<u64>,
    #[serde(default)]
    pub(super) compression_type: CompressionType,
}

/// QEMU's `PreallocMode`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Preallocation {
    #[default]
    Off,
    Metadata,
    Falloc,
    Full,
}

impl Preallocation {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

/// QEMU's `BlockdevQcow2Version`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Version {
    V2,
    #[default]
    V3,
}

/// QEMU's `Qcow2CompressionType`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub(super) enum CompressionType {
    #[default]
    Zlib,
    Zstd,
}

/// A node that another one needs: QEMU's `BlockdevRef`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Reference {
    Name(String),
    Definition(Box<NodeOptions>),
}

impl Reference {
    fn filenames(&self) -> Vec<&Path> {
        match self {
            Self::Name(_) => Vec::new(),
            Self::Definition(options) => options.filenames(),
        }
    }

    /// The name, if it is one.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Self::Name(name) => Some(name),
            Self::Definition(_) => None,
        }
    }

    /// As in QEMU, what is defined within a node that is not written is not written either.
    pub(super) fn within(mut self, writable: bool) -> Self {
        if let Self::Definition(options) = &mut self {
            options.read_only |= !writable;
        }
        self
    }
}
