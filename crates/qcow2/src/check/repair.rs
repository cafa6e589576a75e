//! Repairing refcounts: they are made to be what the tables say.
//!
//! For images whose last writer counted lazily, and did not come to write the counts. Until the end the dirty bit stays
//! set, so whatever a loss of power leaves is repaired again; the tables that map the guest's disk are not touched.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use block::{ByteRange, Context, Error, ErrorKind, Result, Storage, write_zeroes};

use super::counts::{BUDGET, Counts};
use super::walk::{Kind, Reference, Walk};
use super::{Report, check_with, clamp};
use crate::entry::HostOffset;
use crate::header::{Header, INCOMPATIBLE_DIRTY, MAX_REFCOUNT_TABLE_BYTES};
use crate::header_update::{write_incompatible, write_refcount_table};

/// Makes all refcounts of the image in `storage` right, clears its dirty bit, and syncs. `header` is its header, which
/// is to be read again afterwards.
///
/// Errors, having written nothing: [`ErrorKind::Corrupt`] if there is anything wrong but refcounts.
pub(crate) fn repair(storage: &dyn Storage, header: &Header) -> Result<()> {
    header.check_intact()?;
    let report = check_with(storage, header, BUDGET)?;
    if report.broken > 0 {
        let story = report.first.unwrap_or_default();
        return Err(Error::new(ErrorKind::Corrupt, format!("its refcounts can not be repaired: {story}")));
    }
    if report.short > 0 || report.leaks > 0 {
        recount(storage, header, BUDGET).context(|| "repair the refcounts")?;
    }
    write_incompatible(storage, header.incompatible & !INCOMPATIBLE_DIRTY)?;
    storage.sync()
}

/// Writes all refcounts anew, making blocks where there are none, and syncs.
pub(super) fn recount(storage: &dyn Storage, header: &Header, budget: usize) -> Result<()> {
    let walk = Walk::new(storage, header, &mut Report::default())?;
    let plan = Plan::new(&walk, header)?;
    let size = header.geometry().cluster_size();
    for at in plan.new_blocks.values() {
        write_zeroes(storage, ByteRange { offset: at.0, len: size })?;
    }
    let walk = Walk::new(storage, header, &mut Report::default())?;
    let mut from = Some(0);
    while let Some(first) = from {
        let mut counts = Counts::new(first, budget);
        walk.run(&mut Report::default(), &mut |reference| {
            if !plan.leaves(header, reference) {
                counts.add(reference, walk.cluster_bits());
            }
        })?;
        plan.extra.iter().for_each(|reference| counts.add(*reference, walk.cluster_bits()));
        write_counts(storage, &walk, &plan, &counts)?;
        from = counts.next_pass();
    }
    storage.sync()?;
    plan.link(storage, header)
}

/// Writes those refcounts that `counts` knows and that are other than on disk.
fn write_counts(storage: &dyn Storage, walk: &Walk<'_>, plan: &Plan, counts: &Counts) -> Result<()> {
    let per_block = walk.per_block();
    let end = walk.file_end() >> walk.cluster_bits();
    for (&index, &at) in &plan.blocks {
        let clusters = clamp(index * per_block..(index + 1) * per_block, &counts.range());
        // What is past the end, and named by nothing, need not be zero: see `compare`.
        let middle = clusters.end.min(end).max(clusters.start);
        let inside = (clusters.start..middle).map(|cluster| (cluster, counts.get(cluster)));
        let mut values = inside.chain(counts.named(middle..clusters.end)).peekable();
        if values.peek().is_none() {
            continue;
        }
        let before = walk.read_block(at)?;
        let mut bytes = before.clone();
        for (cluster, times) in values {
            walk.width().set(&mut bytes, (cluster % per_block) as usize, u64::from(times))?;
        }
        if bytes != before {
            storage.write_at(&bytes, at.0)?;
        }
    }
    Ok(())
}

/// Which refcount blocks there will be, and where.
struct Plan {
    /// By index, the new ones among them.
    blocks: BTreeMap<u64, HostOffset>,
    new_blocks: BTreeMap<u64, HostOffset>,
    /// A larger refcount table, if that is needed: where, and how many clusters.
    table: Option<(HostOffset, u64)>,
    /// The new clusters.
    extra: Vec<Reference>,
}

impl Plan {
    fn new(walk: &Walk<'_>, header: &Header) -> Result<Self> {
        let (size, bits, per_block) = (1 << walk.cluster_bits(), walk.cluster_bits(), walk.per_block());
        let mut needed = BTreeSet::new();
        walk.run(&mut Report::default(), &mut |Reference { at, len, .. }| {
            let clusters = at >> bits..=(at + len - 1) >> bits;
            needed.extend(clusters.start() / per_block..=clusters.end() / per_block);
        })?;
        let blocks: BTreeMap<u64, HostOffset> = walk.blocks().collect();
        let mut plan = Self { blocks, new_blocks: BTreeMap::new(), table: None, extra: Vec::new() };
        // All new clusters come behind the end of the file, where nothing is.
        let mut next = walk.file_end();
        let mut there = u64::from(header.refcount_table_clusters);
        loop {
            while let Some(index) = needed.pop_first() {
                if let Entry::Vacant(slot) = plan.blocks.entry(index) {
                    slot.insert(HostOffset(next));
                    plan.new_blocks.insert(index, HostOffset(next));
                    plan.take(&mut next, size);
                    needed.insert((next - size) / size / per_block);
                }
            }
            let entries = plan.blocks.last_key_value().map_or(0, |(index, _)| index + 1);
            let clusters = (entries * 8).div_ceil(size);
            if clusters <= there {
                return Ok(plan);
            }
            // One more, for the blocks that the table itself may need; else once again.
            there = clusters + 1;
            if there * size > MAX_REFCOUNT_TABLE_BYTES {
                return Err(Error::new(ErrorKind::NoSpace, "the refcount table would be too large"));
            }
            plan.table = Some((HostOffset(next), there));
            let first = next / size / per_block;
            plan.take(&mut next, there * size);
            needed.extend(first..=(next - size) / size / per_block);
        }
    }

    fn take(&mut self, next: &mut u64, len: u64) {
        self.extra.push(Reference { kind: Kind::Owned, at: *next, len, times: 1, copied: None });
        *next += len;
    }

    /// Whether `reference` is the old refcount table, which is to be no more.
    fn leaves(&self, header: &Header, reference: Reference) -> bool {
        self.table.is_some() && reference.kind == Kind::Owned && reference.at == header.refcount_table.0
    }

    /// Names the new blocks, whose contents are on stable storage, and syncs.
    fn link(&self, storage: &dyn Storage, header: &Header) -> Result<()> {
        let Some((at, clusters)) = self.table else {
            for (index, at) in &self.new_blocks {
                storage.write_at(&at.0.to_be_bytes(), header.refcount_table.0 + index * 8)?;
            }
            return storage.sync();
        };
        let mut bytes = vec![0; (clusters * header.geometry().cluster_size()) as usize];
        for (index, at) in &self.blocks {
            let slot = bytes.get_mut(*index as usize * 8..).and_then(|rest| rest.get_mut(..8));
            slot.ok_or_else(|| Error::new(ErrorKind::NoSpace, "the refcount table is too small"))?
                .copy_from_slice(&at.0.to_be_bytes());
        }
        storage.write_at(&bytes, at.0)?;
        storage.sync()?;
        write_refcount_table(storage, at, clusters as u32)?;
        storage.sync()
    }
}
