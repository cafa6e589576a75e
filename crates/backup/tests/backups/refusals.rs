//! What is refused, in which words; and who may use what at the same time.

use std::fs::File;
use std::path::Path;

use block::ErrorKind;
use serde_json::{Value, json};
use snapshot::JobVerb;

use crate::bench::*;

#[test]
fn what_makes_no_sense_is_refused_in_qemus_words() {
    let bench = Bench::new();
    let daemon = bench.open();
    bench.target(&daemon, "t");
    let backup = |more: Value| {
        let mut action = full("vda", "t");
        action["data"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        transaction(&daemon, json!([action])).unwrap_err().to_string()
    };
    for (more, story) in [
        (json!({"sync": "incremental"}), "must provide a valid bitmap name for 'incremental' sync mode"),
        (json!({"bitmap-mode": "never"}), "Cannot specify bitmap sync mode without a bitmap"),
        (json!({"bitmap": "b"}), "Bitmap sync mode must be given when providing a bitmap"),
        (json!({"target": "x"}), "Cannot find device='x' nor node-name='x'"),
        (json!({"device": "x"}), "Cannot find device='x' nor node-name='x'"),
        (json!({"sync": "incremental", "bitmap": "x"}), "Bitmap 'x' could not be found"),
        (json!({"target": "vda"}), "Source and target cannot be the same"),
        (json!({"target": "vdb"}), "disk 'vdb' is its guest's: a target is an image that was added"),
    ] {
        assert_eq!(backup(more), story);
    }
    transaction(&daemon, json!([bitmap("add", "vda", "b")])).unwrap();
    let merge = |sources: Value| {
        let data = json!({"node": "vda", "target": "b", "bitmaps": sources});
        json!({"type": "block-dirty-bitmap-merge", "data": data})
    };
    for (action, story) in [
        (bitmap("add", "x", "b"), "Cannot find device='x' nor node-name='x'"),
        (bitmap("clear", "x", "b"), "Node 'x' not found"),
        (bitmap("remove", "x", "b"), "Node 'x' not found"),
        (bitmap("remove", "vda", "x"), "Dirty bitmap 'x' not found"),
        (merge(json!(["x"])), "Dirty bitmap 'x' not found"),
        (merge(json!([{"node": "x", "name": "b"}])), "Node 'x' not found"),
    ] {
        assert_eq!(transaction(&daemon, json!([action])).unwrap_err().to_string(), story);
    }
    for (options, story) in [
        (json!({"driver": "file", "filename": "/none"}), "'node-name' must be specified for the root node"),
        (json!({"driver": "raw", "node-name": "t", "file": "t"}), "Duplicate nodes with node-name='t'"),
        (json!({"driver": "raw", "node-name": "vda", "file": "t"}), "Duplicate nodes with node-name='vda'"),
        (json!({"driver": "raw", "node-name": "1", "file": "t"}), "Invalid node-name: '1'"),
    ] {
        assert_eq!(add(&daemon, options).unwrap_err().to_string(), story);
    }
    let again =
        json!({"driver": "raw", "node-name": "u", "file": {"driver": "file", "filename": bench.path("t")}});
    assert_eq!(add(&daemon, again).unwrap_err().kind(), ErrorKind::Busy, "a file has one writer");
}

#[test]
fn nothing_but_a_targets_own_job_writes_to_it() {
    let bench = Bench::new();
    let daemon = bench.open();
    let file = |name: &str, path: &Path| json!({"driver": "file", "node-name": name, "filename": path});
    let error = add(&daemon, file("f", &bench.path("vda.raw"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "a disk's own file: {error}");
    transaction(&daemon, json!([bitmap("add", "vda", "b")])).unwrap();
    let overlay = daemon.manager.disks()[0].layers.last().unwrap().path.clone();
    assert_eq!(add(&daemon, file("f", &overlay)).unwrap_err().kind(), ErrorKind::Busy);

    let path = bench.path("shared");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    add(&daemon, file("f", &path)).unwrap();
    add(&daemon, json!({"driver": "raw", "node-name": "one", "file": "f"})).unwrap();
    let two = json!({"driver": "raw", "node-name": "two", "file": "f"});
    assert_eq!(add(&daemon, two.clone()).unwrap_err().kind(), ErrorKind::Busy);
    daemon.backups.remove_node("one").unwrap();
    add(&daemon, two).unwrap();

    let read_only = json!({"driver": "raw", "node-name": "r", "read-only": true,
        "file": {"driver": "file", "filename": bench.target(&daemon, "t")}});
    assert_eq!(add(&daemon, read_only.clone()).unwrap_err().kind(), ErrorKind::Busy);
    daemon.backups.remove_node("t").unwrap();
    add(&daemon, read_only).unwrap();
    let error = transaction(&daemon, json!([full("vda", "r")])).unwrap_err();
    assert_eq!((error.kind(), &*error.to_string()), (ErrorKind::ReadOnly, "Block node is read-only: 'r'"));
}

#[test]
fn a_node_that_a_job_reads_or_writes_is_in_use() {
    let bench = Bench::new();
    let daemon = bench.open();
    bench.target(&daemon, "out");
    bench.target(&daemon, "fleece");
    let filter =
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "vda", "target": "fleece"});
    add(&daemon, filter).unwrap();
    add(&daemon, json!({"driver": "snapshot-access", "node-name": "access", "file": "cbw"})).unwrap();
    let mut waits = full("access", "out");
    waits["data"]["auto-finalize"] = json!(false);
    transaction(&daemon, json!([waits])).unwrap();
    daemon.backups.set_drive("vda", "vda").unwrap();
    for node in ["out", "access", "cbw", "fleece"] {
        assert_eq!(daemon.backups.remove_node(node).unwrap_err().kind(), ErrorKind::Busy, "{node}");
    }
    daemon.manager.ask_job("out", JobVerb::Cancel).unwrap();
    finish(&daemon, "out");
    for node in ["out", "access", "cbw", "fleece"] {
        daemon.backups.remove_node(node).unwrap();
    }
}

#[test]
fn a_filter_that_is_put_on_is_in_use() {
    let bench = Bench::new();
    let daemon = bench.open();
    for (name, fleece) in [("one", "f1"), ("two", "f2")] {
        bench.target(&daemon, fleece);
        add(
            &daemon,
            json!({"driver": "copy-before-write", "node-name": name, "file": "vda", "target": fleece}),
        )
        .unwrap();
    }
    let in_use = |name: &str| match daemon.backups.remove_node(name) {
        Ok(()) => panic!("{name} could be removed"),
        Err(error) => assert_eq!(error.to_string(), format!("Node {name} is in use")),
    };
    daemon.backups.set_drive("vda", "one").unwrap();
    in_use("one");
    daemon.backups.set_drive("vda", "two").unwrap();
    in_use("two");
    daemon.backups.remove_node("one").unwrap();
    daemon.backups.set_drive("vda", "vda").unwrap();
    daemon.backups.remove_node("two").unwrap();
}

#[test]
fn there_is_a_most_of_nodes_and_names_are_names() {
    let bench = Bench::new();
    let daemon = bench.open();
    let path = bench.path("shared");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    let node = |name: &str| json!({"driver": "file", "node-name": name, "filename": path, "read-only": true});
    let mut refused = None;
    for index in 0..=1024 {
        if let Err(error) = add(&daemon, node(&format!("n{index}"))) {
            refused = Some((index, error.to_string()));
            break;
        }
    }
    assert_eq!(refused, Some((1024, "there are too many nodes: delete those of no use".to_owned())));
    daemon.backups.remove_node("n5").unwrap();
    add(&daemon, node("again")).unwrap();
    daemon.backups.remove_node("again").unwrap();
    let long = "n".repeat(32);
    for name in ["", "1a", "#block0", "a b", "a/../b", "\u{e9}", "a\0b", "a\nb", "-a", &*long] {
        let error = add(&daemon, node(name)).unwrap_err();
        assert_eq!(error.to_string(), format!("Invalid node-name: '{name}'"));
        assert_eq!(daemon.backups.remove_node(name).unwrap_err().kind(), ErrorKind::NotFound, "{name:?}");
    }
}
