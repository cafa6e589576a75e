//! What a flush writes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{ByteRange, Context, Error, ErrorKind, Result};

use crate::compressed::Packed;
use crate::entry::{Entry, Geometry, Home, HostOffset};
use crate::image::{Inner, Writer};
use crate::mapping::L1Entry;
use crate::publish::Freed;
use crate::refcounts::Refcounts;

/// Clusters whose refcounts are looked at with one flush, in search of free ones.
const SCAN: u64 = 8192;

/// What flushes hand from one to the next. Whoever has it is the one flush under way.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) refcounts: Refcounts,
    /// Where the L1 table is.
    pub(crate) l1: HostOffset,
    pub(crate) l1_entries: u32,
    /// L2 tables to be, by their index in the L1 table.
    new_tables: BTreeMap<usize, NewTable>,
    /// Compressed clusters that entries name, and that are not counted yet. A later batch may name them no more: then
    /// they are counted all the same, and less again.
    named: Vec<Home>,
    /// What entries named that the batch changes.
    freed: Vec<Freed>,
    /// Tables that are no more: the first cluster, and how many.
    freed_tables: Vec<(HostOffset, u64)>,
    /// Clusters that nothing names, whose refcounts are to be zero before they are used again.
    released: Vec<u64>,
    /// Whether all records of what was freed are in the half of the journal that is dropped in the end.
    rotated: bool,
    /// The last flush of a sealed image has ended. A job may have the file open anew by now, with refcounts and free
    /// clusters of its own: a flush that comes late counts nothing and punches nothing.
    at_rest: bool,
}

/// An L2 table that the L1 table on disk does not name yet, for sure: a new one, or a copy of one that is shared.
#[derive(Clone, Copy, Debug)]
struct NewTable {
    at: HostOffset,
    /// The shared one.
    old: Option<HostOffset>,
    /// Whether the L1 table on disk may name it. A flush that begins to name a table may fail, and from then on nothing
    /// may be written to the table that is not safe in a named one.
    exposed: bool,
}

/// The batch's entries of one L2 table, by their index.
type ByTable = BTreeMap<usize, Vec<(usize, Entry)>>;

impl Work {
    pub(crate) fn new(refcounts: Refcounts, l1: HostOffset, l1_entries: u32) -> Self {
        Self {
            refcounts,
            l1,
            l1_entries,
            new_tables: BTreeMap::new(),
            named: Vec::new(),
            freed: Vec::new(),
            freed_tables: Vec::new(),
            released: Vec::new(),
            rotated: false,
            at_rest: false,
        }
    }

    /// Keeps as many clusters for tables as they may still take, whatever is written to a disk of this size and in which
    /// order. Each L2 table is taken once: as a new one, or as the copy of a shared one.
    pub(crate) fn reserve(&self, image: &Inner, writer: &Writer, geometry: Geometry) {
        let is_own = |entry: &&L1Entry| entry.table().is_some() && entry.is_own();
        let own = image.mapping.l1().iter().filter(is_own).count() as u64;
        let tables = self.refcounts.reserve() + geometry.tables().saturating_sub(own);
        writer.core().allocator.reserve(tables);
    }

    /// Whether there is nothing to be written.
    pub(crate) fn is_empty(&self, writer: &Writer) -> bool {
        writer.core().batch.is_empty()
    }

    /// Takes what was published so far, and what an earlier flush took and did not get through with.
    pub(crate) fn take_batch(&mut self, image: &Inner, writer: &Writer) {
        let mut core = writer.core();
        let dirty = std::mem::take(&mut core.dirty);
        for change in dirty.values().filter(|change| change.fresh) {
            if let Some(at) = change.entry.home.offset().filter(|_| !image.geometry.external) {
                self.refcounts.raise(at, 1);
            }
        }
        // A later entry of a cluster stands for its earlier ones.
        let batch = Arc::make_mut(&mut core.batch);
        batch.extend(dirty.into_iter().map(|(cluster, change)| (cluster, change.entry)));
        self.freed.append(&mut core.freed);
        self.named.append(&mut core.packing.named);
        self.rotated = core.journal.rotate();
    }

    fn by_table(&self, image: &Inner, writer: &Writer) -> ByTable {
        let batch = Arc::clone(&writer.core().batch);
        let mut tables = ByTable::new();
        for (cluster, entry) in &*batch {
            let (table, index) = image.geometry.position(*cluster);
            tables.entry(table).or_default().push((index, *entry));
        }
        tables
    }

    /// Writes the refcounts of what the batch is about to name, and whole tables that nothing names yet.
    pub(crate) fn write_counts(&mut self, image: &Inner, writer: &Writer) -> Result<()> {
        while let Some(home) = self.named.last() {
            let (first, count) = Packed::decode(image.geometry, home.0)?.clusters(image.geometry);
            self.refcounts.share(&*image.storage, first..first + count)?;
            self.released.retain(|cluster| !(first..first + count).contains(cluster));
            self.named.pop();
        }
        for (index, entries) in self.by_table(image, writer) {
            let linked = image.mapping.l1_entry(index)?;
            if linked.table().is_some() && linked.is_own() {
                continue;
            }
            let table = match self.new_tables.get(&index) {
                Some(table) => *table,
                None => {
                    let at = image.take_table(1)?;
                    self.refcounts.raise(at, 1);
                    let table = NewTable { at, old: linked.table(), exposed: false };
                    self.new_tables.insert(index, table);
                    table
                }
            };
            if !table.exposed {
                write_whole_table(image, table, &entries)?;
            }
        }
        self.refcounts.write_raised(image)
    }

    /// What was linked last is on stable storage.
    pub(crate) fn linked(&mut self) {
        self.freed_tables.extend(self.refcounts.linked());
    }

    /// Nothing on stable storage names these clusters any more, which held a table: the first one, and how many.
    pub(crate) fn free_table(&mut self, table: (HostOffset, u64)) {
        self.freed_tables.push(table);
    }

    /// Writes the batch's entries into tables that may be linked, and links those that surely are not yet. Into a table
    /// that no flush tried to link before, its entries were written with all of it.
    pub(crate) fn write_mapping(&mut self, image: &Inner, writer: &Writer) -> Result<()> {
        for (index, entries) in self.by_table(image, writer) {
            let Some(table) = self.new_tables.get_mut(&index) else {
                let at = image.mapping.l1_entry(index)?.table().unwrap_or_default();
                write_entries(image, at, &entries).context(|| "write an L2 table")?;
                continue;
            };
            if std::mem::replace(&mut table.exposed, true) {
                write_entries(image, table.at, &entries).context(|| "write an L2 table")?;
            }
            let entry = L1Entry::own(table.at).0.to_be_bytes();
            image.storage.write_at(&entry, self.l1.0 + index as u64 * 8).context(|| "write the L1 table")?;
        }
        Ok(())
    }

    /// All of the batch is on stable storage.
    pub(crate) fn settle(&mut self, image: &Inner, writer: &Writer) -> Result<()> {
        let is_last;
        {
            let mut core = writer.core();
            is_last = writer.sealed.load(Ordering::Acquire) && core.is_idle();
            if is_last {
                // All that was published is in the tables: neither half names what was freed.
                core.journal.clear()?;
                self.rotated = true;
            } else {
                core.journal.drop_older()?;
            }
            for (index, table) in std::mem::take(&mut self.new_tables) {
                image.mapping.set_l1_entry(index, L1Entry::own(table.at));
                self.freed_tables.extend(table.old.map(|old| (old, 1)));
            }
            if !core.batch.is_empty() {
                core.batch = Arc::default();
                core.settled += 1;
            }
        }
        self.refcounts.settle();
        if self.at_rest {
            return Ok(());
        }
        self.at_rest = is_last;
        // The batch is safe, whatever becomes of this: it can only leak.
        if self.release(image, writer).is_ok() {
            reclaim(image, writer);
            _ = self.scan(image, writer);
        }
        Ok(())
    }

    /// Counts less what was freed, and gives to be used again what nothing names any more. What fails is left to the next
    /// flush.
    pub(crate) fn release(&mut self, image: &Inner, writer: &Writer) -> Result<()> {
        // A journal's half that is still there may name them.
        while let Some(freed) = self.freed.pop_if(|_| self.rotated) {
            if let Err(error) = self.lower(image, freed) {
                self.freed.push(freed);
                return Err(error);
            }
        }
        while let Some((at, count)) = self.freed_tables.pop() {
            let first = at.0 >> image.geometry.cluster_bits;
            let lowered = self.lower_clusters(image, first, count);
            lowered.inspect_err(|_| self.freed_tables.push((at, count)))?;
        }
        self.refcounts.write_lowered(&*image.storage)?;
        let mut released = std::mem::take(&mut self.released);
        if !released.is_empty() && !writer.keeps_freed {
            let ended = image.epochs.next();
            let mut core = writer.core();
            // Compressed clusters still come there, or came since the batch was taken: the next flush decides.
            let uncounted = core.packing.uncounted(image.geometry);
            self.released.extend(released.extract_if(.., |cluster| uncounted.contains(cluster)));
            // Some of them may have held tables.
            let at = |cluster: &u64| HostOffset(cluster << image.geometry.cluster_bits);
            released.iter().map(at).for_each(|at| core.metadata.remove(at, 1));
            core.allocator.free(ended, released);
        }
        Ok(())
    }

    fn lower(&mut self, image: &Inner, freed: Freed) -> Result<()> {
        let (first, count) = match freed.home.offset() {
            Some(at) => (at.0 >> image.geometry.cluster_bits, 1),
            None => Packed::decode(image.geometry, freed.home.0)?.clusters(image.geometry),
        };
        if freed.counted {
            return self.lower_clusters(image, first, count);
        }
        self.released.push(first);
        Ok(())
    }

    /// All or none.
    fn lower_clusters(&mut self, image: &Inner, first: u64, count: u64) -> Result<()> {
        for cluster in first..first + count {
            self.refcounts.load(&*image.storage, cluster)?;
        }
        for cluster in first..first + count {
            if self.refcounts.lower(cluster) {
                self.released.push(cluster);
            }
        }
        Ok(())
    }

    /// Looks for clusters that are free, if few are known.
    pub(crate) fn scan(&self, image: &Inner, writer: &Writer) -> Result<()> {
        let Some(wanted) = writer.core().allocator.wants(SCAN) else { return Ok(()) };
        let (end, mut zeroes) = self.refcounts.zeroes(&*image.storage, wanted)?;
        let mut core = writer.core();
        zeroes.retain(|cluster| !core.metadata.contains(HostOffset(cluster << image.geometry.cluster_bits)));
        core.allocator.scanned(end, zeroes);
        Ok(())
    }
}

impl Inner {
    /// `count` clusters in a row for a table, at the end of the file.
    pub(crate) fn take_table(&self, count: u64) -> Result<HostOffset> {
        let read_only = || Error::new(ErrorKind::ReadOnly, "the image is read-only");
        let mut core = self.writer.as_ref().ok_or_else(read_only)?.core();
        let at = core.allocator.take_at_end(count)?;
        core.metadata.add(at, count).map(|()| at)
    }

    /// Takes back a cluster that was to be a table, and nothing names.
    pub(crate) fn give_back_table(&self, at: HostOffset) {
        if let Some(writer) = &self.writer {
            let mut core = writer.core();
            core.metadata.remove(at, 1);
            core.allocator.give_back(at);
        }
    }
}

/// Takes those freed clusters to be used again that nobody can be reading any more, and gives their room back to the host
/// until then: a read under way must not find a hole where it found data.
fn reclaim(image: &Inner, writer: &Writer) {
    loop {
        let released = writer.core().allocator.release();
        let Some(mut released) = released else { return };
        released.sort_unstable();
        punch(image, &released);
        writer.core().allocator.add(released);
    }
}

/// Gives the room of clusters back to the host, as far as it can.
fn punch(image: &Inner, clusters: &[u64]) {
    for run in clusters.chunk_by(|one, next| one + 1 == *next) {
        let Some(first) = run.first() else { continue };
        let size = image.geometry.cluster_size();
        let hole = ByteRange { offset: first * size, len: run.len() as u64 * size };
        // Advice: where the host can not, the room is used again all the same.
        _ = image.storage.punch_hole(hole);
    }
}

/// Writes a table that nothing on disk names: what of it was published is all in `entries`, or in the one it copies.
fn write_whole_table(image: &Inner, table: NewTable, entries: &[(usize, Entry)]) -> Result<()> {
    let size = image.geometry.entry_size() as usize;
    let mut bytes = vec![0; image.geometry.cluster_size() as usize];
    if let Some(old) = table.old {
        image.storage.read_at(&mut bytes, old.0).context(|| "read a shared L2 table")?;
    }
    for (index, entry) in entries {
        let mut encoded = Vec::with_capacity(size);
        entry.encode(image.geometry, &mut encoded);
        if let Some(place) = bytes.get_mut(index * size..(index + 1) * size) {
            place.copy_from_slice(&encoded);
        }
    }
    image.storage.write_at(&bytes, table.at.0).context(|| "write a new L2 table")
}

/// Writes `entries`, in order of their indices, into the table at `at`, each run of neighbours in one go.
fn write_entries(image: &Inner, at: HostOffset, entries: &[(usize, Entry)]) -> Result<()> {
    let mut bytes = Vec::new();
    for run in entries.chunk_by(|(one, _), (next, _)| one + 1 == *next) {
        bytes.clear();
        run.iter().for_each(|(_, entry)| entry.encode(image.geometry, &mut bytes));
        let first = run.first().map_or(0, |(index, _)| *index as u64);
        image.storage.write_at(&bytes, at.0 + first * image.geometry.entry_size())?;
    }
    Ok(())
}
