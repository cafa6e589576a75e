//! The disks in the words of QEMU's `query-block` and `query-named-block-nodes` (`qapi/block-core.json`).
//!
//! A disk is shown as one node that bears its id, whatever layers it is made of: to a client that knows QEMU's block layer it
//! is what a disk without snapshots is there, and stays the same when layers come and go. The layers are nodes of their own,
//! and so is what clients have added. Members that QEMU declares optional and Frazil has nothing to say about are left
//! out; throttling, which Frazil has not, is shown as off.

use backup::{Backups, NodeInfo};
use block::{Error, ErrorKind, IoStatus, Result, WriteErrors};
use hostio::Cache;
use serde::Serialize;
use snapshot::{BitmapInfo, DiskStatus, ImageFormat};

/// QEMU's `BlockInfo`: a disk as a guest sees it.
#[derive(Debug, Serialize)]
pub(crate) struct BlockInfo {
    device: String,
    /// Where it stands in QEMU's tree of objects.
    qdev: String,
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
    drv: &'static str,
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
    #[serde(rename = "dirty-bitmaps", skip_serializing_if = "Vec::is_empty")]
    dirty_bitmaps: Vec<BitmapInfo>,
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
    format: &'static str,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<&'static str>,
}

/// A disk and its bitmaps.
pub(crate) fn block_info(disk: &DiskStatus, bitmaps: Vec<BitmapInfo>) -> BlockInfo {
    BlockInfo {
        device: disk.id.clone(),
        qdev: Backups::qdev(&disk.id),
        // For compatibility; QEMU says the same of every disk.
        r#type: "unknown",
        removable: false,
        locked: false,
        inserted: whole(disk, bitmaps),
        // As in QEMU: absent where no error can make requests wait.
        io_status: (disk.write_errors != WriteErrors::Report).then_some(disk.io_status),
    }
}

/// All layers of a disk, the active one first.
pub(crate) fn nodes(disk: &DiskStatus) -> impl Iterator<Item = BlockDeviceInfo> {
    (0..disk.layers.len()).rev().filter_map(|depth| node(disk, depth))
}

/// A disk as one node. Its file is that of the active layer, for clients have a look at it.
pub(crate) fn whole(disk: &DiskStatus, dirty_bitmaps: Vec<BitmapInfo>) -> Option<BlockDeviceInfo> {
    let mut whole = node(disk, disk.layers.len().checked_sub(1)?)?;
    (whole.node_name, whole.dirty_bitmaps) = (disk.id.clone(), dirty_bitmaps);
    (whole.backing_file, whole.backing_file_depth) = (None, 0);
    (whole.image.backing_filename, whole.image.backing_filename_format) = (None, None);
    Some(whole)
}

/// A node that a client has added.
pub(crate) fn added(node: NodeInfo) -> BlockDeviceInfo {
    let filename = node.filename.to_string_lossy().into_owned();
    let image = ImageInfo {
        filename: filename.clone(),
        format: node.driver,
        virtual_size: node.virtual_size,
        actual_size: None,
        backing_filename: None,
        backing_filename_format: None,
    };
    let info = device_info(filename, node.node_name, node.read_only, image, false);
    BlockDeviceInfo { dirty_bitmaps: node.dirty_bitmaps, ..info }
}

/// The disk that the node of this name is, or whose active layer: all else can not be resized.
pub(crate) fn device_of(disks: &[DiskStatus], node: &str) -> Result<String> {
    if disks.iter().any(|disk| disk.id == node) {
        return Ok(node.to_owned());
    }
    let names = |disk: &&DiskStatus| nodes(disk).any(|found| found.node_name == node);
    let missing = || Error::new(ErrorKind::NotFound, format!("Cannot find device='' nor node-name='{node}'"));
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
    let image = ImageInfo {
        filename: filename.clone(),
        format: format(layer.format),
        virtual_size: layer.virtual_size,
        actual_size: layer.actual_size,
        backing_filename: backing_file.clone(),
        backing_filename_format: backing.map(|backing| format(backing.format)),
    };
    let read_only = disk.read_only || depth + 1 < disk.layers.len();
    let direct = disk.cache == Cache::None;
    let info = device_info(filename, layer.node_name.clone(), read_only, image, direct);
    Some(BlockDeviceInfo { backing_file, backing_file_depth: depth, ..info })
}

/// A node with nothing beneath it.
fn device_info(file: String, node_name: String, ro: bool, image: ImageInfo, direct: bool) -> BlockDeviceInfo {
    BlockDeviceInfo {
        file,
        node_name,
        ro,
        drv: image.format,
        backing_file: None,
        backing_file_depth: 0,
        active: true,
        encrypted: false,
        detect_zeroes: "off",
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        image,
        cache: BlockdevCacheInfo { writeback: true, direct, no_flush: false },
        write_threshold: 0,
        dirty_bitmaps: Vec::new(),
    }
}

fn format(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
    }
}
