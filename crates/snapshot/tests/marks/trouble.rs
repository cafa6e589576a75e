//! What goes wrong beneath marks: each test opens with what would not have been told.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use block::ErrorKind;
use snapshot::{DeleteRequest, ImageFormat, JobOptions, JobStatus, MarkChange, Point};

use crate::bench::{Bench, SIZE, delete, finish, snapshot, stamp};
use crate::{Blocks, add, blocks, checkpoint, marked, of};

/// The files of a folder, by name.
fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A snapshot's layer was being merged up: a checkpoint of the snapshot was still made, for which nothing had been folded, and
/// what was written before it counted as written after it.
#[test]
fn a_snapshot_that_a_job_has_begun_to_delete_is_no_instant_any_more() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    snapshot(&manager, "s0");
    manager.checkpoint_create(checkpoint("begin", Some("s0"))).unwrap();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "s1");
    // More than there is beneath, so that the merge goes up.
    (1..5).for_each(|place| stamp(&manager, "vda", place << 20, 2));
    snapshot(&manager, "s2");
    let begin = || Point::Checkpoint("begin".to_owned());
    let (out, mut refused) = (bench.path("out"), Vec::new());
    // Slow, until the export has begun.
    let options = JobOptions { auto_dismiss: false, speed: 1, ..JobOptions::default() };
    let id = manager.delete(DeleteRequest { name: "s1".to_owned(), options }).unwrap();
    manager
        .export("s1", "vda", &out, ImageFormat::Raw, &mut |_, _| {
            if refused.is_empty() {
                manager.set_job_speed(&id, 0).unwrap();
                let deadline = Instant::now() + Duration::from_secs(20);
                // For the export to end.
                while !manager.jobs().iter().any(|job| job.status == JobStatus::Waiting) {
                    assert!(Instant::now() < deadline, "{:?}", manager.jobs());
                    std::thread::sleep(Duration::from_millis(1));
                }
                refused.push(manager.checkpoint_create(checkpoint("late", Some("s1"))).unwrap_err());
                let asked = manager.changes("vda", &begin(), &Point::Snapshot("s1".to_owned()), None);
                refused.push(asked.unwrap_err());
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    for error in refused {
        assert_eq!((error.kind(), &*error.to_string()), (ErrorKind::Busy, "snapshot 's1' is being deleted"));
    }
    finish(&manager, &id).unwrap();
    let told = manager.changes("vda", &begin(), &Point::Snapshot("s2".to_owned()), None).unwrap();
    assert_eq!(blocks(told.ranges()), Blocks::from([0, 256, 512, 768, 1024]));
}

/// Where neither bits nor the manifest can be written, bitmaps stay as they are, what is written goes on being recorded, and
/// nothing is left behind.
#[test]
fn marks_that_can_not_be_written_down_are_not_changed() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let (marks, manifest) = (bench.path("state/marks"), bench.path("state/manifest.json"));
    manager.change_marks(&[add("one", 4096, true), add("two", 4096, true)]).unwrap();
    stamp(&manager, "vda", 0, 1);
    manager.change_marks(&[MarkChange::Clear(of("two"))]).unwrap();
    let merge = MarkChange::Merge { target: of("two"), sources: vec![of("one")] };
    let dirty = |name: &str| marked(&manager.bitmap_dirty("vda", name).unwrap());

    let aside = bench.path("aside");
    for (path, named) in [(&marks, "marks/"), (&manifest, "manifest.json")] {
        std::fs::rename(path, &aside).unwrap();
        if path == &manifest {
            // A file can not take the place of a folder.
            std::fs::create_dir_all(manifest.join("in the way")).unwrap();
        }
        let error = manager.change_marks(std::slice::from_ref(&merge)).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
        assert_eq!((dirty("one"), dirty("two")), (Blocks::from([0]), Blocks::new()));
        if path == &manifest {
            manager.change_marks(&[MarkChange::Clear(of("one"))]).unwrap_err();
            assert_eq!(dirty("one"), Blocks::from([0]));
            std::fs::remove_dir_all(path).unwrap();
        }
        std::fs::rename(&aside, path).unwrap();
        assert_eq!(files(&marks), [""; 0]);
    }

    stamp(&manager, "vda", SIZE - 4096, 1);
    manager.change_marks(&[merge]).unwrap();
    assert_eq!(files(&marks).len(), 1);
    manager.shut_down().unwrap();
    drop(manager);
    let manager = bench.open();
    let dirty = |name: &str| marked(&manager.bitmap_dirty("vda", name).unwrap());
    assert_eq!((dirty("one"), dirty("two")), (Blocks::from([0, 2047]), Blocks::from([0, 2047])));
}

/// A merge whose changes can not be folded must not begin: its layers would be told no more.
#[test]
fn layers_whose_changes_can_not_be_folded_are_not_merged() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    manager.checkpoint_create(checkpoint("one", None)).unwrap();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "s");
    stamp(&manager, "vda", 1 << 20, 1);
    let (marks, aside) = (bench.path("state/marks"), bench.path("aside"));
    std::fs::rename(&marks, &aside).unwrap();
    let error = delete(&manager, "s").unwrap_err();
    assert!(error.contains("marks/"), "{error}");
    let told = || {
        let changes = manager.changes("vda", &Point::Checkpoint("one".to_owned()), &Point::Now, None);
        blocks(changes.unwrap().ranges())
    };
    assert_eq!(told(), Blocks::from([0, 256]));
    std::fs::rename(&aside, &marks).unwrap();
    delete(&manager, "s").unwrap();
    assert_eq!(told(), Blocks::from([0, 256]));
}
