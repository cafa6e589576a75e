//! Flushing: the batch of published changes becomes durable, in an order that a loss of power can not hurt.
//!
//! ```text
//!   take batch ─▶ refcounts, whole new tables ─▶ SYNC ─▶ L2 entries, L1 entries ─▶ SYNC ─▶ journal half dropped,
//!                                          └─▶ (new refcount blocks, or a table: their names ─▶ SYNC) ─┘   freed clusters
//! ```
//!
//! The first sync also makes the batch's *data* durable: it was written before it was published. What is published
//! after the batch was taken is not part of it and stays out of the tables, for its data may not be on the disk.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use block::{Error, Flush, FlushStep, Result, Storage};

use crate::image::{Inner, Writer};
use crate::work::Work;

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
    pub(crate) fn new(work: Work) -> Self {
        Self { idle: Some(Box::new(work)), begun: 0, succeeded: 0, waiting: Vec::new() }
    }

    /// The work, if no flush is under way: for who changes what a flush needs. To be given back.
    pub(crate) fn borrow(&mut self, waker: &Waker) -> Poll<Box<Work>> {
        match self.idle.take() {
            Some(work) => Poll::Ready(work),
            None => {
                if !self.waiting.iter().any(|waiting| waiting.will_wake(waker)) {
                    self.waiting.push(waker.clone());
                }
                Poll::Pending
            }
        }
    }

    /// Takes the work back. Those who waited for it are to be woken once the lock is let go of.
    pub(crate) fn give_back(&mut self, work: Box<Work>) -> Vec<Waker> {
        self.idle = Some(work);
        std::mem::take(&mut self.waiting)
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
    /// Refcounts and whole new tables.
    Counts,
    /// The names of refcount blocks, or that of a table.
    Link,
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
        let next = match self.stage {
            Stage::Waiting => {
                work.take_batch(&image, writer);
                work.write_counts(&image, writer).map(|()| match work.is_empty(writer) {
                    // With nothing in the batch one sync, for the data, is all.
                    true => Stage::Mapping,
                    false => Stage::Counts,
                })
            }
            Stage::Counts | Stage::Link => {
                if matches!(self.stage, Stage::Link) {
                    work.linked();
                }
                match work.refcounts.link(&*image.storage) {
                    Ok(true) => Ok(Stage::Link),
                    Ok(false) => work.write_mapping(&image, writer).map(|()| Stage::Mapping),
                    Err(error) => Err(error),
                }
            }
            Stage::Mapping => {
                let settled = work.settle(&image, writer);
                self.end(writer, settled.is_ok());
                return Poll::Ready(settled.map(|()| FlushStep::Done));
            }
        };
        Poll::Ready(next.map(|stage| {
            self.stage = stage;
            FlushStep::Sync(image.files())
        }))
    }

    /// `true` if another flush has done it all, `false` if it is this one's turn.
    fn take_turn(&mut self, writer: &Writer, waker: &Waker) -> Poll<bool> {
        let mut flushes = writer.flushes();
        if flushes.succeeded > self.before {
            return Poll::Ready(true);
        }
        flushes.borrow(waker).map(|work| {
            flushes.begun += 1;
            (self.number, self.work) = (flushes.begun, Some(work));
            false
        })
    }

    /// Hands the work on, to whoever is next.
    fn end(&mut self, writer: &Writer, succeeded: bool) {
        let Some(work) = self.work.take() else { return };
        let waiting = {
            let mut flushes = writer.flushes();
            if succeeded {
                flushes.succeeded = self.number;
            }
            flushes.give_back(work)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Inner {
    /// The files that hold the image.
    pub(crate) fn files(&self) -> Vec<Arc<dyn Storage>> {
        let mut files = vec![Arc::clone(&self.storage)];
        if self.geometry.external {
            files.push(Arc::clone(&self.data));
        }
        files
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
