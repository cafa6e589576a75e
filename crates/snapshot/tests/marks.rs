//! Checkpoints and dirty bitmaps over real files: whatever happens to the layers, what changed between two instants is told,
//! and nothing else.

#![allow(clippy::unwrap_used, reason = "a failed step of a test ends it")]

mod bench;

use std::collections::{BTreeMap, BTreeSet};

use block::{ByteRange, DirtyBitmap, Disk, ErrorKind, blocking, read_disk};
use snapshot::{
    BitmapName, Changes, CheckpointRequest, CommitRequest, CutRequest, FreezePolicy, JobOptions, Manager,
    MarkChange, Pin, Point, StreamRequest,
};

use bench::{Bench, SIZE, byte, chain, delete, finish, snapshot, stamp};

const BLOCK: u64 = 4096;

/// The blocks that are written: some in a cluster, some far apart.
const PLACES: [u64; 12] = [0, 1, 5, 31, 32, 33, 500, 501, 1024, 1900, 2046, 2047];

type Blocks = BTreeSet<u64>;

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
        let options =
            JobOptions { auto_dismiss: false, job_id: Some("job".to_owned()), ..JobOptions::default() };
        let begun = match self.dice.roll(2) {
            0 => self.manager().commit(CommitRequest {
                device: "vda".to_owned(),
                base: None,
                base_node: Some(nodes[low].clone()),
                top: None,
                top_node: Some(nodes[high].clone()),
                options,
            }),
            _ => self.manager().stream(StreamRequest {
                device: nodes[high].clone(),
                base: None,
                base_node: (low > 0).then(|| nodes[low - 1].clone()),
                options,
            }),
        };
        if begun.is_ok() {
            // Another job may have made it impossible.
            let _ = finish(self.manager(), "job");
        }
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
                let own = dirty.union(&more).copied().collect();
                *bitmap = Bitmap { own, since: is_on.then_some(now) };
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
        for info in self.manager().bitmaps("vda").unwrap() {
            let bitmap = &self.bitmaps[&info.name];
            let dirty = self.manager().bitmap_dirty("vda", &info.name).unwrap();
            let found: Blocks = marked(&dirty).into_iter().filter(|block| *block < SIZE / BLOCK).collect();
            assert_eq!(found, bitmap.dirty(&self.now), "{}", info.name);
            assert_eq!((info.recording, info.count), (bitmap.since.is_some(), dirty.dirty_bytes()));
        }
        for (block, expected) in &self.now.content {
            assert_eq!(byte(self.manager(), "vda", block * BLOCK), *expected);
        }
        if let Some((pin, past)) = &self.pin {
            for (block, expected) in &past.content {
                let mut found = [0];
                read_disk(&**pin.disk(), block * BLOCK, &mut found).unwrap();
                assert_eq!(found[0], *expected, "what is pinned has changed");
            }
        }
    }
}

fn checkpoint(name: &str, snapshot: Option<&str>) -> CheckpointRequest {
    CheckpointRequest {
        name: name.to_owned(),
        disks: None,
        freeze: None,
        snapshot: snapshot.map(str::to_owned),
    }
}

fn cut() -> CutRequest {
    CutRequest { freeze: Some(FreezePolicy::Never), ..CutRequest::default() }
}

fn of(name: &str) -> BitmapName {
    BitmapName { disk: "vda".to_owned(), name: name.to_owned() }
}

fn blocks(ranges: impl Iterator<Item = ByteRange>) -> Blocks {
    ranges.flat_map(|range| range.offset / BLOCK..range.end().div_ceil(BLOCK)).collect()
}

fn marked(bits: &DirtyBitmap) -> Blocks {
    let (mut at, mut found) = (0, Blocks::new());
    while let Some(run) = bits.next_dirty(ByteRange { offset: at, len: bits.capacity() - at }) {
        found.extend(blocks(std::iter::once(run)));
        at = run.end();
    }
    found
}

fn add(name: &str, granularity: u32, persistent: bool) -> MarkChange {
    MarkChange::Add { bitmap: of(name), granularity, persistent, recording: true }
}

/// The ranges of some changes, as offset and length.
fn pairs(changes: &Changes) -> Vec<(u64, u64)> {
    changes.ranges().map(|range| (range.offset, range.len)).collect()
}

#[test]
fn in_random_lives_changes_are_exactly_what_was_written() {
    for seed in 0..6 {
        let mut life = Life::begin(seed);
        for _ in 0..70 {
            life.step();
            life.check();
        }
    }
}

#[test]
fn changes_are_rounded_outward_and_a_grown_disk_has_changed_at_its_end() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    manager.checkpoint_create(checkpoint("one", None)).unwrap();
    stamp(&manager, "vda", 70_000 / BLOCK * BLOCK, 1);
    manager.resize("vda", SIZE + 4096).unwrap();
    let from = Point::Checkpoint("one".to_owned());
    let changes = manager.changes("vda", &from, &Point::Now, Some(65_536)).unwrap();
    assert_eq!(pairs(&changes), [(65_536, 65_536), (SIZE, 4096)]);
    let error = manager.changes("vda", &from, &Point::Now, Some(1000)).unwrap_err();
    assert_eq!(error.to_string(), "Granularity must be power of 2 and at least 512");
    let missing = manager.changes("vda", &Point::Checkpoint("two".to_owned()), &Point::Now, None);
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
}

/// A damaged file costs a full backup of what it told of, and nothing else.
#[test]
fn what_is_lost_is_never_told_as_unchanged() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    manager.change_marks(&[add("bitmap", 65_536, true)]).unwrap();
    stamp(&manager, "vda", 0, 1);
    manager.checkpoint_create(checkpoint("later", None)).unwrap();
    stamp(&manager, "vda", 1 << 20, 1);
    snapshot(&manager, "one");
    // Into the base, with all that was written since the bitmap began.
    delete(&manager, "one").unwrap();
    let bits: Vec<_> = std::fs::read_dir(bench.path("state/marks")).unwrap().collect();
    assert_eq!(bits.len(), 2, "{bits:?}");
    manager.shut_down().unwrap();
    drop(manager);
    // That of the changes before the checkpoint.
    std::fs::write(bench.path("state/marks/0.bits"), "no bits").unwrap();

    let manager = bench.open();
    let since = |name: &str| manager.changes("vda", &Point::Checkpoint(name.to_owned()), &Point::Now, None);
    assert_eq!(pairs(&since("later").unwrap()), [(1 << 20, 4096)]);
    let info = &manager.bitmaps("vda").unwrap()[0];
    assert!(info.inconsistent && !info.recording);
    let error = manager.change_marks(&[MarkChange::Disable(of("bitmap"))]).unwrap_err();
    assert!(error.to_string().contains("Bitmap 'bitmap' is inconsistent and cannot be used"), "{error}");
    // Once it is cleared it is as good as new.
    manager.change_marks(&[MarkChange::Clear(of("bitmap"))]).unwrap();
    stamp(&manager, "vda", 2 << 20, 1);
    let info = &manager.bitmaps("vda").unwrap()[0];
    assert_eq!((info.count, info.recording, info.inconsistent), (65_536, true, false));
    manager.checkpoint_delete("later").unwrap();
    assert_eq!(std::fs::read_dir(bench.path("state/marks")).unwrap().count(), 0);
}

#[test]
fn bitmaps_answer_in_qemus_words() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let refused = |change: MarkChange| manager.change_marks(&[change]).unwrap_err().to_string();
    manager.change_marks(&[add("one", 65_536, false)]).unwrap();
    assert_eq!(refused(add("one", 65_536, false)), "Bitmap already exists: one");
    assert_eq!(refused(MarkChange::Clear(of("two"))), "Dirty bitmap 'two' not found");
    assert_eq!(refused(add("two", 511, false)), "Granularity must be power of 2 and at least 512");
    assert_eq!(refused(add("", 512, false)), "Bitmap name cannot be empty");
    let lock = manager.bitmap_lock("vda", "one").unwrap();
    let busy = "Bitmap 'one' is currently in use by another operation and cannot be used";
    assert_eq!(refused(MarkChange::Remove(of("one"))), busy);
    assert_eq!(manager.bitmap_lock("vda", "one").unwrap_err().to_string(), busy);
    assert!(manager.bitmaps("vda").unwrap()[0].busy);
    drop(lock);
    manager.change_marks(&[MarkChange::Remove(of("one"))]).unwrap();
    assert_eq!(manager.bitmaps("vda").unwrap(), []);
}

#[test]
fn bitmaps_that_are_not_persistent_end_with_the_daemon() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    manager.change_marks(&[add("kept", 65_536, true), add("lost", 65_536, false)]).unwrap();
    stamp(&manager, "vda", 0, 1);
    manager.change_marks(&[MarkChange::Disable(of("lost"))]).unwrap();
    drop(manager);
    let manager = bench.open();
    let names: Vec<_> =
        manager.bitmaps("vda").unwrap().into_iter().map(|info| (info.name, info.count)).collect();
    assert_eq!(names, [("kept".to_owned(), 65_536)]);
}

/// A backup with a bitmap: what was dirty at its cut is copied, and only when that has succeeded is the bitmap clean as of
/// that cut.
#[test]
fn a_bitmap_begins_anew_at_the_cut_of_the_backup_that_used_it() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    manager.change_marks(&[add("inc", 65_536, true)]).unwrap();
    stamp(&manager, "vda", 0, 1);
    for succeeds in [false, true] {
        let lock = manager.bitmap_lock("vda", "inc").unwrap();
        let taken = manager.cut_with(cut(), &[]).unwrap();
        let pin = &taken.pins[0];
        stamp(&manager, "vda", 1 << 20, 2);
        let found = marked(&lock.dirty(pin).unwrap());
        assert!(found.contains(&0));
        assert_eq!(found.contains(&256), succeeds, "what a failed backup did not take is for the next one");
        if succeeds {
            lock.restart(pin).unwrap();
        }
    }
    assert_eq!(marked(&manager.bitmap_dirty("vda", "inc").unwrap()), (256..272).collect());
}

#[test]
fn all_changes_of_a_cut_are_made_or_none() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    let layers = manager.disks()[0].layers.len();
    let bad = [add("one", 512, true), MarkChange::Clear(of("none"))];
    manager.cut_with(cut(), &bad).unwrap_err();
    assert_eq!(manager.bitmaps("vda").unwrap(), []);
    assert_eq!(manager.disks()[0].layers.len(), layers, "no cut was made");
    let good = [add("one", 512, true), MarkChange::Checkpoint { name: "same".to_owned() }];
    let request = CutRequest { snapshot: Some("same".to_owned()), ..cut() };
    manager.cut_with(request, &good).unwrap();
    stamp(&manager, "vda", 4096, 1);
    let since = |point| pairs(&manager.changes("vda", &point, &Point::Now, None).unwrap());
    assert_eq!(since(Point::Checkpoint("same".to_owned())), [(4096, 4096)]);
    assert_eq!(since(Point::Snapshot("same".to_owned())), [(4096, 4096)]);
    assert_eq!(marked(&manager.bitmap_dirty("vda", "one").unwrap()), Blocks::from([1]));
}

/// Without marks a disk whose last snapshot is deleted is in one image again. With one it is not: what were written to that
/// image would count as older than the mark.
#[test]
fn no_layer_beneath_a_mark_is_written_again() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    snapshot(&manager, "one");
    manager.checkpoint_create(checkpoint("one", Some("one"))).unwrap();
    delete(&manager, "one").unwrap();
    stamp(&manager, "vda", 0, 1);
    let changes = manager.changes("vda", &Point::Checkpoint("one".to_owned()), &Point::Now, None).unwrap();
    assert_eq!(pairs(&changes), [(0, 4096)]);
    manager.checkpoint_delete("one").unwrap();
    snapshot(&manager, "two");
    delete(&manager, "two").unwrap();
    assert_eq!(manager.disks()[0].layers.len(), 1);
}
