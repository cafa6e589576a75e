//! Checkpoints and dirty bitmaps over real files: whatever happens to the layers, what changed between two instants is told,
//! and nothing else.

#![allow(clippy::unwrap_used, reason = "a failed step of a test ends it")]

#[path = "../bench/mod.rs"]
mod bench;
mod life;
mod trouble;

use std::collections::BTreeSet;

use block::{ByteRange, DirtyBitmap, ErrorKind};
use snapshot::{BitmapName, Changes, CheckpointRequest, CutRequest, FreezePolicy, MarkChange, Point};

use bench::{Bench, SIZE, delete, snapshot, stamp};

const BLOCK: u64 = 4096;

type Blocks = BTreeSet<u64>;

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
            lock.restart(pin, |_| {}).unwrap();
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
