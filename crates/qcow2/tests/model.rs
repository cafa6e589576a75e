//! Random operations on chains of overlays, compared with a plain array of bytes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;
use std::task::Waker;

use block::testing::{FaultStorage, MemStorage, Random};
use block::{ByteRange, Disk, Extent, RawDisk, Source, WriteGuard, blocking, read_disk, write_disk};
use qcow2::{Image, Mode, Parts};
use support::{Files, Verdict, assert_same, check, contents, memory, options, some_bytes};

/// Clusters of each image are 64 KiB: with this capacity a few of them, the last one odd.
const CAPACITIES: [u64; 3] = [512 * 1024, 300_000, 1_000_001];

struct Held {
    guard: WriteGuard,
    offset: u64,
    bytes: Vec<u8>,
}

/// A chain's active layer, what it should hold, and the writes that are held open.
struct World {
    random: Random,
    files: Vec<Files>,
    memories: Vec<Arc<FaultStorage>>,
    base: Arc<dyn Disk>,
    active: Image,
    expected: Vec<u8>,
    held: Vec<Held>,
    extended: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let capacity = CAPACITIES[random.below(3) as usize];
        // The base may be smaller or larger than the disk above it.
        let base_len = (capacity / 512 * 512 / 2 + random.below(capacity)) as usize / 512 * 512;
        let bytes: Vec<u8> = (0..base_len).map(|at| (at / 512 + 1) as u8).collect();
        let mut expected = bytes.clone();
        expected.resize(capacity as usize, 0);
        let base: Arc<dyn Disk> = Arc::new(RawDisk::new(Arc::new(MemStorage::from(bytes)), true).unwrap());
        let extended = random.below(2) == 0;
        let memory = memory();
        let files = Files::new(memory.clone(), &options(capacity, 16, extended));
        let active = files.open(Some(base.clone())).unwrap();
        Self {
            random,
            files: vec![files],
            memories: vec![memory],
            base,
            active,
            expected,
            held: Vec::new(),
            extended,
        }
    }

    fn write(&mut self) {
        let (offset, bytes) = self.some_bytes();
        if self.overlaps_held(offset, bytes.len()) {
            return;
        }
        write_disk(&self.active, offset, &bytes).unwrap();
        self.expect(offset, &bytes);
    }

    /// Writes a cluster or some, compressed.
    fn pack(&mut self) {
        let clusters = (self.expected.len() as u64).div_ceil(1 << 16);
        for _ in 0..=self.random.below(3) {
            let offset = self.random.below(clusters) << 16;
            let len = (self.expected.len() - offset as usize).min(1 << 16);
            let bytes = some_bytes(&mut self.random, len);
            if !self.overlaps_held(offset, len) {
                self.active.write_compressed(offset, &bytes).unwrap();
                self.expect(offset, &bytes);
            }
        }
    }

    fn some_bytes(&mut self) -> (u64, Vec<u8>) {
        let ByteRange { offset, len } = self.random.range(self.expected.len() as u64);
        let value = self.random.number() as u8;
        (offset, vec![value; len as usize])
    }

    /// Whether the bytes are in a cluster that a held write is in: nothing may be asked to wait for it here.
    fn overlaps_held(&self, offset: u64, len: usize) -> bool {
        let clusters = |offset: u64, len: u64| (offset >> 16)..=((offset + len - 1) >> 16);
        let wanted = clusters(offset, len as u64);
        self.held.iter().any(|held| {
            let held = clusters(held.offset, held.bytes.len() as u64);
            wanted.start() <= held.end() && held.start() <= wanted.end()
        })
    }

    fn expect(&mut self, offset: u64, bytes: &[u8]) {
        self.expected[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Resolves a write and moves its data, and leaves it at that for now.
    fn hold(&mut self) {
        let (offset, bytes) = self.some_bytes();
        if self.overlaps_held(offset, bytes.len()) {
            return;
        }
        let mut extents: Vec<Extent> = Vec::new();
        let range = ByteRange { offset, len: bytes.len() as u64 };
        let guard = blocking(|waker| self.active.resolve_write(range, waker, &mut extents)).unwrap();
        let mut written = 0;
        for extent in extents {
            let Source::File { storage, offset } = extent.source else { panic!("a write to nowhere") };
            storage.write_at(&bytes[written..][..extent.len as usize], offset).unwrap();
            written += extent.len as usize;
        }
        assert_eq!(written, bytes.len());
        self.held.push(Held { guard, offset, bytes });
    }

    /// Completes or aborts a held write. An aborted one may have changed what it resolved to in place.
    fn end_held(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let index = self.random.below(self.held.len() as u64) as usize;
        let Held { guard, offset, bytes } = self.held.swap_remove(index);
        if self.random.below(3) > 0 {
            guard.complete().unwrap();
            self.expect(offset, &bytes);
        } else {
            drop(guard);
            let mut found = vec![0; bytes.len()];
            read_disk(&self.active, offset, &mut found).unwrap();
            let old = &self.expected[offset as usize..][..bytes.len()];
            assert!(
                found.iter().zip(old).zip(&bytes).all(|((found, old), new)| found == old || found == new)
            );
            self.expect(offset, &found);
        }
    }

    fn clear(&mut self) {
        let ByteRange { offset, len } = self.random.range(self.expected.len() as u64);
        if self.overlaps_held(offset, len as usize) {
            return;
        }
        let range = ByteRange { offset, len };
        if self.random.below(3) == 0 {
            blocking(|waker| self.active.discard(range, waker)).unwrap();
            let mut found = vec![0; len as usize];
            read_disk(&self.active, offset, &mut found).unwrap();
            let old = &self.expected[offset as usize..][..len as usize];
            assert!(
                found.iter().zip(old).all(|(found, old)| *found == 0 || found == old),
                "neither zero nor old"
            );
            self.expect(offset, &found);
        } else {
            let unmap = self.random.below(2) == 0;
            blocking(|waker| self.active.write_zeroes(range, unmap, waker)).unwrap();
            self.expect(offset, &vec![0; len as usize]);
        }
    }

    fn layer_below(&self) -> Arc<dyn Disk> {
        let mut disk = self.base.clone();
        for files in &self.files[..self.files.len() - 1] {
            disk =
                Arc::new(Image::open(Parts::new(files.image.clone(), Some(disk)), Mode::ReadOnly).unwrap());
        }
        disk
    }

    /// The process dies, and another one goes on.
    fn kill(&mut self) {
        for Held { guard, offset, bytes } in std::mem::take(&mut self.held) {
            // What was in flight may have gone where data already was.
            std::mem::forget(guard);
            self.active_may_hold(offset, &bytes);
        }
        let below = self.layer_below();
        self.active = self.files.last().unwrap().open(Some(below)).unwrap();
        assert!(self.active.is_clean());
        self.check_file();
    }

    fn active_may_hold(&mut self, offset: u64, bytes: &[u8]) {
        let mut found = vec![0; bytes.len()];
        read_disk(&self.active, offset, &mut found).unwrap();
        let old = &self.expected[offset as usize..][..bytes.len()];
        assert!(found.iter().zip(old).zip(bytes).all(|((found, old), new)| found == old || found == new));
        self.expect(offset, &found);
    }

    fn drain(&mut self) {
        while !self.held.is_empty() {
            self.end_held();
        }
    }

    fn flush(&mut self) {
        self.active.flush().run().unwrap();
        assert!(self.active.is_clean());
        self.check_file();
    }

    /// Nothing at all may be wrong: no flush is ever cut short here.
    fn check_file(&self) {
        assert_eq!(check(&self.memories.last().unwrap().bytes()), Verdict::default());
    }

    /// Seals the active layer and puts an overlay on top.
    fn pivot(&mut self) {
        self.drain();
        self.active.seal();
        assert!(write_disk(&self.active, 0, &[1]).is_err());
        self.flush();
        let memory = memory();
        let options = options(self.expected.len() as u64, 16, self.extended);
        self.files.push(Files::new(memory.clone(), &options));
        self.memories.push(memory);
        self.active = self.files.last().unwrap().open(Some(self.layer_below())).unwrap();
    }

    fn step(&mut self) {
        match self.random.below(20) {
            0..=6 => self.write(),
            7 => self.pack(),
            8..=10 => self.hold(),
            11..=13 => self.end_held(),
            14..=16 => self.clear(),
            17 => self.flush(),
            18 => self.kill(),
            _ if self.files.len() < 3 && self.random.below(10) == 0 => self.pivot(),
            _ => {
                let ByteRange { offset, len } = self.random.range(self.expected.len() as u64);
                if !self.overlaps_held(offset, len as usize) {
                    let mut found = vec![0; len as usize];
                    read_disk(&self.active, offset, &mut found).unwrap();
                    assert_same(&found, &self.expected[offset as usize..][..len as usize], "read");
                }
            }
        }
    }
}

#[test]
fn chains_of_overlays_behave_as_an_array_of_bytes() {
    for seed in 0..120 {
        let mut world = World::new(seed);
        for step in 0..150 {
            world.step();
            if step % 50 == 49 {
                world.drain();
                assert_same(&contents(&world.active), &world.expected, &format!("seed {seed}, step {step}"));
            }
        }
        // All is found again from the files alone.
        world.drain();
        world.active.seal();
        world.flush();
        let files = world.files.last().unwrap();
        let image =
            Image::open(Parts::new(files.image.clone(), Some(world.layer_below())), Mode::ReadOnly).unwrap();
        assert_same(&contents(&image), &world.expected, &format!("seed {seed}, at the end"));
    }
}

#[test]
fn an_aligned_write_to_a_new_cluster_copies_nothing() {
    let files = Files::new(memory(), &options(1 << 20, 17, true));
    let below = Arc::new(FaultStorage::new(MemStorage::from(vec![7; 1 << 20])));
    let base: Arc<dyn Disk> = Arc::new(RawDisk::new(below.clone(), true).unwrap());
    let image = files.open(Some(base)).unwrap();
    below.fail_reads(u64::MAX);
    let len = files.image.len().unwrap();
    write_disk(&image, 8192, &[1; 4096]).unwrap();
    assert_eq!(files.image.len().unwrap(), len + 8192 + 4096);
    // A smaller write has to copy, and so sees the fault.
    write_disk(&image, 16384, &[1; 512]).unwrap_err();
    below.fail_reads(0);
    write_disk(&image, 16384, &[1; 512]).unwrap();
    let mut found = [0; 4096];
    read_disk(&image, 16384, &mut found).unwrap();
    assert_eq!(found[..512], [1; 512]);
    assert_eq!(found[512..], [7; 4096 - 512]);
}

#[test]
fn a_write_waits_for_another_that_copies_the_same_subcluster() {
    let files = Files::new(memory(), &options(1 << 20, 17, true));
    let image = files.open(None).unwrap();
    let range = |offset, len| ByteRange { offset, len };
    let resolve = |range| image.resolve_write(range, Waker::noop(), &mut Vec::new());
    let first = blocking(|_| resolve(range(512, 512))).unwrap();
    assert!(resolve(range(1024, 512)).is_pending());
    assert!(resolve(range(0, 8192)).is_pending());
    let beside = blocking(|_| resolve(range(4096, 512))).unwrap();
    drop(first);
    let whole = blocking(|_| resolve(range(0, 4096))).unwrap();
    let also_whole = blocking(|_| resolve(range(0, 4096))).unwrap();
    assert!(resolve(range(1024, 512)).is_pending());
    for guard in [beside, whole, also_whole] {
        guard.complete().unwrap();
    }
    assert!(resolve(range(1024, 512)).is_ready());
}
