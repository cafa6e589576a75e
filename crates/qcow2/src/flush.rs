//! Flushing: the batch of published changes becomes durable, in an order that a loss of power can not hurt.
//!
//! ```text
//!   take batch ─▶ refcounts, new L2 tables ─▶ SYNC ─▶ L2 entries, L1 entries ─▶ SYNC ─▶ journal half dropped
//!                                              └─▶ (each new refcount block: refcount table ─▶ SYNC) ─┘
//! ```
//!
//! The first sync also makes the batch's *data* durable: it was written before it was published. What is published
//! after the batch was taken is not part of it and stays out of the tables, for its data may not be on the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use block::{Context, Error, Flush, FlushStep, Result};

use crate::alloc::Refcounts;
use crate::entry::{GuestCluster, HostOffset, State, encode};
use crate::image::{Inner, Writer};
use crate::table::{Table, Tables};

/// What flushes hand from one to the next. Whoever has it is the one flush under way.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) refcounts: Refcounts,
    /// Taken and not yet durable: with changes that an earlier flush took and failed to write.
    batch: BTreeMap<GuestCluster, State>,
}

/// The flushes of an image: one at a time.
#[derive(Debug)]
pub(crate) struct Flushes {
    /// Absent while a flush is under way.
    idle: Option<Box<Work>>,
    /// How many have begun.
    begun: u64,
    /// The number of the last one that succeeded.
    succeeded: u64,
    waiting: Vec<Waker>,
}

impl Flushes {
    pub(crate) fn new(refcounts: Refcounts) -> Self {
        let work = Work { refcounts, batch: BTreeMap::new() };
        Self { idle: Some(Box::new(work)), begun: 0, succeeded: 0, waiting: Vec::new() }
    }
}

/// One flush, seen by its caller.
pub(crate) struct ImageFlush {
    image: Arc<Inner>,
    /// Flushes begun before this one was asked for. One that began later does for it as well.
    before: u64,
    /// Its own number once it has begun.
    number: u64,
    stage: Stage,
    work: Option<Box<Work>>,
}

/// What has been done, and by now is synced.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Waiting,
    /// Refcounts and new L2 tables.
    Refcounts,
    /// An entry of the refcount table, for a new block.
    RefcountTable,
    /// L2 and L1 entries; or there was nothing but data.
    Mapping,
}

impl ImageFlush {
    pub(crate) fn new(image: Arc<Inner>) -> Self {
        let before = image.writer.as_ref().map_or(0, |writer| writer.flushes().begun);
        Self { image, before, number: 0, stage: Stage::Waiting, work: None }
    }

    fn advance(&mut self, writer: &Writer, waker: &Waker) -> Poll<Result<FlushStep>> {
        if matches!(self.stage, Stage::Waiting) {
            match self.take_turn(writer, waker) {
                Poll::Ready(true) => return Poll::Ready(Ok(FlushStep::Done)),
                Poll::Ready(false) => {}
                Poll::Pending => return Poll::Pending,
            }
        }
        let image = Arc::clone(&self.image);
        let Some(work) = self.work.as_deref_mut() else { return Poll::Ready(Ok(FlushStep::Done)) };
        if matches!(self.stage, Stage::RefcountTable) {
            work.refcounts.block_linked();
        }
        let next = match self.stage {
            Stage::Waiting => {
                work.take_batch(writer);
                work.write_refcounts(&image, writer).map(|()| Stage::Refcounts)
            }
            Stage::Refcounts | Stage::RefcountTable if work.refcounts.has_unlinked() => {
                work.refcounts.link_block(&*image.storage).map(|()| Stage::RefcountTable)
            }
            Stage::Refcounts | Stage::RefcountTable => work.write_mapping(&image).map(|()| Stage::Mapping),
            Stage::Mapping => {
                let settled = work.settle(&image, writer);
                self.end(writer, settled.is_ok());
                return Poll::Ready(settled.map(|()| FlushStep::Done));
            }
        };
        // With nothing in the batch one sync, for the data, is all.
        let nothing_new = work.batch.is_empty();
        Poll::Ready(next.map(|stage| {
            self.stage = if nothing_new { Stage::Mapping } else { stage };
            FlushStep::Sync(vec![Arc::clone(&image.storage)])
        }))
    }

    /// `true` if another flush has done it all, `false` if it is this one's turn.
    fn take_turn(&mut self, writer: &Writer, waker: &Waker) -> Poll<bool> {
        let mut flushes = writer.flushes();
        if flushes.succeeded > self.before {
            return Poll::Ready(true);
        }
        match flushes.idle.take() {
            Some(work) => {
                flushes.begun += 1;
                (self.number, self.work) = (flushes.begun, Some(work));
                Poll::Ready(false)
            }
            None => {
                if !flushes.waiting.iter().any(|waiting| waiting.will_wake(waker)) {
                    flushes.waiting.push(waker.clone());
                }
                Poll::Pending
            }
        }
    }

    /// Hands the work on, to whoever is next.
    fn end(&mut self, writer: &Writer, succeeded: bool) {
        let Some(work) = self.work.take() else { return };
        let waiting = {
            let mut flushes = writer.flushes();
            flushes.idle = Some(work);
            if succeeded {
                flushes.succeeded = self.number;
            }
            std::mem::take(&mut flushes.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Flush for ImageFlush {
    fn step(&mut self, last: Result<()>, waker: &Waker) -> Poll<Result<FlushStep>> {
        let image = Arc::clone(&self.image);
        // What is read-only has nothing to make durable.
        let Some(writer) = &image.writer else { return Poll::Ready(Ok(FlushStep::Done)) };
        let step = match last {
            Ok(()) => writer.check_latch().map_or_else(fail, |()| self.advance(writer, waker)),
            Err(error) => {
                writer.failed.store(true, Ordering::Release);
                fail(error.context("a sync of the image failed, for good"))
            }
        };
        if matches!(step, Poll::Ready(Err(_))) {
            self.end(writer, false);
        }
        step
    }
}

fn fail(error: Error) -> Poll<Result<FlushStep>> {
    Poll::Ready(Err(error))
}

impl Drop for ImageFlush {
    fn drop(&mut self) {
        let image = Arc::clone(&self.image);
        if let Some(writer) = &image.writer {
            self.end(writer, false);
        }
    }
}

impl Work {
    fn take_batch(&mut self, writer: &Writer) {
        let mut core = writer.core();
        let dirty = std::mem::take(&mut core.dirty);
        // A later state of a cluster stands for its earlier ones.
        self.batch.extend(dirty);
        core.unflushed = self.batch.len();
        core.journal.rotate();
    }

    /// The batch by L2 table: each with its L1 index.
    fn by_table(&self, image: &Inner) -> BTreeMap<usize, Vec<(usize, State)>> {
        let mut tables: BTreeMap<usize, Vec<(usize, State)>> = BTreeMap::new();
        for (cluster, state) in &self.batch {
            let (table, index) = image.geometry.position(*cluster);
            tables.entry(table).or_default().push((index, *state));
        }
        tables
    }

    /// Counts the clusters that the batch is about to name, and writes whole tables that nothing names yet.
    fn write_refcounts(&mut self, image: &Inner, writer: &Writer) -> Result<()> {
        let mut counted = BTreeSet::new();
        for (table, entries) in self.by_table(image) {
            let (table, linked) = image.tables.loaded(table)?;
            for (index, state) in &entries {
                let home = table.entries.get(*index).map(crate::table::Entry::home).unwrap_or_default();
                if home.is_fresh() && state.allocated() != 0 {
                    counted.insert(home.offset()?.0 >> image.geometry.cluster_bits);
                }
            }
            if !linked && !table.exposed.load(Ordering::Relaxed) {
                let home = match table.home.load(Ordering::Relaxed) {
                    0 => writer.allocator.take()?.0,
                    home => home,
                };
                table.home.store(home, Ordering::Relaxed);
                counted.insert(home >> image.geometry.cluster_bits);
                write_whole_table(image, table, &entries)?;
            }
        }
        self.refcounts.set_to_one(&*image.storage, &writer.allocator, counted)
    }

    /// Writes the batch's entries into tables that may be linked, and links those that surely are not yet. Into a table
    /// that no flush tried to link before, its entries were written with all of it.
    fn write_mapping(&self, image: &Inner) -> Result<()> {
        for (l1_index, entries) in self.by_table(image) {
            let (table, linked) = image.tables.loaded(l1_index)?;
            if table.exposed.swap(true, Ordering::Relaxed) {
                write_entries(image, table, &entries).context(|| "write an L2 table")?;
            }
            if !linked {
                let entry = Tables::l1_entry(HostOffset(table.home.load(Ordering::Relaxed)));
                let at = image.l1.0 + l1_index as u64 * 8;
                image.storage.write_at(&entry.to_be_bytes(), at).context(|| "write the L1 table")?;
            }
        }
        Ok(())
    }

    /// All of the batch is on stable storage.
    fn settle(&mut self, image: &Inner, writer: &Writer) -> Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        for (l1_index, entries) in self.by_table(image) {
            let (table, _) = image.tables.loaded(l1_index)?;
            image.tables.set_linked(l1_index, HostOffset(table.home.load(Ordering::Relaxed)))?;
            for (index, state) in entries {
                if let Some(entry) = table.entries.get(index).filter(|_| state.allocated() != 0) {
                    entry.set_home(entry.home().settled());
                }
            }
        }
        self.batch.clear();
        let mut core = writer.core();
        core.unflushed = 0;
        core.journal.drop_older()
    }
}

/// Writes a table that nothing on disk names: what of it was published is all in `entries`.
fn write_whole_table(image: &Inner, table: &Table, entries: &[(usize, State)]) -> Result<()> {
    let size = image.geometry.entry_size() as usize;
    let mut bytes = vec![0; image.geometry.cluster_size() as usize];
    for (index, state) in entries {
        let mut encoded = Vec::with_capacity(size);
        encode_entry(image, table, *index, *state, &mut encoded);
        if let Some(place) = bytes.get_mut(index * size..(index + 1) * size) {
            place.copy_from_slice(&encoded);
        }
    }
    let at = table.home.load(Ordering::Relaxed);
    image.storage.write_at(&bytes, at).context(|| "write a new L2 table")
}

/// Writes `entries`, in order of their indices, each run of neighbours in one go.
fn write_entries(image: &Inner, table: &Table, entries: &[(usize, State)]) -> Result<()> {
    let at = table.home.load(Ordering::Relaxed);
    let mut bytes = Vec::new();
    for run in entries.chunk_by(|(one, _), (next, _)| one + 1 == *next) {
        bytes.clear();
        run.iter().for_each(|(index, state)| encode_entry(image, table, *index, *state, &mut bytes));
        let first = run.first().map_or(0, |(index, _)| *index as u64);
        image.storage.write_at(&bytes, at + first * image.geometry.entry_size())?;
    }
    Ok(())
}

fn encode_entry(image: &Inner, table: &Table, index: usize, state: State, out: &mut Vec<u8>) {
    let home = table.entries.get(index).map(crate::table::Entry::home).unwrap_or_default();
    encode(image.geometry, home, state, out);
}
