//! The manager over real files, without a guest: what snapshots, deletes and reverts do to the disks.

#![allow(clippy::unwrap_used, reason = "a failed step of a test ends it")]

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use block::ErrorKind;
use hostio::{Cache, HostFile, Open};
use snapshot::{
    AllowedFolders, CreateRequest, DiskConfig, Event, FreezeDefaults, FreezePolicy, Grade, ImageFormat,
    Manager,
};

mod bench;

use bench::{Bench, SIZE, byte, chain, check, delete, disk, request, snapshot, stamp};

#[test]
fn a_snapshot_keeps_what_was_and_the_disk_goes_on() {
    let bench = Bench::new(&["vda", "vdb"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    stamp(&manager, "vdb", 4096, 1);
    let record = snapshot(&manager, "one");
    assert_eq!(record.grade, Grade::Crash);
    assert_eq!(record.disks.iter().map(|disk| disk.id.as_str()).collect::<Vec<_>>(), ["vda", "vdb"]);
    assert_eq!(record.disks[0].path, bench.path("base-vda.raw"));
    assert!(record.sealed);
    stamp(&manager, "vda", 0, 2);
    let second = snapshot(&manager, "two");
    stamp(&manager, "vda", 0, 3);
    check(&second.disks[0].path);

    assert_eq!((byte(&manager, "vda", 0), byte(&manager, "vdb", 4096)), (3, 1));
    assert_eq!(bench.export(&manager, "one", "vda")[0], 1);
    assert_eq!(bench.export(&manager, "two", "vda")[0], 2);
    assert_eq!(manager.list().iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["one", "two"]);
    assert_eq!(manager.list(), [manager.show("one").unwrap(), manager.show("two").unwrap()]);
}

#[test]
fn a_restart_finds_the_chain_whether_the_daemon_ended_well_or_not() {
    let bench = Bench::new(&["vda"]);
    for ends_well in [true, false] {
        let manager = bench.open();
        let name = format!("ended-well-{ends_well}");
        stamp(&manager, "vda", 0, 1);
        snapshot(&manager, &name);
        stamp(&manager, "vda", 0, 2);
        stamp(&manager, "vda", 3 << 20, 3);
        if ends_well {
            manager.shut_down().unwrap();
        }
        // Else without a flush: the overlay's tables are only in the process, and in its journal.
        drop(manager);
        let manager = bench.open();
        assert_eq!((byte(&manager, "vda", 0), byte(&manager, "vda", 3 << 20)), (2, 3));
        assert_eq!(bench.export(&manager, &name, "vda")[0], 1);
        manager.shut_down().unwrap();
        drop(manager);
    }
    let manager = Manager::open_offline(&bench.path("state"), AllowedFolders::default()).unwrap();
    assert_eq!(manager.list().len(), 2);
    assert_eq!(bench.export(&manager, "ended-well-true", "vda")[0], 1);
}

#[test]
fn one_process_a_state_directory_and_one_base_a_disk() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let error = Manager::open_offline(&bench.path("state"), AllowedFolders::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("--control"), "{error}");
    drop(manager);
    let mut other = bench.disks.clone();
    other[0].path = bench.path("other.raw");
    File::create(&other[0].path).unwrap();
    let opened = Manager::open(
        &bench.path("state"),
        &other,
        AllowedFolders::default(),
        FreezeDefaults::default(),
        None,
    );
    assert!(opened.err().unwrap().to_string().contains("base-vda.raw"));
}

/// One that was killed has them a moment longer than it lives; one that lives keeps them.
#[test]
fn images_that_another_process_has_are_waited_for_and_not_for_long() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    snapshot(&manager, "one");
    manager.shut_down().unwrap();
    let active = manager.disks()[0].layers[1].path.clone();
    drop(manager);
    let hold = || HostFile::open(&active, Open { writable: true, cache: Cache::Writeback }).unwrap();
    let held = hold();
    let begin = Instant::now();
    let killed = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        drop(held);
    });
    drop(bench.open());
    assert!(begin.elapsed() >= Duration::from_millis(200));
    killed.join().unwrap();
    let _held = hold();
    let (begin, folders) = (Instant::now(), AllowedFolders::default());
    let opened = Manager::open(&bench.path("state"), &bench.disks, folders, FreezeDefaults::default(), None);
    let error = opened.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("in use by another process"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(10), "it is not waited for as long as it lives");
}

#[test]
fn a_disk_under_another_id_does_not_write_beneath_the_snapshots_that_it_had() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    snapshot(&manager, "one");
    manager.shut_down().unwrap();
    drop(manager);
    let mut renamed = bench.disks.clone();
    renamed[0].id = "root".to_owned();
    let opened = Manager::open(
        &bench.path("state"),
        &renamed,
        AllowedFolders::default(),
        FreezeDefaults::default(),
        None,
    );
    let error = opened.err().unwrap();
    assert!(error.to_string().contains("serve it with id=vda"), "{error}");
}

#[test]
fn any_snapshot_can_be_deleted_and_neither_the_disk_nor_another_snapshot_changes() {
    let bench = Bench::new(&["vda", "vdb"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "one");
    stamp(&manager, "vda", 0, 2);
    snapshot(&manager, "two");
    stamp(&manager, "vda", 4096, 3);
    let files = || std::fs::read_dir(bench.folder.path()).unwrap().count();
    let before = files();

    delete(&manager, "one").unwrap();
    assert_eq!(files(), before - 2);
    assert_eq!((byte(&manager, "vda", 0), byte(&manager, "vda", 4096)), (2, 3));
    assert_eq!(manager.show("two").unwrap().disks[0].path, bench.path("base-vda.raw"));
    assert_eq!(bench.export(&manager, "two", "vda")[..4097], [&[2; 4096][..], &[0]].concat());
    assert_eq!(manager.show("one").unwrap_err().kind(), ErrorKind::NotFound);
    // Without a guest, all that is left after the last one is the image that was given, and it is written on.
    stamp(&manager, "vda", 8192, 4);
    delete(&manager, "two").unwrap();
    assert_eq!(files(), 3);
    assert_eq!(manager.disks()[0].layers.len(), 1);
    stamp(&manager, "vda", 12288, 5);
    assert_eq!([0, 8192, 12288].map(|at| byte(&manager, "vda", at)), [2, 4, 5]);
    manager.shut_down().unwrap();
    let base = std::fs::read(bench.path("base-vda.raw")).unwrap();
    assert_eq!([0, 4096, 8192, 12288].map(|at| base[at]), [2, 3, 4, 5]);
}

#[test]
fn a_revert_forgets_what_came_after() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "one");
    stamp(&manager, "vda", 0, 2);
    snapshot(&manager, "two");
    stamp(&manager, "vda", 0, 3);
    manager.revert("two", false).unwrap();
    assert_eq!(byte(&manager, "vda", 0), 2);
    let error = manager.revert("one", false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    manager.revert("one", true).unwrap();
    assert_eq!(byte(&manager, "vda", 0), 1);
    assert_eq!(manager.list().len(), 1);
    stamp(&manager, "vda", 0, 4);
    manager.shut_down().unwrap();
    drop(manager);
    let manager = bench.open();
    assert_eq!(byte(&manager, "vda", 0), 4);
    assert_eq!(bench.export(&manager, "one", "vda")[0], 1);
}

#[test]
fn a_guest_keeps_its_disks_from_a_revert_and_not_from_a_delete() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "one");
    stamp(&manager, "vda", 0, 2);
    chain(&manager, "vda").set_connected(true);
    let error = manager.revert("one", false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("shut it down first"), "{error}");
    delete(&manager, "one").unwrap();
    assert!(!chain(&manager, "vda").gate().is_closed());
    assert_eq!(byte(&manager, "vda", 0), 2);
    assert_eq!(
        manager.disks()[0].layers.len(),
        2,
        "the layer that the guest writes to, and the one it was merged into"
    );
    assert!(manager.list().is_empty());
}

#[test]
fn bad_requests_are_refused_and_change_nothing() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    snapshot(&manager, "taken");
    let files = std::fs::read_dir(bench.folder.path()).unwrap().count();
    let with_disks = |disks: &[&str]| {
        let disks = Some(disks.iter().map(|&id| id.to_owned()).collect());
        CreateRequest { disks, ..request("new") }
    };
    let require = CreateRequest { freeze: Some(FreezePolicy::Require), ..request("new") };
    let table = [
        (request(""), ErrorKind::InvalidInput),
        (request("-x"), ErrorKind::InvalidInput),
        (request("a/b"), ErrorKind::InvalidInput),
        (request(&"x".repeat(65)), ErrorKind::InvalidInput),
        (request("taken"), ErrorKind::Busy),
        (with_disks(&[]), ErrorKind::InvalidInput),
        (with_disks(&["vdz"]), ErrorKind::NotFound),
        (with_disks(&["vda", "vda"]), ErrorKind::InvalidInput),
        (require, ErrorKind::InvalidInput),
    ];
    for (bad, kind) in table {
        let error = manager.create(bad.clone()).unwrap_err();
        assert_eq!(error.kind(), kind, "{bad:?}: {error}");
    }
    assert_eq!(std::fs::read_dir(bench.folder.path()).unwrap().count(), files);
    assert_eq!(manager.list().len(), 1);
    assert_eq!(manager.show("none").unwrap_err().kind(), ErrorKind::NotFound);
    let out = bench.path("out");
    let exported =
        manager.export("taken", "vdz", &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(()));
    assert_eq!(exported.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_prepared_snapshot_is_released_aborted_or_ended_by_its_lease() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    let lease = Duration::from_secs(20);
    manager.prepare(request("held"), lease).unwrap();
    assert_eq!(manager.prepared().as_deref(), Some("held"));
    assert!(chain(&manager, "vda").gate().is_closed());
    assert_eq!(manager.create(request("other")).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(manager.release("other").unwrap_err().kind(), ErrorKind::NotFound);
    assert!(manager.release("held").unwrap().timing.gate_closed > 0.0);
    assert!(!chain(&manager, "vda").gate().is_closed());

    manager.prepare(request("aborted"), lease).unwrap();
    manager.abort("aborted").unwrap();
    assert!(!chain(&manager, "vda").gate().is_closed());

    let events = bench::events(&manager);
    manager.prepare(request("expired"), Duration::from_millis(50)).unwrap();
    let failed = |event| matches!(event, Event::Failed { name, .. } if name == "expired");
    let mut events = std::iter::from_fn(|| events.recv_timeout(Duration::from_secs(10)).ok());
    assert!(events.any(failed));
    assert!(!chain(&manager, "vda").gate().is_closed());
    assert_eq!(manager.list().len(), 1);
    assert_eq!(chain(&manager, "vda").gate().in_flight(), 0);
    assert_eq!(manager.disks()[0].layers.len(), 2);
}

/// The daemon was killed between PREPARE and the end of the cut: the manifest names an overlay, and a snapshot that
/// was never taken.
#[test]
fn a_kill_in_mid_cut_leaves_a_chain_that_reads_right() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "one");
    stamp(&manager, "vda", 4096, 2);
    manager.prepare(request("never"), Duration::from_secs(20)).unwrap();
    let state = bench.path("state");
    let at_the_kill = bench.path("state-at-the-kill");
    let copied = Command::new("cp").arg("-a").arg(&state).arg(&at_the_kill).status().unwrap();
    assert!(copied.success());
    // The overlay itself goes when the cut is undone below, so it is kept aside as well.
    let overlay = std::fs::read_dir(bench.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().ends_with("000002.qcow2"))
        .unwrap();
    let kept = bench.path("kept");
    std::fs::copy(&overlay, &kept).unwrap();
    drop(manager);
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::rename(&at_the_kill, &state).unwrap();
    std::fs::rename(&kept, &overlay).unwrap();

    let manager = bench.open();
    assert_eq!((byte(&manager, "vda", 0), byte(&manager, "vda", 4096)), (1, 2));
    assert_eq!(manager.list().len(), 1);
    assert_eq!(bench.export(&manager, "one", "vda")[4096], 0);
    stamp(&manager, "vda", 8192, 3);
    snapshot(&manager, "two");
    assert_eq!(bench.export(&manager, "two", "vda")[8192], 3);
}

#[test]
fn a_qcow2_base_with_its_own_backing_file_is_served() {
    let bench = Bench::new(&[]);
    let beneath = bench.path("beneath.raw");
    let file = File::create(&beneath).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&[5; 4096], 8192).unwrap();
    let base = bench.path("base.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "beneath.raw"])
        .arg(&base)
        .status();
    assert!(made.expect("qemu-img is needed: run `make deps`").success());
    let bench = Bench { disks: vec![disk("vda", base.clone(), ImageFormat::Qcow2)], ..bench };
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "one");
    stamp(&manager, "vda", 8192, 2);
    assert_eq!((byte(&manager, "vda", 0), byte(&manager, "vda", 8192)), (1, 2));
    let exported = bench.export(&manager, "one", "vda");
    assert_eq!((exported[0], exported[8192]), (1, 5));
    manager.shut_down().unwrap();
    check(&base);
}

/// A loop device on a file, as a host's block device; taken away when this is dropped.
struct Device(String);

impl Device {
    fn new(file: &Path) -> Self {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(made.status.success(), "no loop device: {made:?}");
        Self(String::from_utf8(made.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        Command::new("losetup").args(["--detach", &self.0]).status().unwrap();
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_block_device_is_a_base_whose_overlays_are_in_the_state_directory() {
    for cache in [Cache::Writeback, Cache::None] {
        let mut bench = Bench::new(&["vda"]);
        let device = Device::new(&bench.disks[0].path);
        bench.disks[0] = DiskConfig { path: device.0.clone().into(), cache, ..bench.disks[0].clone() };
        let manager = bench.open();
        stamp(&manager, "vda", 0, 1);
        let record = snapshot(&manager, "one");
        assert_eq!(record.disks[0].path, Path::new(&device.0));
        stamp(&manager, "vda", 0, 2);
        let overlay = manager.disks()[0].layers[1].path.clone();
        assert_eq!(overlay.parent(), Some(bench.path("state/layers").as_path()));
        manager.shut_down().unwrap();
        drop(manager);
        check(&overlay);
        let manager = bench.open();
        assert_eq!((byte(&manager, "vda", 0), bench.export(&manager, "one", "vda")[0]), (2, 1));
        delete(&manager, "one").unwrap();
        assert_eq!((byte(&manager, "vda", 0), overlay.exists()), (2, false));
    }
}

#[test]
fn a_base_with_its_data_in_a_file_of_its_own_is_served() {
    let bench = Bench::new(&[]);
    let base = bench.path("base.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw"])
        .arg(&base)
        .arg(SIZE.to_string())
        .current_dir(bench.folder.path())
        .status();
    assert!(made.expect("qemu-img is needed: run `make deps`").success());
    let bench = Bench { disks: vec![disk("vda", base.clone(), ImageFormat::Qcow2)], ..bench };
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    snapshot(&manager, "one");
    stamp(&manager, "vda", 8192, 2);
    assert_eq!((byte(&manager, "vda", 0), byte(&manager, "vda", 8192)), (1, 2));
    assert_eq!(bench.export(&manager, "one", "vda")[0], 1);
    manager.shut_down().unwrap();
    drop(manager);
    let data = std::fs::read(bench.path("data.raw")).unwrap();
    assert_eq!((data[0], data[8192]), (1, 0));
    // QEMU looks for a data file in its working directory, not beside the image.
    let checked = Command::new("qemu-img")
        .args(["check", "-q", "base.qcow2"])
        .current_dir(bench.folder.path())
        .status();
    assert!(checked.unwrap().success());
    let manager = bench.open();
    assert_eq!((byte(&manager, "vda", 0), byte(&manager, "vda", 8192)), (1, 2));
}

#[test]
fn each_layer_tells_its_size_and_what_it_takes_on_the_host() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    snapshot(&manager, "one");
    manager.resize("vda", 2 * SIZE).unwrap();
    let sizes = || {
        let layers = manager.disks().remove(0).layers;
        layers.iter().map(|layer| (layer.virtual_size, layer.actual_size.unwrap())).collect::<Vec<_>>()
    };
    let empty = sizes();
    assert_eq!(empty[0], (SIZE, 0), "the base is all holes");
    assert_eq!(empty[1].0, 2 * SIZE);
    (0..16).for_each(|place| stamp(&manager, "vda", place << 16, 1));
    let written = sizes();
    assert_eq!(written[0], empty[0]);
    assert!(written[1].1 >= empty[1].1 + (16 << 12), "{empty:?} {written:?}");
}
