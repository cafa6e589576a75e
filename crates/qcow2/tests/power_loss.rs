//! A host that loses its power: after any subset of the unsynced sectors reached the disk, the image is valid, what
//! was flushed is there, and every other sector holds its old or its new bytes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;

use block::testing::{CrashStorage, MemStorage, Random};
use block::{ByteRange, Disk, FlushStep, RawDisk, blocking, write_disk};
use qcow2::{Image, Mode, Parts};
use support::{Files, check, contents, memory, options, small_clusters, some_bytes};

const CAPACITY: u64 = 782 * 512;
const SECTOR: usize = 512;

struct World {
    random: Random,
    storage: Arc<CrashStorage>,
    base: Arc<dyn Disk>,
    files: Files,
    image: Image,
    /// All contents that the disk had since the last flush, the flushed one first.
    history: Vec<Vec<u8>>,
}

impl World {
    fn new(seed: u64) -> Self {
        let random = Random(seed);
        let mut bytes: Vec<u8> = (0..CAPACITY / 2).map(|at| (at / 512 + 1) as u8).collect();
        bytes.truncate(bytes.len() / SECTOR * SECTOR);
        let mut contents = bytes.clone();
        contents.resize(CAPACITY as usize, 0);
        let base: Arc<dyn Disk> = Arc::new(RawDisk::new(Arc::new(MemStorage::from(bytes)), true).unwrap());
        let storage = Arc::new(CrashStorage::new());
        let files = match seed % 3 {
            0 => {
                small_clusters(&*storage, CAPACITY);
                Files { image: storage.clone(), journal: [memory(), memory()] }
            }
            kind => Files::new(storage.clone(), &options(CAPACITY, 16, kind == 1)),
        };
        let image = files.open(Some(base.clone())).unwrap();
        Self { random, storage, base, files, image, history: vec![contents] }
    }

    fn write(&mut self) {
        let ByteRange { offset, len } = self.random.range(CAPACITY);
        let mut next = self.history.last().unwrap().clone();
        let place = &mut next[offset as usize..][..len as usize];
        if self.random.below(6) == 0 {
            let size = self.image.cluster_size();
            let start = offset / size * size;
            let bytes = some_bytes(&mut self.random, size.min(CAPACITY - start) as usize);
            self.image.write_compressed(start, &bytes).unwrap();
            next[start as usize..][..bytes.len()].copy_from_slice(&bytes);
        } else if self.random.below(4) == 0 {
            let range = ByteRange { offset, len };
            blocking(|waker| self.image.write_zeroes(range, true, waker)).unwrap();
            place.fill(0);
        } else {
            place.fill(self.random.number() as u8);
            write_disk(&self.image, offset, place).unwrap();
        }
        self.history.push(next);
    }

    /// Flushes step by step, losing power on the way at random: before each sync, and after it.
    fn flush(&mut self) -> Result<(), String> {
        let flushed = self.history.len() - 1;
        let mut flush = self.image.flush();
        loop {
            let step = blocking(|waker| flush.step(Ok(()), waker)).unwrap();
            self.lose_power()?;
            match step {
                FlushStep::Sync(storages) => storages.iter().for_each(|storage| storage.sync().unwrap()),
                FlushStep::Done => break,
            }
            self.lose_power()?;
            if self.random.below(2) == 0 {
                // Published while the flush is under way, and no part of it.
                self.write();
            }
        }
        self.history.drain(..flushed);
        Ok(())
    }

    /// Looks at what losing the power now could leave: nothing, all, and random subsets of the unsynced sectors.
    fn lose_power(&mut self) -> Result<(), String> {
        for round in 0..6 {
            let chance = [0, 100, 50, 50, 10, 90][round];
            let left = self.storage.after_power_loss(|| self.random.below(100) < chance);
            self.inspect(left)?;
        }
        Ok(())
    }

    fn inspect(&self, left: MemStorage) -> Result<(), String> {
        let verdict = check(&left.bytes());
        if !verdict.errors.is_empty() {
            return Err(format!("{:?}", verdict.errors));
        }
        // The file is opened for writing, as the daemon would, on another boot: the journal is not believed.
        let files = Files { image: Arc::new(left), journal: self.files.journal.clone() };
        let open = |mode| Image::open(Parts::new(files.image.clone(), Some(self.base.clone())), mode);
        let image = open(Mode::ReadOnly).map_err(|error| error.to_string())?;
        let found = contents(&image);
        for (index, sector) in found.chunks(SECTOR).enumerate() {
            let at = index * SECTOR;
            // A write of a part of a sector reads the rest of it, so parts count each for themselves.
            let known = |(n, byte): (usize, &u8)| self.history.iter().any(|old| old[at + n] == *byte);
            if !sector.iter().enumerate().all(known) {
                return Err(format!("the sector at {at:#x} holds neither old nor new"));
            }
        }
        let image = Files { image: files.image, journal: [memory(), memory()] };
        let image = image
            .open_on_boot(Some(self.base.clone()), "the next boot")
            .map_err(|error| error.to_string())?;
        write_disk(&image, 70_000, &[1; 9000]).map_err(|error| error.to_string())?;
        image.flush().run().map_err(|error| error.to_string())
    }

    fn run(&mut self) -> Result<(), String> {
        for _ in 0..8 {
            for _ in 0..self.random.below(6) {
                self.write();
            }
            self.lose_power()?;
            self.flush()?;
        }
        Ok(())
    }
}

#[test]
fn what_was_flushed_survives_and_nothing_is_torn() {
    for seed in 0..15 {
        World::new(seed).run().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

/// The explorer sees a fault when there is one: each sync of a flush is needed.
#[test]
fn a_flush_that_forgets_a_sync_is_caught() {
    for forgotten in 0..3 {
        let caught = (0..25).any(|seed| {
            let mut world = World::new(seed);
            let forget = ForgetfulFlush { forgotten };
            (0..8).any(|_| {
                world.write();
                world.write();
                forget.run(&mut world).is_err()
            })
        });
        assert!(caught, "sync {forgotten} was left out, and nobody noticed");
    }
}

struct ForgetfulFlush {
    forgotten: usize,
}

impl ForgetfulFlush {
    fn run(&self, world: &mut World) -> Result<(), String> {
        let mut flush = world.image.flush();
        let mut syncs = 0;
        while let FlushStep::Sync(storages) = blocking(|waker| flush.step(Ok(()), waker)).unwrap() {
            world.lose_power()?;
            if syncs == self.forgotten {
                world.storage.swallow_syncs(1);
            }
            storages.iter().for_each(|storage| storage.sync().unwrap());
            syncs += 1;
            world.lose_power()?;
        }
        world.history.drain(..world.history.len() - 1);
        world.lose_power()
    }
}
