//! Backups and bitmaps are of the instant of their transaction.

use std::thread;
use std::time::{Duration, Instant};

use block::{ErrorKind, read_disk};
use serde_json::{Value, json};

use crate::bench::*;

#[test]
fn a_full_backup_of_two_disks_and_an_incremental_are_the_disks_at_their_cuts() {
    let bench = Bench::new();
    let daemon = bench.open();
    let fulls = [bench.target(&daemon, "full-a"), bench.target(&daemon, "full-b")];
    write(&daemon, "vda", 4096, 1);
    write(&daemon, "vdb", 8192, 2);
    let at_full = [content(&daemon, "vda"), content(&daemon, "vdb")];
    let actions = json!([
        bitmap("add", "vda", "b"),
        bitmap("add", "vdb", "b"),
        full("vda", "full-a"),
        full("vdb", "full-b"),
    ]);
    transaction(&daemon, actions).unwrap();
    write(&daemon, "vda", 4096, 3);
    write(&daemon, "vda", 1 << 20, 4);
    for id in ["full-a", "full-b"] {
        assert_eq!(finish(&daemon, id), None);
    }
    for (path, bytes) in fulls.iter().zip(&at_full) {
        assert!(std::fs::read(path).unwrap() == *bytes);
    }
    assert_eq!((dirty(&daemon, "vda", "b"), dirty(&daemon, "vdb", "b")), (2 << 16, 0));

    // What has changed goes on top of a copy of the full one.
    let path = bench.path("next");
    std::fs::copy(&fulls[0], &path).unwrap();
    add(&daemon, json!({"driver": "raw", "node-name": "next", "file": {"driver": "file", "filename": path}}))
        .unwrap();
    let at_next = content(&daemon, "vda");
    transaction(&daemon, json!([incremental("vda", "next", "b")])).unwrap();
    write(&daemon, "vda", 2 << 20, 5);
    assert_eq!(finish(&daemon, "next"), None);
    assert!(std::fs::read(&path).unwrap() == at_next);
    assert_eq!(dirty(&daemon, "vda", "b"), 1 << 16);
    for node in ["next", "full-a", "full-b"] {
        daemon.backups.remove_node(node).unwrap();
    }
    assert!(daemon.backups.nodes().is_empty());
}

#[test]
fn a_transaction_of_which_one_action_fails_does_nothing() {
    let bench = Bench::new();
    let daemon = bench.open();
    bench.target(&daemon, "t");
    let layers = daemon.manager.disks()[0].layers.len();
    for bad in [
        json!({"type": "abort", "data": {}}),
        full("vdx", "t"),
        full("vda", "no-such-node"),
        full("vda", "t"),
        bitmap("clear", "vda", "missing"),
        incremental("vda", "t", "missing"),
    ] {
        let twice = bad == full("vda", "t");
        let actions = json!([bitmap("add", "vda", "b"), full("vda", "t"), bad]);
        let error = transaction(&daemon, actions).unwrap_err();
        assert!(!twice || error.kind() == ErrorKind::Busy, "{error}");
        assert!(daemon.manager.jobs().is_empty());
        assert!(daemon.manager.bitmaps("vda").unwrap().is_empty());
        assert_eq!(daemon.manager.disks()[0].layers.len(), layers);
    }
    transaction(&daemon, json!([full("vda", "t")])).unwrap();
    assert_eq!(finish(&daemon, "t"), None);
}

#[test]
fn a_snapshot_in_a_transaction_is_of_its_instant_and_goes_with_it_if_it_fails() {
    let bench = Bench::new();
    let daemon = bench.open();
    let target = bench.target(&daemon, "t");
    write(&daemon, "vda", 4096, 1);
    let at_cut = content(&daemon, "vda");
    let snapshot = |data: Value| json!({"type": "snapshot-create", "data": data});
    let actions = json!([bitmap("add", "vda", "b"), full("vda", "t"), snapshot(json!({"name": "s"}))]);
    transaction(&daemon, actions).unwrap();
    write(&daemon, "vda", 4096, 2);
    assert_eq!(finish(&daemon, "t"), None);
    assert!(std::fs::read(&target).unwrap() == at_cut);
    let taken = daemon.manager.show("s").unwrap();
    assert_eq!(taken.disks.len(), 2, "of all disks, though one alone is backed up");
    let mut held = vec![0; at_cut.len()];
    read_disk(&*daemon.manager.reader("s", "vda", "a test").unwrap().disk(), 0, &mut held).unwrap();
    assert!(held == at_cut);

    let layers = daemon.manager.disks()[0].layers.len();
    for (actions, story) in [
        (json!([snapshot(json!({"name": "s"}))]), "there is a snapshot 's' already"),
        (
            json!([snapshot(json!({"name": "x"})), snapshot(json!({"name": "y"}))]),
            "one cut makes one snapshot",
        ),
        (json!([full("vda", "t"), snapshot(json!({"name": "x", "disks": ["vdb"]}))]), "cuts disk 'vda'"),
        (json!([snapshot(json!({"name": "x"})), bitmap("clear", "vda", "missing")]), "missing"),
    ] {
        let error = transaction(&daemon, actions).unwrap_err().to_string();
        assert!(error.contains(story), "{error}");
        assert_eq!(daemon.manager.list().len(), 1);
        assert_eq!(daemon.manager.disks()[0].layers.len(), layers);
    }
}

/// The way of programs that know QEMU's filters: the backup is of the instant of the transaction, its bitmap too.
#[test]
fn a_backup_through_a_filter_is_of_the_instant_of_its_transaction() {
    let bench = Bench::new();
    let daemon = bench.open();
    let out = bench.target(&daemon, "out");
    bench.target(&daemon, "fleece");
    add(
        &daemon,
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "vda", "target": "fleece"}),
    )
    .unwrap();
    add(&daemon, json!({"driver": "snapshot-access", "node-name": "access", "file": "cbw"})).unwrap();
    daemon.backups.set_drive("/machine/peripheral/vda/virtio-backend", "cbw").unwrap();
    write(&daemon, "vda", 0, 1);
    let at_cut = content(&daemon, "vda");
    transaction(&daemon, json!([bitmap("add", "vda", "b"), full("access", "out")])).unwrap();
    write(&daemon, "vda", 0, 2);
    write(&daemon, "vda", 1 << 20, 3);
    assert_eq!(finish(&daemon, "out"), None);
    assert!(std::fs::read(&out).unwrap() == at_cut);
    // What only the cut shows to be wrong takes the snapshot with it.
    let twice = bitmap("add", "access", "twice");
    let gone = json!({"type": "snapshot-create", "data": {"name": "gone"}});
    let error = transaction(&daemon, json!([twice, twice, gone])).unwrap_err().to_string();
    assert!(error.contains("already exists"), "{error}");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !daemon.manager.list().is_empty() {
        assert!(Instant::now() < deadline, "the snapshot stays");
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(daemon.backups.remove_node("cbw").unwrap_err().kind(), ErrorKind::Busy);
    daemon.backups.set_drive("vda", "vda").unwrap();
    for node in ["access", "cbw", "fleece"] {
        daemon.backups.remove_node(node).unwrap();
    }

    // The next one: the bitmap is merged into one of the filter's node, and cleaned, in one transaction.
    bench.target(&daemon, "fleece2");
    add(
        &daemon,
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "vda", "target": "fleece2"}),
    )
    .unwrap();
    add(&daemon, json!({"driver": "snapshot-access", "node-name": "access", "file": "cbw"})).unwrap();
    daemon.backups.set_drive("vda", "cbw").unwrap();
    write(&daemon, "vda", 4 << 20, 4);
    let at_cut = content(&daemon, "vda");
    let merge = json!({"type": "block-dirty-bitmap-merge", "data": {"node": "access", "target": "tmp",
        "bitmaps": [{"node": "vda", "name": "b"}]}});
    let actions = json!([
        bitmap("add", "access", "tmp"),
        merge,
        incremental("access", "out", "tmp"),
        bitmap("clear", "vda", "b"),
    ]);
    transaction(&daemon, actions).unwrap();
    write(&daemon, "vda", 5 << 20, 5);
    assert_eq!(finish(&daemon, "out"), None);
    assert!(std::fs::read(&out).unwrap() == at_cut);
    assert_eq!(dirty(&daemon, "vda", "b"), 1 << 16);
}

/// An incremental goes to an overlay over the last backup: whole clusters are written, zeroes as such.
#[test]
fn an_incremental_to_a_qcow2_overlay_is_judged_by_qemu() {
    let bench = Bench::new();
    let daemon = bench.open();
    write(&daemon, "vda", 0, 1);
    write(&daemon, "vda", 1 << 20, 1);
    let base = bench.target(&daemon, "base");
    transaction(&daemon, json!([bitmap("add", "vda", "b"), full("vda", "base")])).unwrap();
    assert_eq!(finish(&daemon, "base"), None);
    daemon.backups.remove_node("base").unwrap();
    let overlay = bench.path("overlay.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&base), text(&overlay)]);
    let qcow2 = json!({"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": overlay}});
    add(&daemon, qcow2).unwrap();
    write(&daemon, "vda", 512, 2);
    write(&daemon, "vda", 1 << 20, 0);
    transaction(&daemon, json!([incremental("vda", "o", "b")])).unwrap();
    assert_eq!(finish(&daemon, "o"), None);
    daemon.backups.remove_node("o").unwrap();
    qemu_img(&["check", "-q", text(&overlay)]);
    let expected = bench.path("expected");
    std::fs::write(&expected, content(&daemon, "vda")).unwrap();
    qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", text(&overlay), text(&expected)]);
}

#[test]
fn a_read_only_disk_is_backed_up_beside_others_and_through_a_filter() {
    let bench = Bench::with_read_only();
    let daemon = bench.open();
    let outs = [bench.target(&daemon, "a"), bench.target(&daemon, "b")];
    write(&daemon, "vda", 0, 1);
    let at_cut = content(&daemon, "vda");
    transaction(&daemon, json!([full("vda", "a"), full("vdb", "b")])).unwrap();
    write(&daemon, "vda", 0, 2);
    for (id, out, expected) in [("a", &outs[0], &at_cut), ("b", &outs[1], &vec![7; SIZE as usize])] {
        assert_eq!(finish(&daemon, id), None);
        assert!(std::fs::read(out).unwrap() == *expected, "{id}");
    }
    bench.target(&daemon, "fleece");
    let filter =
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "vdb", "target": "fleece"});
    add(&daemon, filter).unwrap();
    add(&daemon, json!({"driver": "snapshot-access", "node-name": "access", "file": "cbw"})).unwrap();
    daemon.backups.set_drive("vdb", "cbw").unwrap();
    std::fs::write(&outs[1], vec![0; SIZE as usize]).unwrap();
    transaction(&daemon, json!([full("access", "b")])).unwrap();
    assert_eq!(finish(&daemon, "b"), None);
    assert!(std::fs::read(&outs[1]).unwrap() == vec![7; SIZE as usize]);
    let refused = transaction(&daemon, json!([incremental("vdb", "b", "x")])).unwrap_err();
    assert_eq!(refused.to_string(), "Bitmap 'x' is readonly and cannot be modified");
}
