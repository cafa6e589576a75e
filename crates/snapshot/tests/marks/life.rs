//! Random lives of a disk with checkpoints, bitmaps and a pin, against a model that remembers each write by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use block::{ByteRange, Disk, blocking, read_disk};
use snapshot::{CommitRequest, JobOptions, JobVerb, Manager, MarkChange, Pin, Point, StreamRequest};

use crate::bench::{Bench, SIZE, byte, chain, delete, finish, snapshot, stamp};
use crate::{BLOCK, Blocks, blocks, checkpoint, cut, marked, of};

/// The blocks that are written: some in a cluster, some far apart.
const PLACES: [u64; 12] = [0, 1, 5, 31, 32, 33, 500, 501, 1024, 1900, 2046, 2047];

/// A generator that is the same each time (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }

    fn pick<T: Clone>(&mut self, all: impl IntoIterator<Item = T>) -> Option<T> {
        let all: Vec<_> = all.into_iter().collect();
        if all.is_empty() { None } else { all.get(self.roll(all.len())).cloned() }
    }
}

/// What the disk was like at an instant: the writes that led to it, each by a number, and the size.
#[derive(Clone, Default)]
struct Past {
    writes: BTreeMap<u64, u64>,
    content: BTreeMap<u64, u8>,
    capacity: u64,
}

impl Past {
    /// The blocks that were written on the way from one to the other.
    fn touched(&self, other: &Self) -> Blocks {
        let lacks = |from: &Self, to: &Self| {
            let lost = from.writes.iter().filter(|(number, _)| !to.writes.contains_key(number));
            lost.map(|(_, block)| *block).collect::<Blocks>()
        };
        lacks(self, other).union(&lacks(other, self)).copied().collect()
    }
}

struct Bitmap {
    own: Blocks,
    since: Option<Past>,
}

impl Bitmap {
    fn dirty(&self, at: &Past) -> Blocks {
        let told = self.since.as_ref().map(|since| since.touched(at)).unwrap_or_default();
        self.own.union(&told).copied().collect()
    }
}

struct Life {
    bench: Bench,
    manager: Option<Manager>,
    dice: Dice,
    count: u64,
    now: Past,
    checkpoints: BTreeMap<String, Past>,
    snapshots: BTreeMap<String, Past>,
    bitmaps: BTreeMap<String, Bitmap>,
    pin: Option<(Pin, Past)>,
}

impl Life {
    fn begin(seed: u64) -> Self {
        let bench = Bench::new(&["vda"]);
        let manager = Some(bench.open());
        let now = Past { capacity: SIZE, ..Past::default() };
        Self {
            bench,
            manager,
            dice: Dice(seed),
            count: 0,
            now,
            checkpoints: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            bitmaps: BTreeMap::new(),
            pin: None,
        }
    }

    fn manager(&self) -> &Manager {
        self.manager.as_ref().unwrap()
    }

    fn step(&mut self) {
        match self.dice.roll(27) {
            0..=7 => self.write(),
            8 => self.snapshot(),
            9..=11 => self.checkpoint(),
            12 => self.adopt(),
            13 => self.delete_checkpoint(),
            14..=15 => self.delete_snapshot(),
            16..=18 => self.merge(),
            19 => self.revert(),
            20 => self.restart(),
            21 => self.resize(),
            22 => self.pin(),
            _ => self.bitmap(),
        }
    }

    fn name(&mut self, kind: &str) -> String {
        self.count += 1;
        format!("{kind}{}", self.count)
    }

    fn write(&mut self) {
        self.count += 1;
        let block = self.dice.pick(PLACES).unwrap();
        let range = ByteRange { offset: block * BLOCK, len: BLOCK };
        let byte = self.dice.roll(200) as u8;
        match byte {
            0..20 => {
                blocking(|waker| chain(self.manager(), "vda").write_zeroes(range, byte < 10, waker)).unwrap();
                self.now.content.insert(block, 0);
            }
            _ => {
                stamp(self.manager(), "vda", range.offset, byte);
                self.now.content.insert(block, byte);
            }
        }
        self.now.writes.insert(self.count, block);
    }

    fn snapshot(&mut self) {
        let name = self.name("s");
        snapshot(self.manager(), &name);
        self.snapshots.insert(name, self.now.clone());
    }

    fn checkpoint(&mut self) {
        let name = self.name("c");
        self.manager().checkpoint_create(checkpoint(&name, None)).unwrap();
        self.checkpoints.insert(name, self.now.clone());
    }

    fn adopt(&mut self) {
        let Some(held) = self.dice.pick(self.snapshots.keys().cloned()) else { return };
        let name = self.name("a");
        self.manager().checkpoint_create(checkpoint(&name, Some(&held))).unwrap();
        self.checkpoints.insert(name, self.snapshots[&held].clone());
    }

    fn delete_checkpoint(&mut self) {
        let Some(name) = self.dice.pick(self.checkpoints.keys().cloned()) else { return };
        self.manager().checkpoint_delete(&name).unwrap();
        self.checkpoints.remove(&name);
    }

    fn delete_snapshot(&mut self) {
        let Some(name) = self.dice.pick(self.snapshots.keys().cloned()) else { return };
        delete(self.manager(), &name).unwrap();
        self.snapshots.remove(&name);
    }

    /// Some merge, somewhere; refused ones change nothing.
    fn merge(&mut self) {
        let nodes: Vec<_> =
            self.manager().disks()[0].layers.iter().map(|one| one.node_name.clone()).collect();
        let low = self.dice.roll(nodes.len());
        let high = (low + 1 + self.dice.roll(2)).min(nodes.len() - 1);
        let is_slow = self.dice.roll(3) == 0;
        let speed = if is_slow { BLOCK } else { 0 };
        let job_id = Some("job".to_owned());
        let options = JobOptions { auto_dismiss: false, job_id, speed, ..JobOptions::default() };
        let begun = match self.dice.roll(2) {
            0 => self.manager().commit(CommitRequest {
                device: "vda".to_owned(),
                base: None,
                base_node: Some(nodes[low].clone()),
                top: None,
                top_node: Some(nodes[high].clone()),
                auto_complete: true,
                options,
            }),
            _ => self.manager().stream(StreamRequest {
                device: nodes[high].clone(),
                base: None,
                base_node: (low > 0).then(|| nodes[low - 1].clone()),
                options,
            }),
        };
        if begun.is_err() {
            return;
        }
        if is_slow {
            std::thread::sleep(Duration::from_millis(3));
            self.break_off();
        }
        if self.manager().jobs().iter().any(|job| job.id == "job") {
            // Another job may have made it impossible.
            let _ = finish(self.manager(), "job");
        }
    }

    /// The job is called off, or the daemon ends and the next one goes on with it. It may be over already.
    fn break_off(&mut self) {
        if self.dice.roll(2) == 0 {
            let _ = self.manager().ask_job("job", JobVerb::Cancel);
            return;
        }
        self.check();
        self.restart();
        let _ = self.manager().set_job_speed("job", 0);
    }

    fn revert(&mut self) {
        self.pin = None;
        let Some(name) = self.dice.pick(self.snapshots.keys().cloned()) else { return };
        self.manager().revert(&name, true).unwrap();
        let there: BTreeSet<_> = self.manager().list().into_iter().map(|one| one.name).collect();
        self.now = self.snapshots[&name].clone();
        self.snapshots.retain(|name, _| there.contains(name));
        assert_eq!(self.snapshots.len(), there.len());
    }

    fn restart(&mut self) {
        self.pin = None;
        let manager = self.manager.take().unwrap();
        if self.dice.roll(2) == 0 {
            manager.shut_down().unwrap();
        }
        drop(manager);
        self.manager = Some(self.bench.open());
    }

    fn resize(&mut self) {
        let capacity = self.now.capacity + 512 * (1 + self.dice.roll(300)) as u64;
        self.manager().resize("vda", capacity).unwrap();
        self.now.capacity = capacity;
    }

    fn pin(&mut self) {
        self.pin = None;
        let taken = self.manager().cut_with(cut(), &[]).unwrap();
        self.pin = taken.pins.into_iter().next().map(|pin| (pin, self.now.clone()));
    }

    fn bitmap(&mut self) {
        let some = self.dice.pick(self.bitmaps.keys().cloned());
        let (Some(name), 1..) = (some, self.dice.roll(6)) else { return self.add_bitmap() };
        let now = self.now.clone();
        let change = match self.dice.roll(5) {
            0 => MarkChange::Clear(of(&name)),
            1 => MarkChange::Enable(of(&name)),
            2 => MarkChange::Disable(of(&name)),
            3 => MarkChange::Remove(of(&name)),
            _ => {
                let other = self.dice.pick(self.bitmaps.keys().cloned()).unwrap();
                MarkChange::Merge { target: of(&name), sources: vec![of(&other)] }
            }
        };
        self.manager().change_marks(std::slice::from_ref(&change)).unwrap();
        let more = match &change {
            MarkChange::Merge { sources, .. } => self.bitmaps[&sources[0].name].dirty(&now),
            _ => Blocks::new(),
        };
        let bitmap = self.bitmaps.get_mut(&name).unwrap();
        let dirty = bitmap.dirty(&now);
        let is_on = bitmap.since.is_some();
        match change {
            MarkChange::Clear(_) => *bitmap = Bitmap { own: Blocks::new(), since: is_on.then_some(now) },
            MarkChange::Enable(_) if !is_on => bitmap.since = Some(now),
            MarkChange::Disable(_) => *bitmap = Bitmap { own: dirty, since: None },
            MarkChange::Remove(_) => drop(self.bitmaps.remove(&name)),
            MarkChange::Merge { .. } => {
                bitmap.own.extend(more);
            }
            _ => {}
        }
    }

    fn add_bitmap(&mut self) {
        let (name, recording) = (self.name("b"), self.dice.roll(3) > 0);
        let change = MarkChange::Add { bitmap: of(&name), granularity: 4096, persistent: true, recording };
        self.manager().change_marks(&[change]).unwrap();
        let since = recording.then(|| self.now.clone());
        self.bitmaps.insert(name, Bitmap { own: Blocks::new(), since });
    }

    fn check(&self) {
        let checkpoints = self.checkpoints.iter().map(|(name, past)| (Point::Checkpoint(name.clone()), past));
        let snapshots = self.snapshots.iter().map(|(name, past)| (Point::Snapshot(name.clone()), past));
        let mut points: Vec<_> = checkpoints.chain(snapshots).collect();
        points.extend(self.pin.iter().map(|(pin, past)| (pin.point(), past)));
        points.push((Point::Now, &self.now));
        for (from, before) in &points {
            for (to, after) in &points {
                let changes = self.manager().changes("vda", from, to, None).unwrap();
                assert_eq!(changes.capacity(), after.capacity);
                let found = blocks(changes.ranges());
                let known: Blocks = found.iter().copied().filter(|block| *block < SIZE / BLOCK).collect();
                assert_eq!(known, before.touched(after), "{from:?} to {to:?}");
                let grown = before.capacity.div_ceil(BLOCK)..after.capacity.div_ceil(BLOCK);
                assert!(grown.into_iter().all(|block| found.contains(&block)), "{from:?} to {to:?}");
            }
        }
        for (name, bitmap) in &self.bitmaps {
            let dirty = marked(&self.manager().bitmap_dirty("vda", name).unwrap());
            let found: Blocks = dirty.into_iter().filter(|block| *block < SIZE / BLOCK).collect();
            assert_eq!(found, bitmap.dirty(&self.now), "{name}");
        }
        for (block, expected) in &self.now.content {
            assert_eq!(byte(self.manager(), "vda", block * BLOCK), *expected);
        }
        if let Some((pin, past)) = &self.pin {
            for (block, expected) in &past.content {
                let mut found = [0];
                read_disk(&*pin.disk(), block * BLOCK, &mut found).unwrap();
                assert_eq!(found[0], *expected, "what is pinned has changed");
            }
        }
    }

    /// What the list keeps of the layers from one time to the next must hold however much has happened between.
    fn check_list(&self) {
        let listed = self.manager().bitmaps("vda").unwrap();
        assert_eq!(listed.len(), self.bitmaps.len());
        for info in listed {
            let dirty = self.manager().bitmap_dirty("vda", &info.name).unwrap().dirty_bytes();
            let recording = self.bitmaps[&info.name].since.is_some();
            assert_eq!((info.recording, info.count), (recording, dirty), "{}", info.name);
        }
    }
}

#[test]
fn in_random_lives_changes_are_exactly_what_was_written() {
    for seed in 0..6 {
        let mut life = Life::begin(seed);
        for _ in 0..70 {
            life.step();
            life.check();
            if life.dice.roll(3) == 0 {
                life.check_list();
            }
        }
    }
}
