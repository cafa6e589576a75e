//! What goes wrong beneath the manager, and what it leaves: each test opens with what could have been lost.

#![allow(clippy::unwrap_used, reason = "a failed step of a test ends it")]

mod bench;

use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use block::{Disk, ErrorKind, write_disk};
use hostio::{Cache, HostFile, Open};
use snapshot::{
    AllowedFolders, Coverage, CreateRequest, FreezeDefaults, FreezePolicy, FreezeStatus, Guest, GuestError,
    GuestResult, ImageFormat, Manager,
};

use bench::{Bench, SIZE, byte, chain, check, delete, request, snapshot, stamp};

const READ: Open = Open { writable: false, cache: Cache::Writeback };
const LEASE: Duration = Duration::from_secs(20);

fn names(manager: &Manager) -> Vec<(String, bool)> {
    manager.list().into_iter().map(|one| (one.name, one.sealed)).collect()
}

fn overlays(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|end| end == "qcow2"))
        .count()
}

/// Changes the manifest as a loss of power, or a kill, would have left it.
fn edit_manifest(bench: &Bench, from: &str, to: &str) {
    let path = bench.path("state/manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(&path, text.replace(from, to)).unwrap();
}

/// A typing error in `--disk` was remembered for ever: the right path was then refused as another one.
#[test]
fn a_base_image_that_can_not_be_opened_is_not_remembered() {
    let mut bench = Bench::new(&["vda"]);
    let right = bench.disks[0].clone();
    bench.disks[0].path = bench.path("mistyped.raw");
    let opened = Manager::open(
        &bench.path("state"),
        &bench.disks,
        AllowedFolders::default(),
        FreezeDefaults::default(),
        None,
    );
    assert_eq!(opened.err().unwrap().kind(), ErrorKind::NotFound);
    bench.disks[0] = right.clone();
    bench.disks[0].format = ImageFormat::Qcow2;
    let opened = Manager::open(
        &bench.path("state"),
        &bench.disks,
        AllowedFolders::default(),
        FreezeDefaults::default(),
        None,
    );
    opened.err().unwrap();
    bench.disks[0] = right;
    bench.open();
}

/// One disk of a group was merged, then another one's image was found to be in use: the snapshot, still listed, had
/// one disk of then and one of now.
#[test]
fn a_delete_that_is_refused_has_changed_nothing() {
    let bench = Bench::new(&["vda", "vdb"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "one");
    stamp(&manager, "vda", 0, 2);
    let reader = HostFile::open(&bench.path("base-vdb.raw"), READ).unwrap();
    assert!(delete(&manager, "one").unwrap_err().contains("in use"));
    assert_eq!(bench.export(&manager, "one", "vda")[0], 1);
    assert_eq!(byte(&manager, "vda", 0), 2);
    drop(reader);
    delete(&manager, "one").unwrap();
    assert_eq!(byte(&manager, "vda", 0), 2);
}

/// What lay past the end of a base that had been cut short was dropped by the merge.
#[test]
fn a_base_that_was_resized_is_not_merged_into() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    snapshot(&manager, "one");
    stamp(&manager, "vda", SIZE - 4096, 7);
    File::options().write(true).open(bench.path("base-vda.raw")).unwrap().set_len(SIZE / 2).unwrap();
    assert!(delete(&manager, "one").unwrap_err().contains("resized"));
    assert_eq!(byte(&manager, "vda", SIZE - 4096), 7);
}

/// A merge that was killed has spoiled the snapshot: nobody may take it for one, and deleting it again must work.
#[test]
fn a_snapshot_whose_deletion_was_cut_short_can_only_be_deleted() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    snapshot(&manager, "one");
    stamp(&manager, "vda", 0, 2);
    manager.shut_down().unwrap();
    drop(manager);
    edit_manifest(&bench, "\"snapshots\": [", "\"deleting\": [\"one\"], \"snapshots\": [");
    let manager = bench.open();
    let out = bench.path("out");
    let exported =
        manager.export("one", "vda", &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(()));
    for error in [exported.unwrap_err(), manager.revert("one", false).unwrap_err()] {
        assert!(error.to_string().contains("delete it again"), "{error}");
    }
    delete(&manager, "one").unwrap();
    assert_eq!(byte(&manager, "vda", 0), 2);
    snapshot(&manager, "one");
    bench.export(&manager, "one", "vda");
}

/// An overlay that could be made, but not be opened, stayed behind for ever.
#[test]
fn an_overlay_that_fails_leaves_nothing() {
    let bench = Bench::new(&["vda", "vdb"]);
    let manager = bench.open();
    snapshot(&manager, "one");
    let before = overlays(bench.folder.path());
    let journal = bench.path("state/journal");
    std::fs::rename(&journal, bench.path("aside")).unwrap();
    File::create(&journal).unwrap();
    manager.create(request("two")).unwrap_err();
    manager.revert("one", false).unwrap_err();
    assert_eq!(overlays(bench.folder.path()), before);
    std::fs::remove_file(&journal).unwrap();
    std::fs::rename(bench.path("aside"), &journal).unwrap();
}

/// A symbolic link that leads nowhere stood where the overlay was to be: the attempt failed, and removed the link.
#[test]
fn what_stands_where_an_overlay_goes_is_left_alone() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let link = bench.path("base-vda.vda-000001.qcow2");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    snapshot(&manager, "one");
    assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("nowhere"));
    assert!(manager.disks()[0].layers[1].path.ends_with("base-vda.vda-000002.qcow2"));
}

/// After a delete or revert, the top layer of a read-only disk was open for writing.
#[test]
fn a_read_only_disk_stays_so_through_maintenance() {
    let mut bench = Bench::new(&["vda"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "one");
    snapshot(&manager, "two");
    stamp(&manager, "vda", 0, 2);
    drop(manager);
    bench.disks[0].read_only = true;
    let manager = bench.open();
    assert_eq!(byte(&manager, "vda", 0), 2);
    delete(&manager, "two").unwrap();
    assert_eq!(byte(&manager, "vda", 0), 2);
    assert_eq!(write_disk(&**chain(&manager, "vda"), 0, &[3; 512]).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert!(chain(&manager, "vda").read_only());
    drop(manager);
    bench.disks[0].read_only = false;
    stamp(&bench.open(), "vda", 0, 4);
}

/// The seal of one snapshot failed, and the next snapshot hid that: guests' flushes no longer reached that layer.
#[test]
fn a_seal_that_failed_is_done_before_the_next_cut() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let in_the_way = bench.path("state/journal/vda-000000.a");
    std::fs::create_dir(&in_the_way).unwrap();
    let record = snapshot(&manager, "one");
    assert!(!record.sealed);
    assert!(manager.show("one").unwrap().reason.contains("not sealed at first"));
    let error = manager.create(request("two")).unwrap_err();
    assert!(error.to_string().contains("not on stable storage"), "{error}");
    std::fs::remove_dir(&in_the_way).unwrap();
    snapshot(&manager, "two");
    assert_eq!(names(&manager), [("one".to_owned(), true), ("two".to_owned(), true)]);
}

/// The cut was made, then its record could not be written: the snapshot was told to the client and known to nobody.
#[test]
fn a_snapshot_whose_record_can_not_be_written_is_written_later() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    manager.prepare(request("one"), LEASE).unwrap();
    let in_the_way = bench.path("state/manifest.json.new");
    std::fs::create_dir(&in_the_way).unwrap();
    let record = manager.release("one").unwrap();
    assert!(!record.sealed);
    assert_eq!(names(&manager), [("one".to_owned(), false)]);
    std::fs::remove_dir(&in_the_way).unwrap();
    stamp(&manager, "vda", 0, 2);
    manager.shut_down().unwrap();
    drop(manager);
    let manager = bench.open();
    assert_eq!(names(&manager), [("one".to_owned(), true)]);
    assert_eq!(bench.export(&manager, "one", "vda")[0], 1);
}

/// An undo could not take its overlay off again: the layer beneath goes on being written, and is what the next cut
/// freezes.
#[test]
fn an_overlay_that_an_undo_leaves_is_not_in_the_way() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    manager.prepare(request("undone"), LEASE).unwrap();
    let in_the_way = bench.path("state/manifest.json.new");
    std::fs::create_dir(&in_the_way).unwrap();
    manager.abort("undone").unwrap_err();
    std::fs::remove_dir(&in_the_way).unwrap();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "one");
    stamp(&manager, "vda", 0, 2);
    drop(manager);
    let manager = bench.open();
    assert_eq!(byte(&manager, "vda", 0), 2);
    assert_eq!(manager.disks()[0].layers.len(), 2);
    assert_eq!(bench.export(&manager, "one", "vda")[0], 1);
    delete(&manager, "one").unwrap();
    assert_eq!(byte(&manager, "vda", 0), 2);
}

/// Killed before SEAL: whoever opens the disks next does it. Only the disks of the snapshot need to be served.
#[test]
fn an_unsealed_snapshot_is_sealed_by_the_next_run() {
    let mut bench = Bench::new(&["vda", "vdb"]);
    let manager = bench.open();
    let disks = Some(vec!["vda".to_owned()]);
    manager.create(CreateRequest { disks, ..request("one") }).unwrap();
    snapshot(&manager, "both");
    drop(manager);
    edit_manifest(&bench, "\"sealed\": true", "\"sealed\": false");
    bench.disks.pop();
    let manager = bench.open();
    assert_eq!(names(&manager), [("one".to_owned(), true), ("both".to_owned(), false)]);
    // The disk that is not served is read all the same.
    bench.export(&manager, "both", "vdb");
}

/// The host went down before SEAL: what the snapshot held may be lost, what the disk holds is not.
#[test]
fn an_unsealed_snapshot_does_not_outlive_its_boot() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "sealed");
    stamp(&manager, "vda", 4096, 2);
    manager.shut_down().unwrap();
    drop(manager);
    let manager = bench.open();
    snapshot(&manager, "unsealed");
    stamp(&manager, "vda", 8192, 3);
    manager.shut_down().unwrap();
    drop(manager);
    let boot = hostio::boot_id().unwrap();
    edit_manifest(&bench, &boot, "an earlier boot");
    let path = bench.path("state/manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let second = text.rfind("\"sealed\": true").unwrap();
    std::fs::write(&path, text[..second].to_owned() + "\"sealed\": false" + &text[second + 14..]).unwrap();
    let manager = bench.open();
    assert_eq!(names(&manager), [("sealed".to_owned(), true)]);
    assert_eq!([0, 4096, 8192].map(|at| byte(&manager, "vda", at)), [1, 2, 3]);
    assert_eq!(bench.export(&manager, "sealed", "vda")[4096], 0);
    snapshot(&manager, "unsealed");
}

/// The file system of the state directory is full, or read-only: the guest's disks are more important than it.
#[test]
fn a_state_directory_that_can_not_be_written_does_not_keep_the_disks_from_being_served() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "one");
    stamp(&manager, "vda", 0, 2);
    manager.shut_down().unwrap();
    drop(manager);
    edit_manifest(&bench, &hostio::boot_id().unwrap(), "an earlier boot");
    let in_the_way = bench.path("state/manifest.json.new");
    std::fs::create_dir(&in_the_way).unwrap();
    let manager = bench.open();
    assert_eq!(byte(&manager, "vda", 0), 2);
    assert_eq!(bench.export(&manager, "one", "vda")[0], 1);
    assert_eq!(manager.create(request("two")).unwrap_err().kind(), ErrorKind::Io);
    std::fs::remove_dir(&in_the_way).unwrap();
    snapshot(&manager, "two");
}

/// One disk of a group could not be sealed: the other one's snapshots go on.
#[test]
fn a_seal_that_failed_holds_up_its_own_disk_only() {
    let bench = Bench::new(&["vda", "vdb"]);
    let manager = bench.open();
    let in_the_way = bench.path("state/journal/vda-000000.a");
    std::fs::create_dir(&in_the_way).unwrap();
    snapshot(&manager, "both");
    let disks = Some(vec!["vdb".to_owned()]);
    manager.create(CreateRequest { disks, ..request("other") }).unwrap();
    assert_eq!(names(&manager), [("both".to_owned(), false), ("other".to_owned(), true)]);
    manager.shut_down().unwrap_err();
    std::fs::remove_dir(&in_the_way).unwrap();
    manager.shut_down().unwrap();
    assert_eq!(names(&manager), [("both".to_owned(), true), ("other".to_owned(), true)]);
}

struct NeverThaws;

impl Guest for NeverThaws {
    fn connect(&mut self, _deadline: Instant) -> GuestResult<()> {
        Ok(())
    }

    fn pre_sync(&mut self, _deadline: Instant) -> GuestResult<()> {
        Ok(())
    }

    fn coverage(&mut self, _deadline: Instant) -> GuestResult<Coverage> {
        Ok(Coverage { mounts: vec!["/".to_owned()], unfreezable: Vec::new() })
    }

    fn freeze(&mut self, _coverage: &Coverage, _deadline: Instant) -> GuestResult<u64> {
        Ok(1)
    }

    fn status(&mut self, _deadline: Instant) -> GuestResult<FreezeStatus> {
        Ok(FreezeStatus::Frozen)
    }

    fn thaw(&mut self, _deadline: Instant) -> GuestResult<u64> {
        Err(GuestError::Other("it hangs".to_owned()))
    }
}

/// The daemon ended with a snapshot prepared and a guest that would not thaw: the disks were not flushed any more.
#[test]
fn a_guest_that_does_not_thaw_does_not_keep_the_disks_from_being_flushed() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    snapshot(&manager, "one");
    drop(manager);
    let guest = Box::new(NeverThaws);
    let manager = Manager::open(
        &bench.path("state"),
        &bench.disks,
        AllowedFolders::default(),
        FreezeDefaults::default(),
        Some(guest),
    )
    .unwrap();
    stamp(&manager, "vda", 0, 1);
    let frozen = CreateRequest { freeze: Some(FreezePolicy::Require), ..request("held") };
    manager.prepare(frozen, LEASE).unwrap();
    assert!(manager.shut_down().unwrap_err().to_string().contains("it hangs"));
    assert_eq!(manager.create(request("late")).unwrap_err().kind(), ErrorKind::Busy);
    assert!(manager.thaw_owed());
    // The tables on disk know of the write, without the journal.
    let active = manager.disks()[0].layers.last().unwrap().path.clone();
    std::fs::copy(active, bench.path("copy")).unwrap();
    let copy = Arc::new(HostFile::open(&bench.path("copy"), READ).unwrap());
    let copy = qcow2::Image::open(qcow2::Parts::new(copy, None), qcow2::Mode::ReadOnly).unwrap();
    let mut found = [0];
    block::read_disk(&copy, 0, &mut found).unwrap();
    assert_eq!(found, [1]);
}

/// A second change is refused at once: its client must not wait for the first one's guest.
#[test]
fn one_change_at_a_time() {
    let bench = Bench::new(&["vda"]);
    let manager = Arc::new(bench.open());
    let (events, others) = (bench::events(&manager), Arc::clone(&manager));
    let refused = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&refused);
    let other = std::thread::spawn(move || {
        for number in 0..20 {
            match others.create(request(&format!("other-{number}"))) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Busy => *counted.lock().unwrap() += 1,
                Err(error) => panic!("{error}"),
            }
        }
    });
    let mut taken = 0;
    for number in 0..20 {
        taken += usize::from(manager.create(request(&format!("one-{number}"))).is_ok());
    }
    other.join().unwrap();
    assert_eq!(manager.list().len(), taken + 20 - *refused.lock().unwrap());
    assert_eq!(manager.disks()[0].layers.len(), manager.list().len() + 1);
    drop(events);
}

/// Backup programs read the sealed layers with QEMU's tools while the guest runs.
#[test]
fn qemu_reads_sealed_layers_of_a_running_daemon() {
    let bench = Bench::new(&["vda"]);
    for round in ["first", "after-restart"] {
        let manager = bench.open();
        stamp(&manager, "vda", 0, 1);
        let record = snapshot(&manager, round);
        stamp(&manager, "vda", 0, 2);
        let image = &record.disks[0].path;
        let run = |arguments: &[&str]| {
            let output = std::process::Command::new("qemu-img").args(arguments).output();
            output.expect("qemu-img is needed: run `make deps`")
        };
        let name = image.to_str().unwrap();
        for arguments in [&["info", name][..], &["info", "--backing-chain", name]] {
            let output = run(arguments);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let exported = bench.path("exported");
        manager
            .export(round, "vda", &exported, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(()))
            .unwrap();
        let format = if round == "first" { "raw" } else { "qcow2" };
        let output = run(&["compare", "-f", format, "-F", "raw", name, exported.to_str().unwrap()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::remove_file(exported).unwrap();
        let active = manager.disks()[0].layers.last().unwrap().path.clone();
        assert!(!run(&["info", active.to_str().unwrap()]).status.success());
        manager.shut_down().unwrap();
        drop(manager);
        check(&active);
    }
}
