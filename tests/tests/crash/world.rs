//! A life: a guest that writes, and an operator who takes snapshots, commits, streams and resizes meanwhile.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::testing::{FaultStorage, MemStorage, Random};
use block::{
    ByteRange, Disk, FlushStep, Layer, Place, RawDisk, Stack, Storage, blocking, read_disk, write_disk,
};
use qcow2::{CreateOptions, Image, Journal, Mode};

use crate::base;
use crate::left::{CACHE, parts};
use crate::timeline::{Forget, Recorded, Timeline};

/// What holds from some moment on, whatever happens to the power.
#[derive(Clone, Debug)]
pub(crate) enum Mark {
    /// The disk may show this as well: it was asked for.
    Contents(Arc<Vec<u8>>),
    /// Nothing that was there before the contents of that number.
    Flushed(usize),
    /// The manifest names these images, the base first, and holds these snapshots: the image of that number, with all
    /// that is beneath it, shows this. It is replaced as a whole, and synced.
    Manifest(Vec<Named>, Vec<Snapshot>),
}

/// A sealed snapshot: the number of the image that holds it, and what it shows.
pub(crate) type Snapshot = (u32, Arc<Vec<u8>>);

/// An image in the manifest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named {
    pub(crate) number: u32,
    pub(crate) raw: bool,
}

/// One image, its file and its journal.
#[derive(Clone)]
struct File {
    named: Named,
    storage: Arc<Recorded>,
    journal: [Arc<FaultStorage>; 2],
}

impl File {
    fn new(number: u32, raw: bool, timeline: &Arc<Timeline>) -> Self {
        let memory = || Arc::new(FaultStorage::new(MemStorage::default()));
        let named = Named { number, raw };
        Self { named, storage: Recorded::new(number, timeline), journal: [memory(), memory()] }
    }

    fn name(&self) -> String {
        format!("{}.{}", self.named.number, self.format())
    }

    fn format(&self) -> &'static str {
        if self.named.raw { "raw" } else { "qcow2" }
    }

    fn open_for_writing(&self, beneath: &[Arc<dyn Layer>]) -> Arc<Image> {
        self.open_over((!beneath.is_empty()).then(|| Arc::new(Stack::new(beneath.to_vec(), CACHE))))
    }

    fn open_over(&self, backing: Option<Arc<Stack>>) -> Arc<Image> {
        let [a, b] = self.journal.clone();
        let journal = Journal::open(a, b, "this boot").unwrap();
        let parts = parts(Arc::clone(&self.storage) as _, backing);
        Arc::new(Image::open(parts, Mode::Writable(journal)).unwrap())
    }
}

/// The world while it lives.
pub(crate) struct World {
    random: Random,
    /// Where QEMU's tools make images.
    folder: PathBuf,
    pub(crate) timeline: Arc<Timeline>,
    /// The chain, the base first.
    files: Vec<File>,
    /// All but the active image, opened.
    beneath: Vec<Arc<dyn Layer>>,
    stack: Arc<Stack>,
    active: Arc<Image>,
    next: u32,
    contents: Arc<Vec<u8>>,
    /// How many contents there were.
    versions: usize,
    snapshots: Vec<Snapshot>,
}

/// The first capacity: no multiple of a cluster.
const CAPACITY: u64 = 782 * 512;

impl World {
    pub(crate) fn new(seed: u64, forget: Option<Forget>, folder: &Path) -> Self {
        let mut random = Random(seed);
        let timeline = Timeline::new(forget);
        let base = File::new(0, random.one_in(2), &timeline);
        let contents: Vec<u8> = (0..CAPACITY).map(|at| (at / 512 + 1) as u8).collect();
        let active = match base.named.raw {
            true => {
                base.storage.write_at(&contents, 0).unwrap();
                None
            }
            false => {
                let bytes = base::make(folder, &mut random, &contents);
                base.storage.write_at(&bytes, 0).unwrap();
                base.storage.sync().unwrap();
                Some(base.open_for_writing(&[]))
            }
        };
        base.storage.sync().unwrap();
        let world = Self::over(random, folder, timeline, base, active, Arc::new(contents));
        world.save();
        world
    }

    fn over(
        mut random: Random,
        folder: &Path,
        timeline: Arc<Timeline>,
        base: File,
        active: Option<Arc<Image>>,
        contents: Arc<Vec<u8>>,
    ) -> Self {
        timeline.mark(Mark::Contents(Arc::clone(&contents)));
        let mut files = vec![base];
        let (mut beneath, mut next): (Vec<Arc<dyn Layer>>, _) = (Vec::new(), 1);
        if active.is_none() {
            beneath.push(Arc::new(RawDisk::new(Arc::clone(&files[0].storage) as _, true).unwrap()));
        }
        let stack = Arc::new(Stack::new(beneath.clone(), CACHE));
        let active = active.unwrap_or_else(|| {
            files.push(File::new(1, false, &timeline));
            next = 2;
            create_overlay(folder, &mut random, &files[1], &files[0], CAPACITY);
            files[1].open_over(Some(Arc::clone(&stack)))
        });
        Self {
            random,
            folder: folder.to_owned(),
            timeline,
            files,
            beneath,
            stack,
            active,
            next,
            contents,
            versions: 1,
            snapshots: Vec::new(),
        }
    }

    /// Lives for so many steps.
    pub(crate) fn live(&mut self, steps: usize) {
        for _ in 0..steps {
            match self.random.below(20) {
                0 | 1 => self.snapshot(),
                2 => self.commit(),
                3 => self.stream(),
                4 => self.grow(),
                5..8 => self.flush(),
                _ => self.change(),
            }
        }
        self.flush();
    }

    fn begin(&self, operation: &'static str) {
        self.timeline.begin(operation);
    }

    /// Replaces the manifest.
    fn save(&self) {
        let images = self.files.iter().map(|file| file.named).collect();
        self.timeline.mark(Mark::Manifest(images, self.snapshots.clone()));
    }

    fn change(&mut self) {
        self.begin("write");
        let range = self.random.range(self.contents.len() as u64);
        let ByteRange { offset, len } = range;
        let mut next = (*self.contents).clone();
        let place = &mut next[offset as usize..][..len as usize];
        match self.random.below(6) {
            0 => {
                // It may be zero, or as it was, and the next contents say which.
                place.fill(0);
                self.timeline.mark(Mark::Contents(Arc::new(next.clone())));
                self.versions += 1;
                blocking(|waker| self.active.discard(range, waker)).unwrap();
                read_disk(&*self.active, 0, &mut next).unwrap();
            }
            1 => {
                place.fill(0);
                self.timeline.mark(Mark::Contents(Arc::new(next.clone())));
                self.versions += 1;
                blocking(|waker| self.active.write_zeroes(range, true, waker)).unwrap();
            }
            _ => {
                place.fill(self.random.number() as u8);
                let bytes = place.to_vec();
                self.timeline.mark(Mark::Contents(Arc::new(next.clone())));
                self.versions += 1;
                write_disk(&*self.active, offset, &bytes).unwrap();
            }
        }
        self.contents = Arc::new(next);
        self.timeline.mark(Mark::Contents(Arc::clone(&self.contents)));
        self.versions += 1;
    }

    /// A guest's flush. What is written while it is under way is no part of it.
    fn flush(&mut self) {
        self.begin("flush");
        let flushed = self.versions - 1;
        let mut flush = self.active.flush();
        while let FlushStep::Sync(storages) = blocking(|waker| flush.step(Ok(()), waker)).unwrap() {
            storages.iter().for_each(|storage| storage.sync().unwrap());
        }
        drop(flush);
        self.timeline.mark(Mark::Flushed(flushed));
    }

    /// The cut: the overlay is there and in the manifest before it is used; the seal comes later.
    fn snapshot(&mut self) {
        self.begin("create");
        let file = File::new(self.next, false, &self.timeline);
        self.next += 1;
        let top = self.files.last().unwrap();
        create_overlay(&self.folder, &mut self.random, &file, top, self.contents.len() as u64);
        let number = top.named.number;
        self.files.push(file.clone());
        self.save();
        let old = Arc::clone(&self.active);
        self.beneath.push(Arc::clone(&old) as _);
        self.stack = Arc::new(self.stack.with_layer(Arc::clone(&old) as _));
        let shown = Arc::clone(&self.contents);
        let flushed = self.versions - 1;
        old.seal();
        self.active = file.open_over(Some(Arc::clone(&self.stack)));
        (0..self.random.below(4)).for_each(|_| self.change());
        self.begin("seal");
        old.flush().run().unwrap();
        old.close().unwrap();
        self.snapshots.push((number, shown));
        self.save();
        // What was acknowledged before the cut is on stable storage with the seal.
        self.timeline.mark(Mark::Flushed(flushed));
    }
}

/// What an operator does to the chain.
impl World {
    fn grow(&mut self) {
        self.begin("grow");
        let more = 512 * (1 + self.random.below(300));
        let mut next = (*self.contents).clone();
        next.resize(next.len() + more as usize, 0);
        let next = Arc::new(next);
        self.timeline.mark(Mark::Contents(Arc::clone(&next)));
        self.versions += 1;
        self.active.grow(next.len() as u64).unwrap();
        self.contents = next;
    }

    /// Merges an image beneath the active one into the one beneath it.
    fn commit(&mut self) {
        let Some(index) = self.inner() else { return };
        let (target, merged) = (index - 1, index);
        let target_number = self.files[target].named.number;
        self.begin("commit");
        self.snapshots.retain(|(number, _)| *number != target_number);
        self.save();
        let from = Arc::clone(&self.beneath[merged]);
        match self.files[target].named.raw {
            true => {
                let storage = Arc::clone(&self.files[target].storage);
                if storage.len().unwrap() < from.capacity() {
                    storage.set_len(from.capacity()).unwrap();
                }
                merge(&*from, &RawDisk::new(storage as _, false).unwrap());
            }
            false => {
                let image = self.files[target].open_for_writing(&self.beneath[..target]);
                if image.capacity() < from.capacity() {
                    image.grow(from.capacity()).unwrap();
                }
                merge(&*from, &*image);
                image.seal();
                image.flush().run().unwrap();
                image.close().unwrap();
            }
        }
        self.reopen(target);
        self.drop_layer(merged, target);
    }

    /// Pulls what an image holds up into the one above it, which lacks it.
    fn stream(&mut self) {
        let Some(gone) = self.inner().filter(|index| index + 2 < self.files.len()) else { return };
        let into = gone + 1;
        self.begin("stream");
        let from = Arc::clone(&self.beneath[gone]);
        let image = self.files[into].open_for_writing(&self.beneath[..into]);
        for range in held(&*from) {
            pull(&*from, &image, range);
        }
        image.seal();
        image.flush().run().unwrap();
        image.close().unwrap();
        drop(image);
        self.reopen(into);
        let number = self.files[gone].named.number;
        self.snapshots.retain(|(held, _)| *held != number);
        self.remove(gone);
    }

    /// The index of an image that is neither the base nor the active one.
    fn inner(&mut self) -> Option<usize> {
        let choices = self.files.len().checked_sub(2).filter(|choices| *choices > 0)?;
        Some(1 + self.random.below(choices as u64) as usize)
    }

    /// Opens an image beneath the active one again, for reading.
    fn reopen(&mut self, index: usize) {
        let file = &self.files[index];
        let storage = Arc::clone(&file.storage) as Arc<dyn Storage>;
        self.beneath[index] = match file.named.raw {
            true => Arc::new(RawDisk::new(storage, true).unwrap()),
            false => Arc::new(Image::open(parts(storage, None), Mode::ReadOnly).unwrap()),
        };
    }

    /// The image at `merged` is in the one at `target` now, with the snapshot that it held.
    fn drop_layer(&mut self, merged: usize, target: usize) {
        let (from, to) = (self.files[merged].named.number, self.files[target].named.number);
        for (number, _) in self.snapshots.iter_mut().filter(|(number, _)| *number == from) {
            *number = to;
        }
        self.remove(merged);
    }

    /// Takes an image out of the chain: what is above it gets another name beneath, then the manifest another list.
    fn remove(&mut self, index: usize) {
        let beneath = &self.files[index - 1];
        let (name, format) = (beneath.name(), beneath.format());
        let above = index + 1;
        self.begin("set-backing");
        qcow2::set_backing(&*self.files[above].storage, Some((&name, format))).unwrap();
        self.files.remove(index);
        self.beneath.remove(index);
        self.save();
        self.stack.replace(&Stack::new(self.beneath.clone(), CACHE));
    }
}

/// Writes what a layer holds itself into the one beneath it.
fn merge(from: &dyn Layer, to: &dyn Disk) {
    held(from).into_iter().for_each(|range| copy(from, to, range));
    to.flush().run().unwrap();
}

/// Writes those bytes of `range` that `to` lacks.
fn pull(from: &dyn Layer, to: &Image, range: ByteRange) {
    let mut rest = range;
    while rest.len > 0 {
        let run = to.run_at(rest).unwrap();
        if run.place == Place::Absent {
            copy(from, to, run.range);
        }
        rest = ByteRange { offset: run.range.end(), len: rest.end() - run.range.end() };
    }
}

/// `range` is of one run.
fn copy(from: &dyn Layer, to: &dyn Disk, range: ByteRange) {
    if from.run_at(range).unwrap().place == Place::Zero {
        return blocking(|waker| to.write_zeroes(range, true, waker)).unwrap();
    }
    let mut bytes = vec![0; range.len as usize];
    read_disk(from, range.offset, &mut bytes).unwrap();
    write_disk(to, range.offset, &bytes).unwrap();
}

/// The runs that a layer holds.
fn held(layer: &dyn Layer) -> Vec<ByteRange> {
    let (mut offset, mut held) = (0, Vec::new());
    while offset < layer.capacity() {
        let run = layer.run_at(ByteRange { offset, len: layer.capacity() - offset }).unwrap();
        if run.place != Place::Absent {
            held.push(run.range);
        }
        offset = run.range.end();
    }
    held
}

/// As the daemon makes it; or as a user may give it, with a dirty bitmap of QEMU's.
fn create_overlay(folder: &Path, random: &mut Random, file: &File, beneath: &File, capacity: u64) {
    let (name, format) = (beneath.name(), beneath.format());
    if random.one_in(3) {
        let bytes = base::make_overlay(folder, random, (&name, format), capacity);
        file.storage.write_at(&bytes, 0).unwrap();
        file.storage.sync().unwrap();
    } else {
        let options = CreateOptions::overlay(capacity, Some((name, format.to_owned())));
        qcow2::create(&*file.storage, &options).unwrap();
    }
}
