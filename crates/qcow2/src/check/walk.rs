//! All that an image names: each cluster of the file that the header, a table or a bitmap points to.

use std::collections::BTreeMap;

use block::{Context, Error, ErrorKind, Result, Storage};

use super::Report;
use crate::bitmaps::{Directory, TableEntry};
use crate::bytes::be64;
use crate::compressed::Packed;
use crate::entry::{Geometry, HostOffset};
use crate::header::Header;
use crate::refcount_bits::RefcountWidth;
use crate::snapshots::{SnapshotL1, Snapshots};

/// "Bit 9 - 55" of an L1 or a standard L2 entry: the offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// In standard L2 entries since version 3: the cluster reads as zeroes.
const ALL_ZEROES: u64 = 1;
/// L2 tables of all snapshots together. Twice what the largest L1 table can name.
const MAX_L2_TABLES: usize = 8 << 20;
/// Entries of an L1 or a bitmap's table that are read at a time.
const BATCH: u64 = 8192;

/// What kind of thing names a cluster, as far as it may be named by others too.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// A table of the image: it shares its clusters with nothing.
    Owned,
    /// An L2 table: those of snapshots may be shared with each other and with the disk.
    L2,
    /// A guest's data or a bitmap's.
    Data,
}

/// One thing that an image names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reference {
    pub(super) kind: Kind,
    /// Bytes of the file.
    pub(super) at: u64,
    pub(super) len: u64,
    /// By how many tables.
    pub(super) times: u32,
    /// What the active table says of its being named once; others need not tell the truth.
    pub(super) copied: Option<bool>,
}

impl Reference {
    fn owned(at: u64, len: u64) -> Self {
        Self { kind: Kind::Owned, at, len, times: 1, copied: None }
    }
}

/// An L2 table, by the L1 tables that name it.
#[derive(Debug)]
struct L2Table {
    times: u32,
    /// The last L1 table that named it: each may do so once.
    last: usize,
    copied: Option<bool>,
}

/// An image's tables of the upper levels, read once.
pub(super) struct Walk<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    geometry: Geometry,
    file_len: u64,
    /// Tables that share their clusters with nothing.
    owned: Vec<Reference>,
    refcount_table: Vec<u64>,
    l2: BTreeMap<u64, L2Table>,
    bitmaps: Option<Directory>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(storage: &'a dyn Storage, header: &'a Header, report: &mut Report) -> Result<Self> {
        let geometry = header.geometry();
        let snapshots = Snapshots::read(storage, header)?;
        let bitmaps = Directory::read(storage, header)?;
        let table_bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
        let mut owned = vec![
            Reference::owned(0, 1),
            Reference::owned(header.refcount_table.0, table_bytes),
            Reference::owned(header.l1.0, u64::from(header.l1_entries) * 8),
            Reference::owned(snapshots.at.0, snapshots.len),
        ];
        owned.extend(snapshots.tables.iter().map(|l1| Reference::owned(l1.at.0, u64::from(l1.entries) * 8)));
        if let Some(directory) = &bitmaps {
            owned.push(Reference::owned(directory.at.0, directory.len));
            let tables = directory.entries.iter();
            owned.extend(tables.map(|bitmap| Reference::owned(bitmap.table.0, bitmap.table_bytes())));
        }
        owned.retain(|reference| reference.len > 0);
        let file_len = storage.len()?;
        let (refcount_table, l2) = (Vec::new(), BTreeMap::new());
        let mut walk = Self { storage, header, geometry, file_len, owned, refcount_table, l2, bitmaps };
        walk.read_refcount_table(report).context(|| "read the refcount table")?;
        let active = SnapshotL1 { at: header.l1, entries: header.l1_entries };
        for (number, l1) in [active].iter().chain(&snapshots.tables).enumerate() {
            walk.read_l1(number, *l1, report).context(|| "read an L1 table")?;
        }
        Ok(walk)
    }

    pub(super) fn cluster_bits(&self) -> u32 {
        self.geometry.cluster_bits
    }

    pub(super) fn width(&self) -> RefcountWidth {
        self.header.refcount_width()
    }

    /// Refcounts in one block.
    pub(super) fn per_block(&self) -> u64 {
        self.width().per_block(self.geometry.cluster_size())
    }

    /// The end of the file's last cluster.
    pub(super) fn file_end(&self) -> u64 {
        self.file_len.next_multiple_of(self.geometry.cluster_size())
    }

    /// Refcount blocks that there are: their index and their place.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (u64, HostOffset)> {
        let numbered = (0..).zip(&self.refcount_table);
        numbered.filter(|(_, at)| **at != 0).map(|(index, at)| (index, HostOffset(*at)))
    }

    /// The bytes of the cluster at `at`; zeroes where the file ends before.
    pub(super) fn read_block(&self, at: HostOffset) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.geometry.cluster_size() as usize];
        let there = self.file_len.saturating_sub(at.0).min(bytes.len() as u64);
        self.storage.read_at(&mut bytes[..there as usize], at.0)?;
        Ok(bytes)
    }

    fn is_cluster(&self, at: u64) -> bool {
        self.geometry.is_aligned(at) && at < self.file_end()
    }

    fn read_refcount_table(&mut self, report: &mut Report) -> Result<()> {
        let size = self.geometry.cluster_size();
        for index in 0..u64::from(self.header.refcount_table_clusters) {
            let bytes =
                self.read_block(HostOffset(self.header.refcount_table.0.saturating_add(index * size)))?;
            for entry in bytes.chunks_exact(8) {
                let at = be64(entry, 0);
                let good = self.is_cluster(at);
                if !good {
                    report.add_broken(|| format!("a refcount table entry points to no block: {at:#x}"));
                } else if at != 0 {
                    self.owned.push(Reference::owned(at, size));
                }
                self.refcount_table.push(if good { at } else { 0 });
            }
        }
        Ok(())
    }

    fn read_l1(&mut self, number: usize, l1: SnapshotL1, report: &mut Report) -> Result<()> {
        let entries = u64::from(l1.entries);
        for from in (0..entries).step_by(BATCH as usize) {
            let mut bytes = vec![0; ((entries - from).min(BATCH) * 8) as usize];
            self.storage.read_at(&mut bytes, l1.at.0 + from * 8)?;
            for word in bytes.chunks_exact(8).map(|entry| be64(entry, 0)).filter(|word| *word != 0) {
                self.add_l2(number, word, report)?;
            }
        }
        Ok(())
    }

    fn add_l2(&mut self, number: usize, word: u64, report: &mut Report) -> Result<()> {
        let at = word & OFFSET;
        if word & !(OFFSET | COPIED) != 0 || at == 0 || !self.is_cluster(at) {
            report.add_broken(|| format!("an L1 entry points to no L2 table: {word:#x}"));
            return Ok(());
        }
        let room = self.l2.len() < MAX_L2_TABLES;
        let copied = (number == 0).then_some(word & COPIED != 0);
        match self.l2.get_mut(&at) {
            None if room => _ = self.l2.insert(at, L2Table { times: 1, last: number, copied }),
            None => return Err(Error::new(ErrorKind::Unsupported, "checking so many L2 tables")),
            Some(table) if table.last == number => {
                report.add_broken(|| format!("an L1 table names the L2 table at {at:#x} twice"));
            }
            Some(table) => (table.times, table.last) = (table.times.saturating_add(1), number),
        }
        Ok(())
    }

    /// Shows `visit` all that the image names; what makes no sense goes to `report` instead.
    pub(super) fn run(&self, report: &mut Report, visit: &mut dyn FnMut(Reference)) -> Result<()> {
        self.owned.iter().for_each(|reference| visit(*reference));
        let size = self.geometry.cluster_size();
        for (&at, table) in &self.l2 {
            visit(Reference { kind: Kind::L2, at, len: size, times: table.times, copied: table.copied });
            let bytes = self.read_block(HostOffset(at)).context(|| "read an L2 table")?;
            for entry in bytes.chunks_exact(self.geometry.entry_size() as usize) {
                match self.decode_l2(entry) {
                    Ok(None) => {}
                    Ok(Some(found)) => {
                        let copied = found.copied.filter(|_| table.copied.is_some());
                        visit(Reference { times: table.times, copied, ..found });
                    }
                    Err(what) => report.add_broken(|| format!("an entry of the L2 table at {at:#x} {what}")),
                }
            }
        }
        self.run_bitmaps(visit)
    }

    /// What an L2 entry names in this file.
    fn decode_l2(&self, entry: &[u8]) -> std::result::Result<Option<Reference>, &'static str> {
        let extended = self.geometry.extended;
        let (word, bitmap) = (be64(entry, 0), if extended { be64(entry, 8) } else { 0 });
        if word & COMPRESSED != 0 {
            let packed = Packed::decode(self.geometry, word).map_err(|_| "makes no sense")?;
            if self.header.has_data_file {
                return Err("is compressed, though there is a data file");
            }
            // The last sector may be cut short by the end of the file.
            return match packed.offset != 0 && packed.offset + packed.len <= self.file_end() {
                true => Ok(Some(Reference { copied: None, ..self.data(packed.offset, packed.len, false) })),
                false => Err("points past the end of the file"),
            };
        }
        let flags = if extended || self.header.version == 2 { 0 } else { ALL_ZEROES };
        let (at, allocated, zero) = (word & OFFSET, bitmap as u32, (bitmap >> 32) as u32);
        if word & !(OFFSET | COPIED | flags) != 0 || allocated & zero != 0 {
            return Err("makes no sense");
        }
        if self.header.has_data_file {
            return Ok(None);
        }
        match at {
            0 if allocated == 0 && word & COPIED == 0 => Ok(None),
            0 => Err("says that there is data, and not where"),
            _ if !self.is_cluster(at) => Err("points past the end of the file, or not to a cluster"),
            _ => Ok(Some(self.data(at, self.geometry.cluster_size(), word & COPIED != 0))),
        }
    }

    fn data(&self, at: u64, len: u64, copied: bool) -> Reference {
        Reference { kind: Kind::Data, at, len, times: 1, copied: Some(copied) }
    }

    fn run_bitmaps(&self, visit: &mut dyn FnMut(Reference)) -> Result<()> {
        let size = self.geometry.cluster_size();
        for bitmap in self.bitmaps.iter().flat_map(|directory| &directory.entries) {
            for from in (0..bitmap.table_entries).step_by(BATCH as usize) {
                let batch = from..bitmap.table_entries.min(from + BATCH as u32);
                for entry in bitmap.read_table(self.storage, self.header, batch)? {
                    if let TableEntry::At(at) = entry {
                        visit(Reference { copied: None, ..self.data(at.0, size, false) });
                    }
                }
            }
        }
        Ok(())
    }
}
