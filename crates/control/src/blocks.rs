//! The disks in the words of QEMU's `query-block` and `query-named-block-nodes` (`qapi/block-core.json`).
//!
//! Each layer of a chain is a node. Members that QEMU declares optional and Frazil has nothing to say about are left
//! out; throttling, which Frazil has not, is shown as off.

use block::{Error, ErrorKind, IoStatus, Result, WriteErrors};
use hostio::Cache;
use serde::Serialize;
use snapshot::{DiskStatus, ImageFormat};

/// QEMU's `BlockInfo`: a disk as a guest sees it.
#[derive(Debug, Serialize)]
pub(crate) struct BlockInfo {
    device: String,
    r#type: &'static str,
    removable: bool,
    locked: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    inserted: Option<BlockDeviceInfo>,
    #[serde(rename = "io-status", skip_serializing_if = "Option::is_none")]
    io_status: Option<IoStatus>,
}

/// QEMU's `BlockDeviceInfo`: a node.
#[derive(Debug, Serialize)]
pub(crate) struct BlockDeviceInfo {
    file: String,
    #[serde(rename = "node-name")]
    node_name: String,
    ro: bool,
    drv: ImageFormat,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_file: Option<String>,
    backing_file_depth: usize,
    active: bool,
    encrypted: bool,
    detect_zeroes: &'static str,
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
    image: ImageInfo,
    cache: BlockdevCacheInfo,
    write_threshold: u64,
}

/// QEMU's `BlockdevCacheInfo`: flushes are needed, and heeded.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct BlockdevCacheInfo {
    writeback: bool,
    direct: bool,
    no_flush: bool,
}

/// QEMU's `ImageInfo`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    filename: String,
    format: ImageFormat,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<ImageFormat>,
}

/// A disk with its active layer.
pub(crate) fn block_info(disk: &DiskStatus) -> BlockInfo {
    let top = disk.layers.len().checked_sub(1);
    BlockInfo {
        device: disk.id.clone(),
        // For compatibility; QEMU says the same of every disk.
        r#type: "unknown",
        removable: false,
        locked: false,
        inserted: top.and_then(|top| node(disk, top)),
        // As in QEMU: absent where no error can make requests wait.
        io_status: (disk.write_errors != WriteErrors::Report).then_some(disk.io_status),
    }
}

/// All layers of a disk, the active one first.
pub(crate) fn nodes(disk: &DiskStatus) -> impl Iterator<Item = BlockDeviceInfo> {
    (0..disk.layers.len()).rev().filter_map(|depth| node(disk, depth))
}

/// The disk whose active layer is the node of this name: the only one that may be resized.
pub(crate) fn device_of(disks: &[DiskStatus], node: &str) -> Result<String> {
    let names = |disk: &&DiskStatus| nodes(disk).any(|found| found.node_name == node);
    let missing = || Error::new(ErrorKind::NotFound, format!("there is no node '{node}'"));
    let disk = disks.iter().find(names).ok_or_else(missing)?;
    match nodes(disk).next().is_some_and(|active| active.node_name == node) {
        true => Ok(disk.id.clone()),
        false => {
            Err(Error::new(ErrorKind::ReadOnly, format!("node '{node}' is not the active layer of its disk")))
        }
    }
}

/// The layer that has `depth` others beneath it.
fn node(disk: &DiskStatus, depth: usize) -> Option<BlockDeviceInfo> {
    let layer = disk.layers.get(depth)?;
    let filename = layer.path.to_string_lossy().into_owned();
    let backing = depth.checked_sub(1).and_then(|below| disk.layers.get(below));
    let backing_file = backing.map(|backing| backing.path.to_string_lossy().into_owned());
    Some(BlockDeviceInfo {
        file: filename.clone(),
        node_name: layer.node_name.clone(),
        ro: disk.read_only || depth + 1 < disk.layers.len(),
        drv: layer.format,
        backing_file: backing_file.clone(),
        backing_file_depth: depth,
        active: true,
        encrypted: false,
        detect_zeroes: "off",
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        image: ImageInfo {
            filename,
            format: layer.format,
            virtual_size: layer.virtual_size,
            actual_size: layer.actual_size,
            backing_filename: backing_file,
            backing_filename_format: backing.map(|backing| backing.format),
        },
        cache: BlockdevCacheInfo { writeback: true, direct: disk.cache == Cache::None, no_flush: false },
        write_threshold: 0,
    })
}
