//! The mapping: the L1 table in RAM, and slices of the L2 tables as they are needed.
//!
//! An entry is what the newest of these says: a published change that no flush has taken yet, one that a flush has taken
//! and not made durable, the table on disk. A slice in RAM has all three in it, and each change is made under the lock
//! of the image's writes, in the change's own map and in the slice if that is here. So a slice may go at any time.
//!
//! An image that is only read, and has no room for entries, keeps no L1 table either: there may be hundreds of such images
//! beneath an active one, whose tables together would be larger than anything that its user allowed.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use block::{Context, Error, ErrorKind, Result, Storage};

use crate::bytes::be64;
use crate::compressed::Packed;
use crate::entry::{COPIED, Entry, Geometry, GuestCluster, HostOffset};
use crate::image::{Core, Inner};
use crate::slices::Slices;

/// "Bit 9 - 55: Bits 9-55 of the offset of the L2 table"; all others but bit 63 are reserved.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An L1 entry.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct L1Entry(pub(crate) u64);

impl L1Entry {
    /// Names the table at `at`, which nothing else names.
    pub(crate) fn own(at: HostOffset) -> Self {
        Self(at.0 | COPIED)
    }

    /// Where the L2 table is, if there is one.
    pub(crate) fn table(self) -> Option<HostOffset> {
        let at = self.0 & L1_OFFSET;
        (at != 0).then_some(HostOffset(at))
    }

    /// Of eight bytes of an image of `limit` bytes.
    fn decode(bytes: &[u8], geometry: Geometry, limit: u64) -> Result<Self> {
        let entry = Self(be64(bytes, 0));
        let inside = entry.table().is_none_or(|at| geometry.is_aligned(at.0) && at.0 < limit);
        match entry.0 & !(L1_OFFSET | COPIED) == 0 && inside {
            true => Ok(entry),
            false => Err(Error::new(ErrorKind::Corrupt, "an L1 entry points to no L2 table")),
        }
    }

    /// Whether the table may be written where it is: no snapshot shares it.
    pub(crate) fn is_own(self) -> bool {
        self.0 & COPIED != 0
    }
}

/// The L1 table, as far as flushes have made it durable, and the slices in RAM.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Empty if it is not kept.
    l1: RwLock<Vec<L1Entry>>,
    unkept: Option<Unkept>,
    slices: Slices,
}

/// What is kept of an L1 table in its stead, a bit for each entry: most layers of a large disk have few tables, and of what
/// they lack nothing is read.
#[derive(Debug)]
struct Unkept {
    /// Where the table is in the file.
    at: HostOffset,
    /// Which entries name a table, 64 to a word.
    present: Box<[u64]>,
}

impl Unkept {
    fn new(at: HostOffset, l1: &[L1Entry]) -> Self {
        let bits = |entries: &[L1Entry]| {
            entries.iter().rev().fold(0, |bits, entry| bits << 1 | u64::from(entry.table().is_some()))
        };
        Self { at, present: l1.chunks(64).map(bits).collect() }
    }

    /// Where in the file the entry is, if it names a table.
    fn position(&self, index: usize) -> Option<u64> {
        let word = self.present.get(index / 64)?;
        (word >> (index % 64) & 1 == 1).then_some(self.at.0 + index as u64 * 8)
    }
}

impl Mapping {
    /// Reads and checks the L1 table of a file of `limit` bytes, its last cluster filled up. It is kept if the image is
    /// `writable` or there is room for entries at all.
    pub(crate) fn open(
        storage: &dyn Storage,
        geometry: Geometry,
        at: HostOffset,
        limit: u64,
        cache_bytes: u64,
        writable: bool,
    ) -> Result<Self> {
        let mut bytes = vec![0; geometry.tables() as usize * 8];
        storage.read_at(&mut bytes, at.0).context(|| "read the L1 table")?;
        let entries = bytes.chunks_exact(8).map(|entry| L1Entry::decode(entry, geometry, limit));
        let mut l1 = entries.collect::<Result<Vec<_>>>()?;
        let unkept = (!writable && cache_bytes == 0).then(|| Unkept::new(at, &std::mem::take(&mut l1)));
        Ok(Self { l1: RwLock::new(l1), unkept, slices: Slices::new(geometry, cache_bytes) })
    }

    /// Lets go of all slices.
    pub(crate) fn forget(&self) {
        self.slices.clear();
    }

    /// The whole L1 table, of an image that is being written.
    pub(crate) fn l1(&self) -> RwLockReadGuard<'_, Vec<L1Entry>> {
        self.l1.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn l1_entry(&self, index: usize) -> Result<L1Entry> {
        let out_of_range = || Error::new(ErrorKind::OutOfRange, "no L2 table maps this cluster");
        self.l1().get(index).copied().ok_or_else(out_of_range)
    }

    /// The L1 table on disk has this entry now, durably. Under the lock of the image's writes.
    pub(crate) fn set_l1_entry(&self, index: usize, entry: L1Entry) {
        let mut l1 = self.l1.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = l1.get_mut(index) {
            *place = entry;
        }
    }

    /// The L1 table has got room for `entries`.
    pub(crate) fn extend_l1(&self, entries: usize) {
        let mut l1 = self.l1.write().unwrap_or_else(PoisonError::into_inner);
        let entries = entries.max(l1.len());
        l1.resize(entries, L1Entry::default());
    }
}

impl Inner {
    /// Looks at the entries from that of `cluster` to the end of its slice: at none if no table maps it, and so none of
    /// the clusters up to the end of the table.
    pub(crate) fn look<R>(&self, cluster: GuestCluster, look: impl Fn(&[Entry]) -> R) -> Result<R> {
        let (slice, index) = self.geometry.slice_of(cluster);
        let found = self.mapping.slices.look(slice, |entries| look(entries.get(index..).unwrap_or(&[])));
        if let Some(found) = found {
            return Ok(found);
        }
        let Some(writer) = &self.writer else {
            let bytes = self.read_slice(slice)?;
            if bytes.is_none() {
                return Ok(look(&[]));
            }
            let entries = self.decode_slice(slice, bytes, None)?;
            let found = look(entries.get(index..).unwrap_or(&[]));
            self.mapping.slices.insert(slice, entries);
            return Ok(found);
        };
        loop {
            let settled = writer.core().settled;
            let bytes = self.read_slice(slice)?;
            let core = writer.core();
            // A flush that ended meanwhile may have moved what is missing in these bytes out of the maps of changes.
            if core.settled == settled {
                let entries = self.decode_slice(slice, bytes, Some(&core))?;
                let found = look(entries.get(index..).unwrap_or(&[]));
                self.mapping.slices.insert(slice, entries);
                return Ok(found);
            }
        }
    }

    /// The entry of `cluster`, for who holds the lock of writes. Whoever needs to know many has looked at them before,
    /// lest they are read from the file under the lock.
    pub(crate) fn entry(&self, core: &Core, cluster: GuestCluster) -> Result<Entry> {
        let (slice, index) = self.geometry.slice_of(cluster);
        let entry = |entries: &[Entry]| entries.get(index).copied().unwrap_or_default();
        if let Some(found) = self.mapping.slices.look(slice, entry) {
            return Ok(found);
        }
        let bytes = self.read_slice(slice)?;
        let entries = self.decode_slice(slice, bytes, Some(core))?;
        let found = entry(&entries);
        self.mapping.slices.insert(slice, entries);
        Ok(found)
    }

    /// Changes an entry in its slice. Under the lock of writes.
    pub(crate) fn set_entry(&self, cluster: GuestCluster, entry: Entry) {
        let (slice, index) = self.geometry.slice_of(cluster);
        self.mapping.slices.update(slice, index, entry);
    }

    /// The bytes of a slice on disk; `None` if there is no table.
    fn read_slice(&self, slice: u64) -> Result<Option<Vec<u8>>> {
        let geometry = self.geometry;
        let first = geometry.slice_clusters(slice).start;
        let (table, index) = geometry.position(first);
        let entry = match &self.mapping.unkept {
            None => self.mapping.l1_entry(table)?,
            Some(unkept) => {
                let Some(at) = unkept.position(table) else { return Ok(None) };
                let mut bytes = [0; 8];
                self.storage.read_at(&mut bytes, at).context(|| "read the L1 table")?;
                L1Entry::decode(&bytes, geometry, self.limit)?
            }
        };
        let Some(at) = entry.table() else { return Ok(None) };
        let at = at.0 + index as u64 * geometry.entry_size();
        let mut bytes = vec![0; (geometry.entries_per_slice() * geometry.entry_size()) as usize];
        self.storage.read_at(&mut bytes, at).context(|| format!("read the L2 table at {at:#x}"))?;
        Ok(Some(bytes))
    }

    /// The entries of a slice: those on disk, and over them the changes of a `core`.
    fn decode_slice(&self, slice: u64, bytes: Option<Vec<u8>>, core: Option<&Core>) -> Result<Box<[Entry]>> {
        let clusters = self.geometry.slice_clusters(slice);
        let mut changed = vec![None; (clusters.end.0 - clusters.start.0) as usize];
        if let Some(core) = core {
            let taken = core.batch.range(clusters.clone()).map(|(cluster, entry)| (cluster, *entry));
            let newer = core.dirty.range(clusters.clone()).map(|(cluster, change)| (cluster, change.entry));
            for (cluster, entry) in taken.chain(newer) {
                if let Some(place) = changed.get_mut((cluster.0 - clusters.start.0) as usize) {
                    *place = Some(entry);
                }
            }
        }
        let bytes = bytes.unwrap_or_default();
        let mut on_disk = bytes.chunks_exact(self.geometry.entry_size() as usize);
        let entries = changed.into_iter().zip(clusters.start.0..).map(|(changed, cluster)| {
            match (changed, on_disk.next()) {
                (Some(entry), _) => Ok(entry),
                (None, Some(bytes)) => {
                    let entry = Entry::decode(self.geometry, bytes)?;
                    self.check_entry(GuestCluster(cluster), entry, core)?;
                    Ok(entry)
                }
                (None, None) => Ok(Entry::default()),
            }
        });
        entries.collect()
    }

    /// That an entry of the file's points to where there can be data of a guest.
    fn check_entry(&self, cluster: GuestCluster, entry: Entry, core: Option<&Core>) -> Result<()> {
        let corrupt = |what: &str| Err(Error::new(ErrorKind::Corrupt, what));
        let limit = core.map_or(self.limit, |core| core.allocator.end());
        if entry.home.is_compressed() {
            return match Packed::decode(self.geometry, entry.home.0)? {
                packed if packed.offset >= limit => {
                    corrupt("a compressed cluster is past the end of the file")
                }
                _ => Ok(()),
            };
        }
        let Some(at) = entry.home.offset() else { return Ok(()) };
        if self.geometry.external {
            return match at.0 == self.geometry.start_of(cluster) {
                true => Ok(()),
                false => corrupt("an L2 entry points to elsewhere in the external data file"),
            };
        }
        if at.0 >= limit {
            return corrupt("an L2 entry points past the end of the file");
        }
        match core.is_some_and(|core| core.metadata.contains(at)) {
            true => corrupt("an L2 entry points to the image's own tables"),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_name_no_table_are_not_read_from_the_file() {
        let l1: Vec<L1Entry> =
            (0..130).map(|index| L1Entry(if index % 9 == 1 { 1 << 16 } else { 0 })).collect();
        let unkept = Unkept::new(HostOffset(512), &l1);
        for index in 0..200 {
            let at = (index < 130 && index % 9 == 1).then_some(512 + index as u64 * 8);
            assert_eq!(unkept.position(index), at, "{index}");
        }
    }
}
