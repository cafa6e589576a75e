//! What a job's thread does: find its layers, copy, switch.
//!
//! ```text
//!   prepare   plan; pivot if the active layer takes part; which way; targets open for writing; the manifest says so
//!   copy      nothing that anybody reads changes; pauses, limits, and the guest's latency are heeded; can be called off
//!   switch    (see `switch`) headers, manifest, chains; the rest is removed
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Disk, Error, ErrorKind, Result};
use tracing::{info, warn};

use super::copy::Merge;
use super::job::{Halt, Job};
use super::model::JobStatus;
use super::pace::Courtesy;
use super::plan::{Segment, doomed, plan, replan};
use super::record::{Direction, JobRecord, Move, Task};
use super::world::World;
use crate::group::Served;
use crate::layer::{Access, JOB_TABLE_BYTES, LET_GO, LOOK_AGAIN, Layer, MAX_PENDING};
use crate::manifest::Manifest;
use crate::marks::Draft;
use crate::model::Grade;

/// After so many bytes what was copied is synced and the manifest told: as much may be copied again after a kill.
const CHECKPOINT: u64 = 256 << 20;

/// What ends a job's work early.
pub(super) type Done<T> = std::result::Result<T, Halt>;

/// One job's work.
pub(super) struct Work<'a> {
    pub(super) world: &'a World,
    pub(super) job: &'a Job,
    pub(super) task: &'a Task,
}

/// One disk's part of it.
pub(super) struct Part {
    pub(super) served: Served,
    /// Those that become one, the lowest first.
    pub(super) layers: Vec<Arc<Layer>>,
    /// `None` until it is chosen.
    pub(super) direction: Option<Direction>,
    /// Nothing is beneath them.
    pub(super) on_nothing: bool,
    /// Copied up to here by an earlier run.
    copied: u64,
}

impl Part {
    pub(super) fn disk(&self) -> &str {
        self.served.chain.id()
    }

    /// The layer that stays; the first and the last of them are there.
    pub(super) fn target(&self) -> Result<&Arc<Layer>> {
        let target = match self.direction {
            Some(Direction::Down) => self.layers.first(),
            Some(Direction::Up) => self.layers.last(),
            None => None,
        };
        target.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "no layers to merge"))
    }

    /// Those that go.
    pub(super) fn dropped(&self) -> &[Arc<Layer>] {
        let parts = match self.direction {
            Some(Direction::Down) => self.layers.split_first(),
            Some(Direction::Up) => self.layers.split_last(),
            None => None,
        };
        parts.map_or(&[], |(_, rest)| rest)
    }

    fn merge(&self, direction: Direction) -> Result<Merge> {
        // A base image goes with the backing files of its own: nothing of the chain names them any more.
        let takes_all = direction == Direction::Up && self.on_nothing;
        let own =
            self.layers.first().filter(|_| takes_all).map(|base| base.own_backing()).unwrap_or_default();
        let layers: Vec<_> =
            own.into_iter().chain(self.layers.iter().map(|layer| Arc::clone(layer) as _)).collect();
        Merge::new(&layers, direction, self.on_nothing)
    }

    fn record(&self) -> Option<Move> {
        let (lowest, highest) = (self.layers.first()?.entry.number, self.layers.last()?.entry.number);
        let (disk, direction, copied) = (self.disk().to_owned(), self.direction?, self.copied);
        Some(Move { disk, direction, lowest, highest, copied })
    }
}

impl<'a> Work<'a> {
    pub(super) fn new(world: &'a World, job: &'a Job, task: &'a Task) -> Self {
        Self { world, job, task }
    }

    /// All of it. On an error everything reads as before; if the job was not merely stopped, it is forgotten.
    pub(super) fn run(&self) -> Done<()> {
        self.job.go(JobStatus::Running)?;
        let mut parts = Vec::new();
        let worked = self.work(&mut parts);
        let ended = worked.or_else(|halt| {
            let is_stopped = matches!(halt, Halt::Stopped);
            if !is_stopped {
                self.job.go(JobStatus::Aborting)?;
            }
            self.put_away(&parts, is_stopped);
            Err(halt)
        });
        parts.iter().for_each(|part| self.close(part));
        ended
    }

    fn work(&self, parts: &mut Vec<Part>) -> Done<()> {
        self.job.pause_point(Duration::ZERO)?;
        self.prepare(parts)?;
        let mut total = 0;
        for part in parts.iter_mut() {
            total += self.choose(part)?;
        }
        self.job.set_total(total);
        for part in parts.iter() {
            self.open_target(part)?;
        }
        self.announce(parts)?;
        for index in 0..parts.len() {
            self.copy(parts, index)?;
        }
        if matches!(self.task, Task::Commit { by_hand: true, .. }) {
            self.job.ready_point()?;
        }
        self.switch(parts)
    }

    fn own_record(&self) -> Result<JobRecord> {
        let manifest = self.world.store.manifest();
        let found = manifest.jobs.iter().find(|record| record.id == self.job.identity.id);
        found.cloned().ok_or_else(|| Error::new(ErrorKind::NotFound, "the job is not in the manifest"))
    }

    /// Finds the layers, and puts new ones on those that are active.
    fn prepare(&self, parts: &mut Vec<Part>) -> Done<()> {
        let exclusive = self.world.exclusive(self.job)?;
        let record = self.own_record()?;
        let segments = {
            let manifest = self.world.store.manifest();
            match record.moves.is_empty() {
                true => plan(&manifest, self.task)?,
                // Snapshots and reverts may have changed the chain since. What was merged until then does no harm.
                false => {
                    replan(&manifest, &record.moves, self.task).or_else(|_| plan(&manifest, self.task))?
                }
            }
        };
        for segment in &segments {
            let served = self.world.chain(&segment.disk)?;
            if segment.with_last && !served.chain.read_only() {
                self.pivot(&served)?;
            }
            let copied = |one: &&Move| {
                one.disk == segment.disk
                    && Some(one.direction) == segment.direction
                    && segment.layers.first().is_some_and(|layer| layer.number == one.lowest)
                    && segment.layers.last().is_some_and(|layer| layer.number == one.highest)
            };
            let copied = record.moves.iter().find(copied).map_or(0, |one| one.copied);
            parts.push(part(served, segment, copied)?);
        }
        drop(exclusive);
        // Not while a cut may be waiting: it may take as long as the host needs to write.
        parts.iter().try_for_each(|part| crate::group::seal(&self.world.store, &part.served.chain))?;
        Ok(())
    }

    /// Which way is shorter, if that is left open. Bytes to be copied.
    fn choose(&self, part: &mut Part) -> Done<u64> {
        let measure = |direction| part.merge(direction)?.measure(|| self.job.pause_point(Duration::ZERO));
        let bytes = match part.direction {
            Some(direction) => (direction, measure(direction)?),
            None => {
                let (down, up) = (measure(Direction::Down)?, measure(Direction::Up)?);
                if up < down { (Direction::Up, up) } else { (Direction::Down, down) }
            }
        };
        part.direction = Some(bytes.0);
        Ok(bytes.1)
    }

    /// A job that goes on after a kill may find the image still held by the process that was killed.
    fn open_target(&self, part: &Part) -> Done<()> {
        let deadline = Instant::now() + LET_GO;
        loop {
            let access = Access::Job { journals: self.world.store.journals() };
            match part.target()?.begin_writing(part.disk(), JOB_TABLE_BYTES, access) {
                Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                    self.job.wait(LOOK_AGAIN)?;
                }
                opened => return Ok(opened?),
            }
        }
    }

    /// Writes down what is about to be done, before the first byte of it, and what the layers tell of changes that they will
    /// not tell any more.
    fn announce(&self, parts: &[Part]) -> Done<()> {
        let spoils = parts.iter().any(|part| part.direction == Some(Direction::Down));
        let spoiled: Vec<_> = doomed(self.task).into_iter().filter(|_| spoils).collect();
        // Until the manifest says that it goes, nobody begins to read it.
        let _closed =
            spoiled.iter().map(|name| self.world.readers.close(name)).collect::<Result<Vec<_>>>()?;
        let mut draft = Draft::new(&self.world.store);
        draft.manifest.deleting.extend(doomed(self.task).into_iter().map(str::to_owned));
        for part in parts {
            // Not a pause: nobody else changes marks meanwhile.
            draft.fold_merge(part.disk(), &part.layers, &mut || self.job.wait(Duration::ZERO))?;
        }
        draft.commit(|manifest| {
            for record in manifest.jobs.iter_mut().filter(|record| record.id == self.job.identity.id) {
                record.moves = parts.iter().filter_map(Part::record).collect();
            }
            for part in parts {
                let target = part.target()?.entry.number;
                for layer in &part.layers {
                    let is_sealed = layer.entry.number != target && !layer.has_failed();
                    manifest.set_sealed(part.disk(), layer.entry.number, is_sealed);
                }
            }
            spoiled.iter().for_each(|name| mark_deleting(manifest, name));
            Ok(())
        })?;
        Ok(())
    }

    fn copy(&self, parts: &mut [Part], index: usize) -> Done<()> {
        let Some((part, direction)) = parts.get(index).and_then(|part| Some((part, part.direction?))) else {
            return Ok(());
        };
        let (target, merge) = (Arc::clone(part.target()?), part.merge(direction)?);
        let capacity = part.layers.last().map_or(0, |highest| highest.disk().capacity());
        if target.disk().capacity() < capacity {
            // The disk has grown since: what a shorter layer lacks at its end reads as zeroes, and so it does now.
            target.grow(capacity)?;
        }
        let pulse = Arc::clone(part.served.chain.pulse());
        let (mut offset, mut buffer, mut unsynced) = (part.copied, Vec::new(), 0);
        let mut courtesy = Courtesy::new(pulse.read());
        while let Some((end, bytes)) = merge.step(offset, &mut buffer)? {
            (offset, unsynced) = (end, unsynced + bytes);
            let mut rest = Duration::ZERO;
            if bytes > 0 {
                self.job.copied(bytes);
                rest = courtesy.rest(pulse.read(), Instant::now());
            }
            if unsynced >= CHECKPOINT || target.pending() > MAX_PENDING {
                target.flush()?;
                self.checkpoint(parts, index, offset)?;
                unsynced = 0;
            }
            let start = Instant::now();
            self.job.pause_point(rest)?;
            courtesy.rested(pulse.read(), start.elapsed(), Instant::now());
        }
        let rested_ms = courtesy.total().as_millis();
        info!(job = self.job.identity.id, rested_ms, "all is copied");
        target.seal();
        target.flush()?;
        self.checkpoint(parts, index, offset)?;
        Ok(())
    }

    fn checkpoint(&self, parts: &mut [Part], index: usize, offset: u64) -> Result<()> {
        if let Some(part) = parts.get_mut(index) {
            part.copied = offset;
        }
        self.world.store.update(|manifest| {
            for record in manifest.jobs.iter_mut().filter(|record| record.id == self.job.identity.id) {
                record.moves = parts.iter().filter_map(Part::record).collect();
            }
            Ok(())
        })
    }

    /// Ends what was begun and did not come to its end. What was copied stays where it is: it is not seen.
    fn put_away(&self, parts: &[Part], is_stopped: bool) {
        let mut synced = Vec::new();
        for part in parts {
            let Ok(target) = part.target() else { continue };
            match self.finish(part.disk(), target) {
                Ok(()) => synced.push((part.disk().to_owned(), target.entry.number)),
                // Its mark stays: the next one who opens it brings it in order.
                Err(error) => warn!(%error, "a layer that a job wrote to is not synced"),
            }
        }
        let updated = self.world.store.update(|manifest| {
            if !is_stopped {
                manifest.jobs.retain(|record| record.id != self.job.identity.id);
            }
            synced.iter().for_each(|(disk, number)| manifest.set_sealed(disk, *number, true));
            Ok(())
        });
        if let Err(error) = updated {
            warn!(%error, job = self.job.identity.id, "a job that has ended would be begun again by a restart");
        }
        if is_stopped {
            return;
        }
        // The next job may use the room again that this one gave back, and the chain's map may still name it.
        let exclusive = self.world.exclusive_at_last();
        for part in parts {
            let layers = part.served.chain.layers().clone();
            part.served.chain.relayer(layers, part.served.how);
        }
        drop(exclusive);
    }

    /// A target that is written no more: synced, without what a writer needs, and open to other readers.
    pub(super) fn finish(&self, disk: &str, target: &Layer) -> Result<()> {
        target.seal();
        let synced = target.flush();
        if synced.is_ok() {
            self.world.store.layer_sealed(disk, target)?;
            target.settle(disk);
            return Ok(());
        }
        if target.has_failed() {
            target.forsake(disk, self.world.store.journals())?;
        }
        target.share()?;
        synced
    }

    /// Closes a chain that was opened for this job alone.
    fn close(&self, part: &Part) {
        if self.world.disks.contains_key(part.disk()) {
            return;
        }
        if let Err(error) = part.served.chain.flush().run() {
            warn!(disk = part.disk(), %error, "the tables of a disk that is not served are in its journal only");
        }
    }
}

fn part(served: Served, segment: &Segment, copied: u64) -> Result<Part> {
    let numbers: Vec<_> = segment.layers.iter().map(|layer| layer.number).collect();
    let (layers, first) = {
        let all = served.chain.layers();
        let is_in = |layer: &&Arc<Layer>| numbers.contains(&layer.entry.number);
        (all.iter().filter(is_in).cloned().collect::<Vec<_>>(), all.first().map(|base| base.entry.number))
    };
    if layers.len() != numbers.len() {
        return Err(served.chain.closed());
    }
    let on_nothing = numbers.first().copied() == first;
    // The image that the user gave is not removed, so what is above it goes into it.
    let into_base = numbers.first() == Some(&0);
    let direction = segment.direction.or(into_base.then_some(Direction::Down));
    Ok(Part { served, layers, direction, on_nothing, copied })
}

/// From here on the images of the snapshot may hold neither what they held nor yet what the disk shows.
fn mark_deleting(manifest: &mut Manifest, name: &str) {
    manifest.deleting.insert(name.to_owned());
    for snapshot in manifest.snapshots.iter_mut().filter(|snapshot| snapshot.name == name) {
        snapshot.grade = Grade::Crash;
        snapshot.reason = "its deletion was begun, its images hold it no more: delete it again".to_owned();
    }
}
