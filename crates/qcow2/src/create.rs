//! Creating an empty image.

use block::{Context, Error, ErrorKind, Result, Storage};

use crate::compressed::Compression;
use crate::entry::HostOffset;
use crate::extensions::BACKING_FORMAT;
use crate::header::{COMPATIBLE_LAZY_REFCOUNTS, Header, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use crate::header_update::check_backing;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes of the virtual disk.
    pub capacity: u64,
    /// Log2 of the cluster size in bytes: 9 to 21, with subclusters 14 to 21.
    pub cluster_bits: u32,
    /// Whether L2 entries have 32 subclusters each.
    pub extended_l2: bool,
    /// The backing file's name as the header is to have it, and its format (`raw` or `qcow2`).
    pub backing: Option<(String, String)>,
    /// How clusters that are compressed are.
    pub compression: Compression,
    /// Whether whoever writes it may count clusters late; Frazil does not.
    pub lazy_refcounts: bool,
}

impl CreateOptions {
    /// An overlay as Frazil makes them: 128 KiB clusters of 32 subclusters, so that a write of 4 KiB copies nothing.
    pub fn overlay(capacity: u64, backing: Option<(String, String)>) -> Self {
        Self { backing, ..Self::new(capacity, 17, true) }
    }

    /// An image with nothing beneath.
    pub fn new(capacity: u64, cluster_bits: u32, extended_l2: bool) -> Self {
        let (backing, compression) = (None, Compression::Deflate);
        Self { capacity, cluster_bits, extended_l2, backing, compression, lazy_refcounts: false }
    }
}

/// Writes a complete, valid, empty image into `storage`, which is empty, and syncs it. (That its *name* is durable is
/// for who created the file.)
///
/// The refcount table is made large enough for the disk's whole capacity written once, and as much again, so it never
/// has to grow.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    check(options)?;
    if !storage.is_empty()? {
        return Err(Error::new(ErrorKind::InvalidInput, "the file for a new image is not empty"));
    }
    let (header, metadata_clusters) = lay_out(options)?;
    let size = header.geometry().cluster_size();
    let block = header.refcount_table.0 + u64::from(header.refcount_table_clusters) * size;
    let write = || {
        storage.set_len(metadata_clusters * size)?;
        let blocks = (header.l1.0 - block) / size;
        let entries: Vec<u8> = (0..blocks).flat_map(|n| (block + n * size).to_be_bytes()).collect();
        storage.write_at(&entries, header.refcount_table.0)?;
        storage.write_at(&1_u16.to_be_bytes().repeat(metadata_clusters as usize), block)?;
        storage.write_at(&header.encode(), 0)?;
        storage.sync()
    };
    write().context(|| "write a new image")
}

fn check(options: &CreateOptions) -> Result<()> {
    let smallest = if options.extended_l2 { 14 } else { 9 };
    if !(smallest..=21).contains(&options.cluster_bits) {
        return Err(invalid(format!("the cluster size is not between {} B and 2 MiB", 1 << smallest)));
    }
    options.backing.as_ref().map_or(Ok(()), |(name, format)| check_backing(name, format))
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, what)
}

/// The header of the new image, and the clusters that its tables take: header, refcount table, refcount blocks, L1.
fn lay_out(options: &CreateOptions) -> Result<(Header, u64)> {
    let mut header = Header::new(options.capacity, options.cluster_bits, options.extended_l2);
    header.compress_with(options.compression);
    if options.lazy_refcounts {
        header.compatible |= COMPATIBLE_LAZY_REFCOUNTS;
    }
    if let Some((name, format)) = &options.backing {
        header.backing_file = Some(name.clone());
        header.extensions = header.extensions.with(BACKING_FORMAT, Some(format.as_bytes()));
    }
    let geometry = header.geometry();
    let (size, per_block) = (geometry.cluster_size(), geometry.refcounts_per_block());
    let l1_bytes = geometry.tables() * 8;
    let l1_clusters = l1_bytes.div_ceil(size).max(1);
    let in_use = geometry.clusters() + geometry.tables() + l1_clusters + 1;
    let blocks = (2 * in_use).div_ceil(per_block - 1) + 1;
    let table_clusters = (blocks * 8).div_ceil(size);
    let too_large = options.capacity > i64::MAX as u64 || l1_bytes > MAX_L1_BYTES;
    if too_large || table_clusters * size > MAX_REFCOUNT_TABLE_BYTES {
        return Err(invalid("the disk is too large for this cluster size"));
    }
    if header.encode().len() as u64 > size {
        return Err(invalid("the backing file's name does not fit this cluster size"));
    }
    let fixed = 1 + table_clusters + l1_clusters;
    let first_blocks = fixed.div_ceil(per_block - 1);
    header.refcount_table = HostOffset(size);
    header.refcount_table_clusters = table_clusters as u32;
    header.l1 = HostOffset((1 + table_clusters + first_blocks) * size);
    header.l1_entries = geometry.tables() as u32;
    Ok((header, fixed + first_blocks))
}
