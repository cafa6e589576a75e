//! The header: what an image says of itself. Field names and offsets are those of QEMU's `docs/interop/qcow2.rst`.

use block::{Error, ErrorKind, Result, Storage};

use crate::bytes::{be32, be64};
use crate::entry::{Geometry, HostOffset};

/// `QFI\xfb`.
const MAGIC: u32 = 0x5146_49fb;
/// The bytes of a version 2 header, and what every version has.
const V2_LENGTH: usize = 72;
/// The bytes of a version 3 header without optional fields; what Frazil writes.
pub(crate) const V3_LENGTH: usize = 104;
/// Where `autoclear_features` is.
pub(crate) const AUTOCLEAR_OFFSET: u64 = 88;

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// "Length of the backing file name in bytes. Must not be longer than 1023 bytes."
const MAX_BACKING_NAME: u32 = 1023;
/// QEMU's own bound (`QCOW_MAX_L1_SIZE`): no image it opens has more.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// QEMU's own bound (`QCOW_MAX_REFTABLE_SIZE`).
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

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
    pub(crate) version: u32,
    pub(crate) l1: HostOffset,
    pub(crate) l1_entries: u32,
    pub(crate) refcount_table: HostOffset,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) refcount_order: u32,
    pub(crate) snapshots: u32,
    pub(crate) incompatible: u64,
    pub(crate) autoclear: u64,
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
        let header = Self::decode(&fixed)?;
        header.check_features()?;
        header.check_tables(file_len)?;
        header.with_names(storage, &fixed, file_len)
    }

    fn decode(fixed: &[u8; V3_LENGTH]) -> Result<Self> {
        if be32(fixed, 0) != MAGIC {
            return Err(corrupt("not a qcow2 image: wrong magic number"));
        }
        let version = be32(fixed, 4);
        if !matches!(version, 2 | 3) {
            return Err(unsupported(format!("qcow2 version {version}")));
        }
        if be32(fixed, 32) != 0 {
            return Err(unsupported("encrypted qcow2 images"));
        }
        let v3 = |value: u64| if version == 3 { value } else { 0 };
        let incompatible = v3(be64(fixed, 72));
        Ok(Self {
            capacity: be64(fixed, 24),
            cluster_bits: be32(fixed, 20),
            extended_l2: incompatible & INCOMPATIBLE_EXTENDED_L2 != 0,
            backing_file: None,
            backing_format: None,
            version,
            l1: HostOffset(be64(fixed, 40)),
            l1_entries: be32(fixed, 36),
            refcount_table: HostOffset(be64(fixed, 48)),
            refcount_table_clusters: be32(fixed, 56),
            refcount_order: if version == 3 { be32(fixed, 96) } else { 4 },
            snapshots: be32(fixed, 60),
            incompatible,
            autoclear: v3(be64(fixed, 88)),
        })
    }

    fn check_features(&self) -> Result<()> {
        if self.incompatible & INCOMPATIBLE_DATA_FILE != 0 {
            return Err(unsupported("qcow2 images with an external data file"));
        }
        let known =
            INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT | INCOMPATIBLE_COMPRESSION | INCOMPATIBLE_EXTENDED_L2;
        match self.incompatible & !known {
            0 => Ok(()),
            bits => Err(unsupported(format!("qcow2 incompatible features {bits:#x}"))),
        }
    }

    fn check_tables(&self, file_len: u64) -> Result<()> {
        // "A subcluster must be at least 512 bytes", hence the larger minimum with 32 of them.
        let smallest = if self.extended_l2 { 14 } else { 9 };
        if !(smallest..=21).contains(&self.cluster_bits) {
            return Err(corrupt(format!("cluster_bits is {}", self.cluster_bits)));
        }
        if self.refcount_order > 6 {
            return Err(corrupt(format!("refcount_order is {}", self.refcount_order)));
        }
        if i64::try_from(self.capacity).is_err() {
            return Err(corrupt("the virtual size is not a file size"));
        }
        let geometry = self.geometry();
        if u64::from(self.l1_entries) < geometry.tables() || geometry.tables() * 8 > MAX_L1_BYTES {
            return Err(corrupt("the L1 table's size does not fit the virtual size"));
        }
        let inside = |at: HostOffset, bytes: u64| {
            geometry.is_aligned(at.0) && at.0.checked_add(bytes).is_some_and(|end| end <= file_len)
        };
        if geometry.tables() > 0 && (self.l1.0 == 0 || !inside(self.l1, geometry.tables() * 8)) {
            return Err(corrupt("the L1 table is not aligned or not inside the file"));
        }
        let refcount_table_bytes = u64::from(self.refcount_table_clusters) * geometry.cluster_size();
        if refcount_table_bytes > MAX_REFCOUNT_TABLE_BYTES || !inside(self.refcount_table, 0) {
            return Err(corrupt("the refcount table is too large or not aligned"));
        }
        Ok(())
    }

    /// Reads what lies behind the fixed part, all of it in the first cluster: extensions and the backing file's name.
    fn with_names(mut self, storage: &dyn Storage, fixed: &[u8; V3_LENGTH], file_len: u64) -> Result<Self> {
        let first = self.geometry().cluster_size().min(file_len);
        let mut cluster = vec![0; first as usize];
        storage.read_at(&mut cluster, 0)?;
        let length = if self.version == 3 { be32(fixed, 100) as usize } else { V2_LENGTH };
        if self.version == 3 && (length < V3_LENGTH || !length.is_multiple_of(8)) {
            return Err(corrupt(format!("header_length is {length}")));
        }
        let (name_at, name_len) = (be64(fixed, 8), be32(fixed, 16));
        let mut extensions_end = cluster.len();
        if name_at != 0 && name_len != 0 {
            if name_len > MAX_BACKING_NAME {
                return Err(corrupt("the backing file's name is too long"));
            }
            let start = usize::try_from(name_at).unwrap_or(usize::MAX);
            let name = start.checked_add(name_len as usize).and_then(|end| cluster.get(start..end));
            self.backing_file = Some(text(name, "the backing file's name")?);
            extensions_end = start;
        }
        self.read_extensions(cluster.get(length..extensions_end).unwrap_or(&[]))?;
        Ok(self)
    }

    fn read_extensions(&mut self, mut rest: &[u8]) -> Result<()> {
        while let Some((head, after)) = rest.split_at_checked(8) {
            let (kind, len) = (be32(head, 0), be32(head, 4) as usize);
            if kind == EXTENSION_END {
                break;
            }
            let body = after.get(..len).ok_or_else(|| corrupt("a header extension is cut off"))?;
            if kind == EXTENSION_BACKING_FORMAT {
                self.backing_format = Some(text(Some(body), "the backing file's format")?);
            }
            rest = after.get(len.next_multiple_of(8)..).unwrap_or(&[]);
        }
        Ok(())
    }

    /// Whether Frazil can write this image; the error says why not, and what to do.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.incompatible & INCOMPATIBLE_CORRUPT != 0 {
            return Err(corrupt("the image is marked corrupt: run `qemu-img check -r all` on it first"));
        }
        if self.incompatible & INCOMPATIBLE_DIRTY != 0 {
            let remedy =
                "its refcounts are stale (lazy refcounts, not closed cleanly): run `qemu-img check -r all`";
            return Err(unsupported(format!("writing an image marked dirty; {remedy} on it first")));
        }
        if self.version != 3 {
            return Err(unsupported(
                "writing version 2 images: run `qemu-img amend -o compat=v3` on it first",
            ));
        }
        if self.snapshots != 0 {
            return Err(unsupported("writing images with internal snapshots"));
        }
        if self.refcount_order != 4 {
            return Err(unsupported(format!(
                "writing images with {}-bit refcounts",
                1 << self.refcount_order
            )));
        }
        Ok(())
    }

    pub(crate) fn geometry(&self) -> Geometry {
        Geometry::new(self.capacity, self.cluster_bits, self.extended_l2)
    }

    /// The first bytes of the image: header, extensions, and the backing file's name.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; V3_LENGTH];
        let mut put32 = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        put32(0, MAGIC);
        put32(4, self.version);
        put32(20, self.cluster_bits);
        put32(36, self.l1_entries);
        put32(56, self.refcount_table_clusters);
        put32(96, self.refcount_order);
        put32(100, V3_LENGTH as u32);
        let mut put64 = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        put64(24, self.capacity);
        put64(40, self.l1.0);
        put64(48, self.refcount_table.0);
        put64(72, if self.extended_l2 { INCOMPATIBLE_EXTENDED_L2 } else { 0 });
        if let Some(format) = &self.backing_format {
            bytes.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
            bytes.extend((format.len() as u32).to_be_bytes());
            bytes.extend(format.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
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
