//! Requests that overlap in time, in random but reproducible orders: writes held open before or after their data went
//! out, zeroing and discards beside them in the same subclusters, flushes that stop between any two steps, writes that
//! fail, kills and losses of power anywhere. Only bytes that two requests would share are kept apart.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Poll, Waker};

use block::testing::{CrashStorage, MemStorage, Random};
use block::{ByteRange, Disk, Extent, Flush, FlushStep, RawDisk, Source, Storage, WriteGuard, read_disk};
use qcow2::{Image, Mode, Parts};
use support::{Files, Hook, Hooked, check, contents, options, small_clusters};

const CAPACITY: u64 = 390 * 512;

/// A file that loses unsynced sectors with the power, and one write when it is told to.
#[derive(Debug, Default)]
struct Flaky {
    inner: CrashStorage,
    /// The write that fails, counted from now on; zero if none does.
    fails: AtomicU64,
}

impl Hooked for Flaky {
    fn inner(&self) -> &dyn Storage {
        &self.inner
    }

    fn write(&self, buf: &[u8], offset: u64) -> block::Result<()> {
        let fails = self.fails.load(Ordering::Relaxed);
        self.fails.store(fails.saturating_sub(1), Ordering::Relaxed);
        if fails == 1 {
            // Half of it went out.
            self.inner.write_at(&buf[..buf.len() / 2], offset)?;
            return Err(block::Error::new(block::ErrorKind::Io, "injected: input/output error"));
        }
        self.inner.write_at(buf, offset)
    }
}

struct Held {
    guard: WriteGuard,
    range: ByteRange,
    new: Vec<u8>,
    extents: Vec<Extent>,
    written: bool,
}

struct Flushing {
    flush: Box<dyn Flush>,
    /// Asked for, and not done yet.
    syncs: Vec<Arc<dyn Storage>>,
    /// What the disk held when the flush was asked for, and how many patches there were then.
    contents: Vec<u8>,
    mark: usize,
}

struct World {
    random: Random,
    storage: Arc<Hook<Flaky>>,
    journal: [Arc<Hook<Flaky>>; 2],
    base: Arc<dyn Disk>,
    files: Files,
    image: Image,
    /// What a read shows; of what is held, what was there before.
    expected: Vec<u8>,
    held: Vec<Held>,
    flushes: Vec<Flushing>,
    /// What is on stable storage for sure, but for the patches: a byte may have either's value.
    durable: Vec<u8>,
    patches: Vec<(usize, Vec<u8>)>,
    dropped_patches: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let bytes: Vec<u8> = (0..CAPACITY / 1024 * 512).map(|at| (at / 512 + 1) as u8).collect();
        let mut expected = bytes.clone();
        expected.resize(CAPACITY as usize, 0);
        let base: Arc<dyn Disk> = Arc::new(RawDisk::new(Arc::new(MemStorage::from(bytes)), true).unwrap());
        let storage = Arc::new(Hook::<Flaky>::default());
        match seed % 3 {
            0 => small_clusters(&*storage, CAPACITY),
            kind => qcow2::create(&*storage, &options(CAPACITY, 16, kind == 1)).unwrap(),
        }
        let journal = [Arc::new(Hook::<Flaky>::default()), Arc::new(Hook::<Flaky>::default())];
        let files = Files { image: storage.clone(), journal: journal.clone().map(|half| half as _) };
        let image = files.open(Some(base.clone())).unwrap();
        Self {
            random: Random(seed),
            storage,
            journal,
            base,
            files,
            image,
            durable: expected.clone(),
            expected,
            held: Vec::new(),
            flushes: Vec::new(),
            patches: Vec::new(),
            dropped_patches: 0,
        }
    }

    /// A range that no held write is in.
    fn free_range(&mut self) -> Option<ByteRange> {
        let sectors = 1 + self.random.below([2, 12, 80][self.random.0 as usize % 3]);
        let first = self.random.below(CAPACITY / 512);
        let range = ByteRange { offset: first * 512, len: (sectors * 512).min(CAPACITY - first * 512) };
        self.held.iter().all(|held| held.range.intersect(range).is_none()).then_some(range)
    }

    fn read(&self, range: ByteRange) -> Vec<u8> {
        let mut found = vec![0; range.len as usize];
        read_disk(&self.image, range.offset, &mut found).unwrap();
        found
    }

    /// The disk now shows these bytes there.
    fn expect(&mut self, at: u64, bytes: Vec<u8>) {
        self.expected[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        self.patches.push((at as usize, bytes));
    }

    /// After something that may or may not have been done: all bytes are old or new, and stay what they are now.
    fn expect_either(&mut self, range: ByteRange, new: &[u8]) {
        self.patches.push((range.offset as usize, new.to_vec()));
        let found = self.read(range);
        let old = &self.expected[range.offset as usize..];
        for (index, byte) in found.iter().enumerate() {
            assert!(*byte == old[index] || *byte == new[index], "byte {index} of {range:?}");
        }
        self.expect(range.offset, found);
    }

    fn hold(&mut self) {
        let Some(range) = self.free_range() else { return };
        let new = vec![self.random.number() as u8; range.len as usize];
        let mut extents = Vec::new();
        // One that waits, or fails, is given up.
        let resolved = self.image.resolve_write(range, Waker::noop(), &mut extents);
        let Poll::Ready(Ok(guard)) = resolved else { return };
        self.patches.push((range.offset as usize, new.clone()));
        self.held.push(Held { guard, range, new, extents, written: false });
    }

    fn write_data(held: &mut Held) -> block::Result<()> {
        let mut rest = &held.new[..];
        for Extent { len, source } in &held.extents {
            let Source::File { storage, offset } = source else { panic!("a write to nowhere") };
            let (part, after) = rest.split_at(*len as usize);
            storage.write_at(part, *offset)?;
            rest = after;
        }
        held.written = true;
        Ok(())
    }

    fn go_on_with_held(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let index = self.random.below(self.held.len() as u64) as usize;
        let mut held = self.held.swap_remove(index);
        let wanted = self.random.below(8);
        let written = if held.written || wanted == 0 { Ok(()) } else { Self::write_data(&mut held) };
        match wanted {
            0 | 1 => drop(held.guard),
            2 | 3 if written.is_ok() => return self.held.push(held),
            _ if written.is_ok() && held.guard.complete().is_ok() => {
                return self.expect(held.range.offset, held.new);
            }
            _ => {}
        }
        self.expect_either(held.range, &held.new);
    }

    fn clear(&mut self) {
        let Some(range) = self.free_range() else { return };
        let zeroes = vec![0; range.len as usize];
        let done = match self.random.below(3) {
            0 => self.image.discard(range, Waker::noop()).map(|done| done.map(|()| false)),
            unmap => {
                self.image.write_zeroes(range, unmap == 1, Waker::noop()).map(|done| done.map(|()| true))
            }
        };
        match done {
            Poll::Ready(Ok(true)) => self.expect(range.offset, zeroes),
            // Advice, given up while it waited, or failed half-way.
            _ => self.expect_either(range, &zeroes),
        }
    }

    fn begin_flush(&mut self) {
        if self.flushes.len() == 2 {
            return;
        }
        let mark = self.dropped_patches + self.patches.len();
        self.patches.extend(self.held.iter().map(|held| (held.range.offset as usize, held.new.clone())));
        let (flush, contents) = (self.image.flush(), self.expected.clone());
        self.flushes.push(Flushing { flush, syncs: Vec::new(), contents, mark });
    }

    fn step_flush(&mut self) {
        if self.flushes.is_empty() {
            return;
        }
        let index = self.random.below(self.flushes.len() as u64) as usize;
        let mut flushing = self.flushes.swap_remove(index);
        if self.random.below(8) == 0 {
            return;
        }
        flushing.syncs.drain(..).for_each(|storage| storage.sync().unwrap());
        let step = flushing.flush.step(Ok(()), Waker::noop());
        if self.random.below(3) == 0 {
            self.lose_power();
        }
        match step {
            Poll::Pending => self.flushes.push(flushing),
            Poll::Ready(Ok(FlushStep::Sync(syncs))) => self.flushes.push(Flushing { syncs, ..flushing }),
            Poll::Ready(Ok(FlushStep::Done)) if flushing.mark > self.dropped_patches => {
                self.patches.drain(..flushing.mark - self.dropped_patches);
                (self.durable, self.dropped_patches) = (flushing.contents, flushing.mark);
            }
            Poll::Ready(Ok(FlushStep::Done) | Err(_)) => {}
        }
    }

    /// The process dies, and another one goes on.
    fn kill(&mut self) {
        for file in [&self.storage, &self.journal[0], &self.journal[1]] {
            file.0.fails.store(0, Ordering::Relaxed);
        }
        self.flushes.clear();
        let held = std::mem::take(&mut self.held);
        self.image = self.files.open(Some(self.base.clone())).unwrap();
        assert!(self.image.is_clean());
        held.iter().for_each(|held| self.expect_either(held.range, &held.new));
        self.compare();
    }

    fn compare(&self) {
        let mut found = contents(&self.image);
        for held in &self.held {
            let (at, len) = (held.range.offset as usize, held.range.len as usize);
            for (index, byte) in found[at..at + len].iter_mut().enumerate() {
                let old = self.expected[at + index];
                assert!(*byte == old || *byte == held.new[index], "byte {index} of {:?}, held", held.range);
                *byte = old;
            }
        }
        support::assert_same(&found, &self.expected, "contents");
    }

    /// What losing the power now could leave is an image without a fault, in which every byte has a value that it had
    /// since the last flush.
    fn lose_power(&mut self) {
        for chance in [0, 100, 50, 90] {
            let left = self.storage.0.inner.after_power_loss(|| self.random.below(100) < chance);
            let verdict = check(&left.bytes());
            assert!(verdict.errors.is_empty(), "after the loss of power: {:?}", verdict.errors);
            let image =
                Image::open(Parts::new(Arc::new(left), Some(self.base.clone())), Mode::ReadOnly).unwrap();
            let found = contents(&image);
            let mut known: Vec<bool> = found.iter().zip(&self.durable).map(|(a, b)| a == b).collect();
            for (at, bytes) in &self.patches {
                for (index, byte) in bytes.iter().enumerate() {
                    known[at + index] |= found[at + index] == *byte;
                }
            }
            let strange = known.iter().position(|known| !known);
            assert_eq!(strange, None, "neither old nor new after the loss of power");
        }
    }

    fn fail_a_write(&mut self) {
        let file =
            [&self.storage, &self.storage, &self.journal[0], &self.journal[1]][self.random.below(4) as usize];
        file.0.fails.store(1 + self.random.below(12), Ordering::Relaxed);
    }

    fn step(&mut self) {
        match self.random.below(40) {
            0..=9 => self.hold(),
            10..=18 => self.go_on_with_held(),
            19..=23 => self.clear(),
            24..=25 => self.begin_flush(),
            26..=34 => self.step_flush(),
            35 => self.fail_a_write(),
            36 => self.lose_power(),
            37 if self.random.below(4) == 0 => self.kill(),
            _ => self.compare(),
        }
    }
}

#[test]
fn requests_in_any_order_lose_nothing_of_each_other() {
    for seed in 60..120 {
        let run = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            (0..200).for_each(|_| world.step());
            world.lose_power();
            world.kill();
            assert!(check(&world.storage.0.inner.after_power_loss(|| true).bytes()).errors.is_empty());
        });
        assert!(run.is_ok(), "seed {seed}");
    }
}

/// A flush named a new L2 table in the L1 table, and was given up before that was synced. The next one must not put
/// entries into the table before what they name is durable: the L1 entry may be on the disk by now.
#[test]
fn a_new_table_whose_link_was_not_synced_is_not_written_over() {
    let storage = Arc::new(CrashStorage::new());
    let files = Files::new(storage.clone(), &options(1 << 20, 16, true));
    let image = files.open(None).unwrap();
    block::write_disk(&image, 0, &[7; 4096]).unwrap();
    let mut flush = image.flush();
    for last in [false, true] {
        let step = flush.step(Ok(()), Waker::noop());
        let Poll::Ready(Ok(FlushStep::Sync(storages))) = step else { panic!("{step:?}") };
        if !last {
            storages.iter().for_each(|storage| storage.sync().unwrap());
        }
    }
    drop(flush);
    block::write_disk(&image, 1 << 17, &[8; 4096]).unwrap();
    let mut flush = image.flush();
    assert!(matches!(flush.step(Ok(()), Waker::noop()), Poll::Ready(Ok(FlushStep::Sync(_)))));
    let mut random = Random(1);
    for _ in 0..200 {
        let left = storage.after_power_loss(|| random.below(2) == 0);
        assert_eq!(check(&left.bytes()).errors, Vec::<String>::new());
    }
    flush.run().unwrap();
    assert_eq!(check(&storage.after_power_loss(|| false).bytes()).errors, Vec::<String>::new());
    assert!(image.is_clean());
}
