//! Chains of all shapes: with snapshots, without a base, of layers that differ in size.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use block::testing::Random;
use block::{Disk, ErrorKind};
use snapshot::{CommitRequest, JobOptions, JobVerb, Manager, StreamRequest};

use super::bench::{Bench, SIZE, byte, chain, delete, finish, snapshot, stamp};
use super::{chain_of, content, forget_some, kept, nodes};

#[test]
fn layers_that_hold_snapshots_are_not_merged_away() {
    let (_bench, manager) = chain_of(3);
    let commit = |base: &str, top: &str| {
        let [base_node, top_node] = [base, top].map(|node| Some(node.to_owned()));
        let device = "vda".to_owned();
        manager.commit(CommitRequest {
            device,
            base_node,
            top_node,
            auto_complete: true,
            ..CommitRequest::default()
        })
    };
    let error = commit("vda.0", "vda.2").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("s0"), "{error}");
    assert_eq!(commit("vda.1", "vda.1").unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(commit("vda.1", "vda.9").unwrap_err().kind(), ErrorKind::InvalidInput);
    let device = "vdz".to_owned();
    let missing =
        manager.commit(CommitRequest { device: device.clone(), ..CommitRequest::default() }).unwrap_err();
    // By the class libvirt tells what QEMU can do.
    assert_eq!((missing.kind(), &*missing.to_string()), (ErrorKind::NotFound, "Device 'vdz' not found"));
    let stream = manager.stream(StreamRequest { device, ..StreamRequest::default() });
    assert_eq!(stream.unwrap_err().kind(), ErrorKind::NotFound);
    let device = "vda".to_owned();
    let stream = manager.stream(StreamRequest { device, ..StreamRequest::default() });
    assert!(stream.unwrap_err().to_string().contains("would be lost"));
}

/// The base was pulled up: it is not used any more, is not removed, and the disk is still known by it.
#[test]
fn a_disk_can_be_made_independent_of_its_base() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    (0..8).for_each(|place| stamp(&manager, "vda", place << 20, 1));
    snapshot(&manager, "one");
    stamp(&manager, "vda", 4096, 2);
    snapshot(&manager, "two");
    delete(&manager, "one").unwrap();
    let before = content(&manager);
    // What holds no snapshot is streamed: nothing but the base is beneath the layer of "two" now.
    stamp(&manager, "vda", 8192, 3);
    snapshot(&manager, "three");
    delete(&manager, "two").unwrap();
    delete(&manager, "three").unwrap();
    chain(&manager, "vda").set_connected(true);
    let base = std::fs::read(bench.path("base-vda.raw")).unwrap();
    let id =
        manager.stream(StreamRequest { device: "vda".into(), options: kept(), ..StreamRequest::default() });
    let refused =
        id.and_then(|id| finish(&manager, &id).map_err(|why| block::Error::new(ErrorKind::Io, why)));
    if nodes(&manager).len() > 1 {
        refused.unwrap();
    }
    assert_eq!(byte(&manager, "vda", 4096), 2);
    assert_eq!(byte(&manager, "vda", 8192), 3);
    assert_eq!(content(&manager)[..4096], before[..4096]);
    assert_eq!(std::fs::read(bench.path("base-vda.raw")).unwrap().len(), base.len());
    manager.shut_down().unwrap();
    drop(manager);
    let manager = bench.open();
    assert_eq!(byte(&manager, "vda", 8192), 3);
    snapshot(&manager, "four");
    stamp(&manager, "vda", 8192, 4);
    assert_eq!(bench.export(&manager, "four", "vda")[8192], 3);
}

/// The disk has grown since the snapshot: the layer that takes in what came after it grows as well.
#[test]
fn layers_of_before_a_resize_take_in_those_of_after_it() {
    for (connected, name) in [(true, "guest"), (false, "none")] {
        let bench = Bench::new(&["vda"]);
        let manager = bench.open();
        chain(&manager, "vda").set_connected(connected);
        stamp(&manager, "vda", 0, 1);
        snapshot(&manager, "one");
        stamp(&manager, "vda", 4096, 2);
        snapshot(&manager, "two");
        manager.resize("vda", SIZE + (1 << 20)).unwrap();
        stamp(&manager, "vda", SIZE + 8192, 3);
        snapshot(&manager, "three");
        let look = || [0, 4096, SIZE, SIZE + 8192].map(|at| byte(&manager, "vda", at));
        for deleted in ["two", "one", "three"] {
            delete(&manager, deleted).unwrap();
            assert_eq!(look(), [1, 2, 0, 3], "{name}: {deleted}");
        }
        manager.shut_down().unwrap();
        drop(manager);
        let manager = bench.open();
        assert_eq!(chain(&manager, "vda").capacity(), SIZE + (1 << 20));
        assert_eq!(byte(&manager, "vda", SIZE + 8192), 3);
    }
}

/// A job is called off after it had its target grow, past the layer above that. The layers can be merged all the same.
#[test]
fn a_layer_that_grew_for_a_job_that_was_called_off_is_merged_later() {
    let larger = SIZE + (4 << 20);
    for restarted in [false, true] {
        let bench = Bench::new(&["vda"]);
        let mut manager = bench.open();
        chain(&manager, "vda").set_connected(true);
        stamp(&manager, "vda", 0, 1);
        let commit = |manager: &Manager, speed| {
            let (device, options) = ("vda".to_owned(), JobOptions { speed, ..kept() });
            manager
                .commit(CommitRequest { device, options, auto_complete: true, ..CommitRequest::default() })
                .unwrap()
        };
        (0..8).for_each(|place| stamp(&manager, "vda", place << 20, 2));
        snapshot(&manager, "one");
        (0..8).for_each(|place| stamp(&manager, "vda", (place << 20) + 4096, 3));
        snapshot(&manager, "two");
        manager.resize("vda", larger).unwrap();
        (0..4).for_each(|place| stamp(&manager, "vda", SIZE + (place << 20), 4));
        manager.shut_down().unwrap();
        drop(manager);
        forget_some(&bench, &mut BTreeMap::new(), &mut Random(1));
        manager = bench.open();
        chain(&manager, "vda").set_connected(true);
        let before = (0..larger >> 12).map(|page| byte(&manager, "vda", page << 12)).collect::<Vec<_>>();
        let mut id = commit(&manager, 4096);
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::fs::metadata(bench.path("base-vda.raw")).unwrap().len() < larger {
            assert!(Instant::now() < deadline, "{:?}", manager.jobs());
            std::thread::sleep(Duration::from_millis(1));
        }
        if restarted {
            manager.shut_down().unwrap();
            drop(manager);
            manager = bench.open();
            chain(&manager, "vda").set_connected(true);
            manager.set_job_speed(&id, 0).unwrap();
        } else {
            manager.ask_job(&id, JobVerb::Cancel).unwrap();
            finish(&manager, &id).unwrap_err();
            id = commit(&manager, 0);
        }
        finish(&manager, &id).unwrap();
        let after = (0..larger >> 12).map(|page| byte(&manager, "vda", page << 12)).collect::<Vec<_>>();
        assert!(before == after, "the disk has changed");
    }
}

/// The base image had a backing file of its own: what was only in that would be gone with the base.
#[test]
fn a_disk_made_independent_of_its_base_is_so_of_what_is_beneath_that() {
    let mut bench = Bench::new(&["vda"]);
    let (beneath, base) = (bench.path("base-vda.raw"), bench.path("base.qcow2"));
    let file = std::fs::File::options().write(true).open(&beneath).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[5; 4096], 8192).unwrap();
    let mut create = std::process::Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base-vda.raw"]).arg(&base);
    assert!(create.status().expect("qemu-img is needed: run `make deps`").success());
    (bench.disks[0].path, bench.disks[0].format) = (base, snapshot::ImageFormat::Qcow2);
    let manager = bench.open();
    stamp(&manager, "vda", 0, 1);
    chain(&manager, "vda").set_connected(true);
    let request = StreamRequest { device: "vda".to_owned(), options: kept(), ..StreamRequest::default() };
    // The base itself is the active layer: one that can be streamed into is put on it.
    snapshot(&manager, "one");
    delete(&manager, "one").unwrap();
    let id = manager.stream(request).unwrap();
    finish(&manager, &id).unwrap();
    assert!(manager.disks()[0].layers.iter().all(|layer| !layer.path.ends_with("base.qcow2")));
    assert_eq!([0, 8192].map(|at| byte(&manager, "vda", at)), [1, 5]);
    manager.shut_down().unwrap();
    drop(manager);
    std::fs::remove_file(beneath).unwrap();
    assert_eq!([0, 8192].map(|at| byte(&bench.open(), "vda", at)), [1, 5]);
}

/// Each layer that a job had merged others into kept its journal open, though its files were gone: over hours of snapshots
/// and deletes the daemon's descriptors grew with the chain.
#[test]
fn what_jobs_have_merged_into_holds_no_journal() {
    let (bench, manager) = chain_of(6);
    chain(&manager, "vda").set_connected(true);
    // Upward, for the base has to hold the oldest.
    ["s1", "s3"].iter().for_each(|name| delete(&manager, name).unwrap());
    let folder = bench.path("state/journal");
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let links = open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    let journals: Vec<_> = links.filter(|link| link.starts_with(&folder)).collect();
    assert_eq!(journals.len(), 2, "the active layer's alone: {journals:?}");
}
