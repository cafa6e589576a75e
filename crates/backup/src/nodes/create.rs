//! Images that are made for backups.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Context, Error, ErrorKind, Result, Storage};
use hostio::{Cache, HostFile, Open};
use qcow2::{Compression, CreateOptions};
use snapshot::ImageFormat;

use super::options::{
    CompressionType, Driver, ImageOptions, NewImage, NodeOptions, Preallocation, Qcow2Options, Reference,
    Version,
};
use super::{Node, Nodes};
use crate::model::{FileTarget, NewImageMode};

/// Log2 of QEMU's usual cluster size in bytes.
const CLUSTER_BITS: u32 = 16;

/// An image that is about to be made. Its file is nobody else's meanwhile.
pub(crate) struct Creation {
    kind: Kind,
}

enum Kind {
    File { path: PathBuf, size: u64 },
    Qcow2 { file: Arc<Node>, options: CreateOptions },
}

impl Nodes {
    /// Checks what `blockdev-create` is told, and takes the file that the image is to be in.
    pub(crate) fn prepare(
        &self,
        options: ImageOptions,
        disk_of: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Creation> {
        let kind = match options.0 {
            NewImage::File { filename, size, preallocation } => {
                check_preallocation(preallocation)?;
                self.own.check(&filename)?;
                Kind::File { path: filename, size }
            }
            NewImage::Qcow2(asked) => {
                let options = qcow2_options(&asked)?;
                let _adding = self.adding();
                let file = self.resolve(asked.file, disk_of, &mut Vec::new())?;
                file.storage()?;
                self.check_free(&file, true)?;
                file.written.store(true, Ordering::Release);
                Kind::Qcow2 { file, options }
            }
        };
        Ok(Creation { kind })
    }

    /// Opens an image that no client has a node on, and makes it before, if that is asked for. `capacity` is in bytes.
    pub(crate) fn file_target(
        &self,
        target: &FileTarget,
        format: ImageFormat,
        capacity: u64,
    ) -> Result<Arc<Node>> {
        let path = &target.target;
        self.own.check(path)?;
        if target.mode == NewImageMode::AbsolutePaths {
            let made = match format {
                ImageFormat::Raw => make_file(path, capacity),
                ImageFormat::Qcow2 => emptied(path).and_then(|file| {
                    qcow2::create(&file, &CreateOptions::new(capacity, CLUSTER_BITS, false))
                }),
            };
            made.context(|| format!("make {}", path.display()))?;
        }
        let file = NodeOptions::new(Driver::File { filename: path.clone() });
        let file = Reference::Definition(Box::new(file));
        let driver = match format {
            ImageFormat::Raw => Driver::Raw { file },
            ImageFormat::Qcow2 => Driver::Qcow2 { file, backing: None },
        };
        let _adding = self.adding();
        self.make(NodeOptions::new(driver), &|_| None, &mut Vec::new())
    }
}

impl FileTarget {
    /// Its format; `usual` if it is made and nobody says.
    pub(crate) fn format(&self, usual: ImageFormat) -> Result<ImageFormat> {
        match (self.format.as_deref(), self.mode) {
            (Some("raw"), _) => Ok(ImageFormat::Raw),
            (Some("qcow2"), _) => Ok(ImageFormat::Qcow2),
            (Some(other), _) => refuse(&format!("Unknown file format '{other}'")),
            (None, NewImageMode::AbsolutePaths) => Ok(usual),
            (None, NewImageMode::Existing) => {
                refuse("'format' must be given: what is in an image is not guessed")
            }
        }
    }
}

impl Creation {
    /// The file that it is in.
    pub(crate) fn path(&self) -> PathBuf {
        match &self.kind {
            Kind::File { path, .. } => path.clone(),
            Kind::Qcow2 { file, .. } => file.place().0,
        }
    }

    /// Makes it; what was in the file is gone.
    pub(crate) fn run(&self) -> Result<()> {
        match &self.kind {
            Kind::File { path, size } => make_file(path, *size),
            Kind::Qcow2 { file, options } => {
                let storage = file.storage()?;
                storage.set_len(0)?;
                qcow2::create(&*storage, options)
            }
        }
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        if let Kind::Qcow2 { file, .. } = &self.kind {
            file.written.store(false, Ordering::Release);
        }
    }
}

/// A file of so many bytes, all zero. A device is left as it is, for it can not be made.
fn make_file(path: &Path, size: u64) -> Result<()> {
    let file = emptied(path)?;
    match file.is_device() {
        true => Ok(()),
        false => file.set_len(size).and_then(|()| file.sync()),
    }
}

/// A new file; or the one that is there, without what was in it, if nobody uses it.
fn emptied(path: &Path) -> Result<HostFile> {
    if !path.try_exists()? {
        return HostFile::create(path, Cache::Writeback);
    }
    let file = HostFile::open(path, Open { writable: true, cache: Cache::Writeback })?;
    if !file.is_device() {
        file.set_len(0)?;
    }
    Ok(file)
}

/// What is asked for, as far as it can be had; QEMU's rules, and its words where it has some.
fn qcow2_options(asked: &Qcow2Options) -> Result<CreateOptions> {
    check_preallocation(asked.preallocation)?;
    if asked.version == Version::V2 {
        return refuse("images of version 'v2' are not made: use 'v3'");
    }
    if asked.refcount_bits.is_some_and(|bits| bits != 16) {
        return refuse("'refcount-bits' can only be 16");
    }
    if !asked.size.is_multiple_of(512) {
        return refuse("Image size must be a multiple of 512 bytes");
    }
    let cluster_size = asked.cluster_size.unwrap_or(1 << CLUSTER_BITS);
    if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
        return refuse("Cluster size must be a power of two between 512 and 2048k");
    }
    let backing = match (&asked.backing_file, &asked.backing_fmt) {
        (Some(name), Some(format)) => Some((name.clone(), format.clone())),
        (None, None) => None,
        (Some(_), None) => return refuse("'backing-fmt' must be given with a backing file"),
        (None, Some(_)) => return refuse("Backing format cannot be used without backing file"),
    };
    Ok(CreateOptions {
        backing,
        compression: match asked.compression_type {
            CompressionType::Zlib => Compression::Deflate,
            CompressionType::Zstd => Compression::Zstd,
        },
        lazy_refcounts: asked.lazy_refcounts,
        ..CreateOptions::new(asked.size, cluster_size.trailing_zeros(), asked.extended_l2)
    })
}

fn check_preallocation(mode: Preallocation) -> Result<()> {
    match mode {
        Preallocation::Off => Ok(()),
        other => refuse(&format!("Unsupported preallocation mode '{}'", other.name())),
    }
}

fn refuse<T>(story: &str) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidInput, story))
}
