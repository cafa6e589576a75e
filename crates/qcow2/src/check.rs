//! Checking an image as a whole: what its tables name against what its refcounts say; and repairing the refcounts.
//!
//! # Bounds
//!
//! Time: each table is read a fixed number of times, however often it is named, so tables that name each other in loops
//! or the same one a million times cost no more than honest ones. Memory: references are counted in chunks, those of
//! the lowest clusters first; what does not fit the budget is counted in a further pass over the tables.

mod counts;
mod repair;
mod walk;

use std::ops::Range;

use block::{Context, Result, Storage};

use crate::header::Header;
use counts::Counts;
pub(crate) use repair::repair;
use walk::{Kind, Reference, Walk};

/// What a check found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Report {
    /// Contradictions: entries that the format does not allow, places outside the file, tables that overlap, marks of
    /// *may be written in place* that are not true.
    pub broken: u64,
    /// Clusters that are named more often than they are counted: they could be given to somebody else.
    pub short: u64,
    /// Clusters that are counted more often than they are named: wasted room, and nothing worse.
    pub leaks: u64,
    /// What the first contradiction is, or if there is none, the first short refcount.
    pub first: Option<String>,
}

impl Report {
    fn add_broken(&mut self, story: impl FnOnce() -> String) {
        if self.broken == 0 {
            // Worse than a short refcount that may have been met before.
            self.first = Some(story());
        }
        self.broken += 1;
    }
}

/// Checks the image in `storage`, which nobody writes meanwhile, as `qemu-img check` does. What its header alone shows
/// to be wrong is an error, as in [`Header::read`]; all else is reported.
pub fn check(storage: &dyn Storage) -> Result<Report> {
    let header = Header::read(storage)?;
    check_with(storage, &header, counts::BUDGET)
}

/// As [`check`], of an image whose header was read, with room for so many chunks of counts at a time.
fn check_with(storage: &dyn Storage, header: &Header, budget: usize) -> Result<Report> {
    let mut report = Report::default();
    let walk = Walk::new(storage, header, &mut report)?;
    let mut from = 0;
    loop {
        let mut counts = Counts::new(from, budget);
        // Entries that make no sense are told of once.
        let mut ignored = Report::default();
        let told = if from == 0 { &mut report } else { &mut ignored };
        walk.run(told, &mut |reference| counts.add(reference, walk.cluster_bits()))?;
        compare(&walk, &counts, &mut report)?;
        check_marks(&walk, &counts, &mut report)?;
        match counts.next_pass() {
            Some(next) => from = next,
            None => return Ok(report),
        }
    }
}

/// Compares refcounts with `counts`, for all clusters that these know of.
fn compare(walk: &Walk<'_>, counts: &Counts, report: &mut Report) -> Result<()> {
    for cluster in counts.overlaps() {
        report.add_broken(|| format!("cluster {cluster:#x} is a table, and something else"));
    }
    let per_block = walk.per_block();
    let file_clusters = walk.file_end() >> walk.cluster_bits();
    let mut compared = counts.range().start;
    for (index, block) in walk.blocks() {
        let clusters = clamp(index * per_block..(index + 1) * per_block, &counts.range());
        // Whatever is named between this block and the one before has no refcount at all.
        let missing = counts.named(compared..clusters.start.max(compared));
        missing.for_each(|(cluster, times)| tell(report, cluster, times, 0));
        compared = compared.max(clusters.end);
        // As QEMU: a count of what is past the end of the file wastes no room. Nor may it take time, for a block counts
        // millions of clusters, and a hostile table names it a million times.
        let end = clusters.end.min(file_clusters).max(clusters.start);
        let inside = (clusters.start..end).map(|cluster| (cluster, counts.get(cluster)));
        let mut compared = inside.chain(counts.named(end..clusters.end)).peekable();
        if compared.peek().is_none() {
            continue;
        }
        let bytes = walk.read_block(block).context(|| "read a refcount block")?;
        for (cluster, times) in compared {
            let counted = walk.width().get(&bytes, (cluster % per_block) as usize);
            if u64::from(times) > walk.width().max() {
                report.add_broken(|| {
                    format!("cluster {cluster:#x} is named {times} times, which none can count")
                });
            }
            if counted != u64::from(times) {
                tell(report, cluster, times, counted);
            }
        }
    }
    let missing = counts.named(compared..counts.range().end.max(compared));
    missing.for_each(|(cluster, times)| tell(report, cluster, times, 0));
    Ok(())
}

fn tell(report: &mut Report, cluster: u64, named: u32, counted: u64) {
    if u64::from(named) < counted {
        report.leaks += 1;
        return;
    }
    report.short += 1;
    report
        .first
        .get_or_insert_with(|| format!("cluster {cluster:#x}: named {named} times, counted {counted}"));
}

/// "Bit 63: 1 for standard clusters whose refcount is exactly one": if it is set, and that is not so, a write in place
/// would change what others share.
fn check_marks(walk: &Walk<'_>, counts: &Counts, report: &mut Report) -> Result<()> {
    let mut ignored = Report::default();
    walk.run(&mut ignored, &mut |Reference { kind, at, copied, .. }| {
        let cluster = at >> walk.cluster_bits();
        if let (Some(copied), true) = (copied, counts.range().contains(&cluster)) {
            let alone = counts.get(cluster) == 1;
            if copied != alone {
                let what = if kind == Kind::L2 { "an L2 table" } else { "a cluster" };
                report.add_broken(|| format!("{what} at {at:#x}: marked {copied}, alone {alone}"));
            }
        }
    })
}

fn clamp(range: Range<u64>, within: &Range<u64>) -> Range<u64> {
    let start = range.start.clamp(within.start, within.end);
    start..range.end.clamp(start, within.end)
}

#[cfg(test)]
mod tests;
