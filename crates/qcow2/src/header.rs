//! The header: what an image says of itself. Field names and offsets are those of QEMU's `docs/interop/qcow2.rst`.
//!
//! Reading checks all that the header alone can tell; [`header_update`](crate::header_update) changes it.

use block::{Error, ErrorKind, Result, Storage};

use crate::bytes::{be32, be64};
use crate::compressed::Compression;
use crate::entry::{Geometry, HostOffset};
use crate::extensions::{BACKING_FORMAT, DATA_FILE, ENCRYPTION, Extensions};
use crate::refcount_bits::RefcountWidth;

/// `QFI\xfb`.
const MAGIC: u32 = 0x5146_49fb;
/// The bytes of a version 2 header, and what every version has.
const V2_LENGTH: usize = 72;
/// The bytes of a version 3 header without optional fields; what Frazil writes.
pub(crate) const V3_LENGTH: usize = 104;

/// Incompatible: "refcounts may be inconsistent".
pub(crate) const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// Autoclear: "consistency for the bitmaps extension data".
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1;
/// "Lazy refcounts bit."
pub(crate) const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;
const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;

/// "Length of the backing file name in bytes. Must not be longer than 1023 bytes."
pub(crate) const MAX_BACKING_NAME: usize = 1023;
/// QEMU's own bound (`QCOW_MAX_L1_SIZE`): no image it opens has more.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// QEMU's own bound (`QCOW_MAX_REFTABLE_SIZE`).
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// QEMU's own bound (`QCOW_MAX_SNAPSHOTS`).
const MAX_SNAPSHOTS: u32 = 65536;

/// What an image says of itself, checked: sizes are bounded, tables are aligned and lie inside the file.
#[derive(Clone, Debug)]
pub struct Header {
    /// Bytes of the virtual disk.
    pub capacity: u64,
    /// Log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// Whether L2 entries have 32 subclusters each.
    pub extended_l2: bool,
    /// The backing file's name as it is written in the header: relative to the image's own folder, or absolute. The
    /// caller decides whether it may be opened.
    pub backing_file: Option<String>,
    /// The backing file's format as the header states it. Never probed: without it the caller has to say.
    pub backing_format: Option<String>,
    /// Whether the guest's clusters are in an external data file, which is raw.
    pub has_data_file: bool,
    /// That file's name as it is written in the header, if it is; the caller decides whether it may be opened.
    pub data_file: Option<String>,
    pub(crate) version: u32,
    pub(crate) l1: HostOffset,
    /// At least as many as the capacity needs.
    pub(crate) l1_entries: u32,
    pub(crate) refcount_table: HostOffset,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) refcount_order: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_at: HostOffset,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) compression: Compression,
    /// The fields behind the fixed ones, `compression_type` first: "preserving its value when rewriting the header".
    pub(crate) optional_fields: Vec<u8>,
    pub(crate) extensions: Extensions,
    /// Where the extensions end, and where the backing file's name is, in bytes of the first cluster.
    pub(crate) extensions_end: usize,
    pub(crate) name_at: usize,
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

impl Header {
    /// Reads and checks the header. Errors: [`ErrorKind::Corrupt`] for what contradicts the format,
    /// [`ErrorKind::Unsupported`] naming the feature that Frazil does not have.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        let file_len = storage.len()?;
        let mut fixed = [0; V3_LENGTH];
        let known = usize::try_from(file_len).unwrap_or(usize::MAX).min(V3_LENGTH);
        if known < V2_LENGTH {
            return Err(corrupt("not a qcow2 image: shorter than its header"));
        }
        storage.read_at(&mut fixed[..known], 0)?;
        let mut header = Self::decode(&fixed)?;
        header.check_cluster_size()?;
        let first = header.geometry().cluster_size().min(file_len);
        let mut cluster = vec![0; first as usize];
        storage.read_at(&mut cluster, 0)?;
        header.decode_rest(&fixed, &cluster)?;
        header.check_features()?;
        header.check_tables(file_len)?;
        Ok(header)
    }

    /// The header of an image without optional fields, extensions and tables.
    pub(crate) fn new(capacity: u64, cluster_bits: u32, extended_l2: bool) -> Self {
        Self {
            capacity,
            cluster_bits,
            extended_l2,
            backing_file: None,
            backing_format: None,
            has_data_file: false,
            data_file: None,
            version: 3,
            l1: HostOffset(0),
            l1_entries: 0,
            refcount_table: HostOffset(0),
            refcount_table_clusters: 0,
            refcount_order: 4,
            snapshots: 0,
            snapshots_at: HostOffset(0),
            incompatible: if extended_l2 { INCOMPATIBLE_EXTENDED_L2 } else { 0 },
            compatible: 0,
            autoclear: 0,
            compression: Compression::Deflate,
            optional_fields: Vec::new(),
            extensions: Extensions::default(),
            extensions_end: 0,
            name_at: 0,
        }
    }

    /// Says how compressed clusters are compressed, of an image that has none yet.
    pub(crate) fn compress_with(&mut self, compression: Compression) {
        self.compression = compression;
        if compression == Compression::Zstd {
            self.incompatible |= INCOMPATIBLE_COMPRESSION;
            self.optional_fields = vec![1, 0, 0, 0, 0, 0, 0, 0];
        }
    }

    fn decode(fixed: &[u8; V3_LENGTH]) -> Result<Self> {
        if be32(fixed, 0) != MAGIC {
            return Err(corrupt("not a qcow2 image: wrong magic number"));
        }
        let version = be32(fixed, 4);
        if !matches!(version, 2 | 3) {
            return Err(unsupported(format!("qcow2 version {version}")));
        }
        match be32(fixed, 32) {
            0 => {}
            1 => return Err(unsupported("qcow2 images encrypted with AES")),
            2 => return Err(unsupported("qcow2 images encrypted with LUKS")),
            other => return Err(unsupported(format!("qcow2 encryption method {other}"))),
        }
        let v3 = |value: u64| if version == 3 { value } else { 0 };
        let incompatible = v3(be64(fixed, 72));
        let extended_l2 = incompatible & INCOMPATIBLE_EXTENDED_L2 != 0;
        Ok(Self {
            version,
            l1: HostOffset(be64(fixed, 40)),
            l1_entries: be32(fixed, 36),
            refcount_table: HostOffset(be64(fixed, 48)),
            refcount_table_clusters: be32(fixed, 56),
            refcount_order: if version == 3 { be32(fixed, 96) } else { 4 },
            snapshots: be32(fixed, 60),
            snapshots_at: HostOffset(be64(fixed, 64)),
            incompatible,
            compatible: v3(be64(fixed, 80)),
            autoclear: v3(be64(fixed, 88)),
            has_data_file: incompatible & INCOMPATIBLE_DATA_FILE != 0,
            ..Self::new(be64(fixed, 24), be32(fixed, 20), extended_l2)
        })
    }

    fn check_cluster_size(&self) -> Result<()> {
        // "A subcluster must be at least 512 bytes", hence the larger minimum with 32 of them.
        let smallest = if self.extended_l2 { 14 } else { 9 };
        match (smallest..=21).contains(&self.cluster_bits) {
            true => Ok(()),
            false => Err(corrupt(format!("cluster_bits is {}", self.cluster_bits))),
        }
    }

    /// Decodes what lies behind the fixed part, all of it in the first cluster: optional fields, extensions and the
    /// backing file's name.
    fn decode_rest(&mut self, fixed: &[u8; V3_LENGTH], cluster: &[u8]) -> Result<()> {
        let length = if self.version == 3 { be32(fixed, 100) as usize } else { V2_LENGTH };
        if self.version == 3 {
            let optional = cluster.get(V3_LENGTH..length).filter(|_| length.is_multiple_of(8));
            self.optional_fields =
                optional.ok_or_else(|| corrupt(format!("header_length is {length}")))?.to_vec();
        }
        let (name_at, name_len) = (be64(fixed, 8), be32(fixed, 16) as usize);
        let mut area_end = cluster.len();
        if name_at != 0 && name_len != 0 {
            if name_len > MAX_BACKING_NAME {
                return Err(corrupt("the backing file's name is too long"));
            }
            let start = usize::try_from(name_at).unwrap_or(usize::MAX);
            let name = start.checked_add(name_len).and_then(|end| cluster.get(start..end));
            self.backing_file = Some(text(name, "the backing file's name")?);
            (area_end, self.name_at) = (start, start);
        }
        let area = cluster.get(length..area_end);
        let area = area.ok_or_else(|| corrupt("the backing file's name overlaps the header"))?;
        let (extensions, used) = Extensions::decode(area)?;
        (self.extensions, self.extensions_end) = (extensions, length + used);
        let string = |kind, what| self.extensions.get(kind).map(|body| text(Some(body), what)).transpose();
        let format = string(BACKING_FORMAT, "the backing file's format")?;
        let data_file = string(DATA_FILE, "the data file's name")?;
        self.backing_format = format.filter(|_| self.backing_file.is_some());
        self.data_file = data_file.filter(|_| self.has_data_file);
        Ok(())
    }

    fn check_features(&mut self) -> Result<()> {
        let known = INCOMPATIBLE_DIRTY
            | INCOMPATIBLE_CORRUPT
            | INCOMPATIBLE_DATA_FILE
            | INCOMPATIBLE_COMPRESSION
            | INCOMPATIBLE_EXTENDED_L2;
        let unknown = self.incompatible & !known;
        if unknown != 0 {
            let bit = unknown.trailing_zeros();
            let name = self.extensions.incompatible_name(bit).unwrap_or_else(|| "no name given".to_owned());
            return Err(unsupported(format!("qcow2 incompatible feature {bit} ({name})")));
        }
        let marked = self.incompatible & INCOMPATIBLE_COMPRESSION != 0;
        self.compression = match self.optional_fields.first().copied().unwrap_or(0) {
            0 if !marked => Compression::Deflate,
            1 if marked => Compression::Zstd,
            other if marked && other != 0 => {
                return Err(unsupported(format!("qcow2 compression type {other}")));
            }
            _ => return Err(corrupt("the compression type contradicts the incompatible features")),
        };
        if self.extensions.get(ENCRYPTION).is_some() {
            return Err(corrupt("an encryption header without encryption"));
        }
        if self.has_data_file && self.snapshots != 0 {
            return Err(unsupported("internal snapshots with an external data file"));
        }
        // "This bit ... conflicts with backing files."
        if self.data_file_is_raw() && self.backing_file.is_some() {
            return Err(corrupt("a data file that is a raw image of its own, and a backing file"));
        }
        Ok(())
    }

    fn check_tables(&self, file_len: u64) -> Result<()> {
        if self.refcount_order > 6 {
            return Err(corrupt(format!("refcount_order is {}", self.refcount_order)));
        }
        if i64::try_from(self.capacity).is_err() {
            return Err(corrupt("the virtual size is not a file size"));
        }
        let geometry = self.geometry();
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if u64::from(self.l1_entries) < geometry.tables() || l1_bytes > MAX_L1_BYTES {
            return Err(corrupt("the L1 table's size does not fit the virtual size"));
        }
        let inside = |at: HostOffset, bytes: u64| {
            geometry.is_aligned(at.0) && at.0.checked_add(bytes).is_some_and(|end| end <= file_len)
        };
        if self.l1_entries > 0 && (self.l1.0 == 0 || !inside(self.l1, l1_bytes)) {
            return Err(corrupt("the L1 table is not aligned or not inside the file"));
        }
        let refcount_table_bytes = u64::from(self.refcount_table_clusters) * geometry.cluster_size();
        if refcount_table_bytes > MAX_REFCOUNT_TABLE_BYTES || !inside(self.refcount_table, 0) {
            return Err(corrupt("the refcount table is too large or not aligned"));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(corrupt(format!("{} internal snapshots", self.snapshots)));
        }
        if self.snapshots > 0 && (self.snapshots_at.0 == 0 || !inside(self.snapshots_at, 0)) {
            return Err(corrupt("the snapshot table is not aligned or not inside the file"));
        }
        Ok(())
    }

    /// Whether anybody may write this image: an image that says of itself that it is broken is left alone.
    pub(crate) fn check_intact(&self) -> Result<()> {
        if self.incompatible & INCOMPATIBLE_CORRUPT != 0 {
            return Err(corrupt("the image is marked corrupt: run `qemu-img check -r all` on it first"));
        }
        if self.refcount_table_clusters == 0 {
            return Err(corrupt("the image has no refcount table"));
        }
        Ok(())
    }

    /// Whether its refcounts may be stale, because a writer that counts lazily did not close it.
    pub(crate) fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DIRTY != 0
    }

    /// Whether the external data file is also a raw image of its own, so that zeroes must be written to it too.
    pub(crate) fn data_file_is_raw(&self) -> bool {
        self.has_data_file && self.autoclear & AUTOCLEAR_RAW_DATA != 0
    }

    /// The autoclear bits that may stay set in an image that is written: those that Frazil knows, and keeps true.
    pub(crate) fn kept_autoclear(&self) -> u64 {
        let raw = if self.has_data_file { AUTOCLEAR_RAW_DATA } else { 0 };
        self.autoclear & (AUTOCLEAR_BITMAPS | raw)
    }

    pub(crate) fn refcount_width(&self) -> RefcountWidth {
        RefcountWidth::new(self.refcount_order)
    }

    pub(crate) fn geometry(&self) -> Geometry {
        Geometry::new(self.capacity, self.cluster_bits, self.extended_l2)
    }

    /// The first bytes of the image: header, extensions, and the backing file's name right behind them.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; if self.version == 3 { V3_LENGTH } else { V2_LENGTH }];
        let mut put32 = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        put32(0, MAGIC);
        put32(4, self.version);
        put32(20, self.cluster_bits);
        put32(36, self.l1_entries);
        put32(56, self.refcount_table_clusters);
        put32(60, self.snapshots);
        if self.version == 3 {
            put32(96, self.refcount_order);
            put32(100, (V3_LENGTH + self.optional_fields.len()) as u32);
        }
        let mut put64 = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        put64(24, self.capacity);
        put64(40, self.l1.0);
        put64(48, self.refcount_table.0);
        put64(64, self.snapshots_at.0);
        if self.version == 3 {
            put64(72, self.incompatible);
            put64(80, self.compatible);
            put64(88, self.autoclear);
            bytes.extend(&self.optional_fields);
        }
        self.extensions.encode(&mut bytes);
        if let Some(name) = &self.backing_file {
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            bytes.extend(name.as_bytes());
        }
        bytes
    }
}

fn text(bytes: Option<&[u8]>, what: &str) -> Result<String> {
    let bytes = bytes.ok_or_else(|| corrupt(format!("{what} is not inside the first cluster")))?;
    let text = std::str::from_utf8(bytes).map_err(|_| unsupported(format!("{what} is not UTF-8")))?;
    if text.contains('\0') {
        return Err(corrupt(format!("{what} holds a zero byte")));
    }
    Ok(text.to_owned())
}
