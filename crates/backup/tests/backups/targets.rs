//! What backups are written to: files that are made for them, compressed images, images of all kinds.

use std::path::Path;
use std::process::Command;

use backup::ImageOptions;
use block::{ErrorKind, write_disk};
use serde_json::{Value, json};

use crate::bench::*;

/// Bytes on the disk of which each cluster compresses to about a half, or is as it is.
fn scribble(daemon: &Daemon, disk: &str, seed: u64) {
    let chain = daemon.manager.chain(disk).unwrap();
    let lane = chain.gate().lane(std::task::Waker::noop().clone());
    assert!(lane.enter());
    let mut state = seed;
    let mut byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    for cluster in (0..SIZE >> 16).filter(|cluster| cluster % 3 > 0) {
        let bytes: Vec<u8> =
            (0..1 << 16).map(|at| if cluster % 2 == 0 && at % 2 == 0 { 0 } else { byte() }).collect();
        write_disk(&**chain, cluster << 16, &bytes).unwrap();
    }
    lane.leave(1);
}

fn drive_backup(device: &str, target: &Path, more: Value) -> Value {
    let mut data =
        json!({"device": device, "target": target, "sync": "full", "job-id": "j", "auto-dismiss": false});
    data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({"type": "drive-backup", "data": data})
}

/// QEMU finds nothing wrong with the image, and the disk's bytes in it.
fn assert_is(bench: &Bench, image: &Path, format: &str, expected: &[u8]) {
    let raw = bench.path("expected");
    std::fs::write(&raw, expected).unwrap();
    if format == "qcow2" {
        qemu_img(&["check", "-q", "-f", "qcow2", text(image)]);
    }
    qemu_img(&["compare", "-q", "-f", format, "-F", "raw", text(image), text(&raw)]);
}

fn create(daemon: &Daemon, options: Value) -> Option<String> {
    let options = serde_json::from_value::<ImageOptions>(options).unwrap();
    match daemon.backups.create_image("create".to_owned(), options, None) {
        Ok(()) => finish(daemon, "create"),
        Err(error) => Some(error.to_string()),
    }
}

#[test]
fn compressed_backups_are_the_disk_and_smaller() {
    let bench = Bench::new();
    let daemon = bench.open();
    scribble(&daemon, "vda", 1);
    for (name, kind) in [
        ("zlib", "cluster_size=64k"),
        ("zstd", "cluster_size=64k,compression_type=zstd"),
        ("extended", "cluster_size=128k,extended_l2=on"),
        ("large", "cluster_size=2M"),
        ("small", "cluster_size=4k"),
    ] {
        let path = bench.path(name);
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", kind, text(&path), &SIZE.to_string()]);
        add(
            &daemon,
            json!({"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": path}}),
        )
        .unwrap();
        let mut action = full("vda", name);
        action["data"]["compress"] = json!(true);
        transaction(&daemon, json!([action])).unwrap();
        assert_eq!(finish(&daemon, name), None);
        daemon.backups.remove_node(name).unwrap();
        assert_is(&bench, &path, "qcow2", &content(&daemon, "vda"));
        let checked =
            Command::new("qemu-img").args(["check", "--output=json", text(&path)]).output().unwrap();
        let checked: Value = serde_json::from_slice(&checked.stdout).unwrap();
        assert!(checked["compressed-clusters"].as_u64().unwrap() > 0, "{name}: {checked}");
        let len = std::fs::metadata(&path).unwrap().len();
        assert!(name == "large" || len < SIZE * 2 / 3, "{name}: {len}");
    }
}

/// Compressed increments over each other, and one that goes into an image that holds the one before.
#[test]
fn compressed_increments_go_on_top_of_the_backup_before() {
    let bench = Bench::new();
    let daemon = bench.open();
    scribble(&daemon, "vda", 2);
    let base = bench.path("base");
    let compress = json!({"format": "qcow2", "compress": true});
    transaction(&daemon, json!([bitmap("add", "vda", "b"), drive_backup("vda", &base, compress)])).unwrap();
    assert_eq!(finish(&daemon, "j"), None);
    write(&daemon, "vda", 3 << 16, 9);
    write(&daemon, "vda", (5 << 16) + 512, 0);
    let increment = json!({"format": "qcow2", "mode": "existing", "compress": true, "sync": "incremental", "bitmap": "b"});
    transaction(&daemon, json!([drive_backup("vda", &base, increment.clone())])).unwrap();
    assert_eq!(finish(&daemon, "j"), None);
    assert_is(&bench, &base, "qcow2", &content(&daemon, "vda"));
    write(&daemon, "vda", 1 << 20, 7);
    let overlay = bench.path("overlay");
    let options = json!({"driver": "qcow2", "size": SIZE, "backing-file": base, "backing-fmt": "qcow2",
        "file": {"driver": "file", "filename": overlay}});
    std::fs::File::create(&overlay).unwrap();
    assert_eq!(create(&daemon, options), None);
    transaction(&daemon, json!([drive_backup("vda", &overlay, increment)])).unwrap();
    assert_eq!(finish(&daemon, "j"), None);
    assert_is(&bench, &overlay, "qcow2", &content(&daemon, "vda"));
    assert_eq!(dirty(&daemon, "vda", "b"), 0);
}

#[test]
fn a_backup_to_a_file_makes_it_or_takes_the_one_there_is() {
    let bench = Bench::new();
    let daemon = bench.open();
    scribble(&daemon, "vda", 3);
    let path = bench.path("made");
    std::fs::write(&path, vec![0xa5; 100 << 10]).unwrap();
    let layers = daemon.manager.disks()[0].layers.len();
    for (format, mode) in
        [("raw", "absolute-paths"), ("raw", "existing"), ("qcow2", "absolute-paths"), ("qcow2", "existing")]
    {
        write(&daemon, "vda", 7 << 16, format.len() as u8);
        let expected = content(&daemon, "vda");
        let more = json!({"format": format, "mode": mode});
        transaction(&daemon, json!([drive_backup("vda", &path, more)])).unwrap();
        write(&daemon, "vda", 7 << 16, 77);
        assert_eq!(finish(&daemon, "j"), None);
        assert_is(&bench, &path, format, &expected);
    }
    assert!(daemon.backups.nodes().is_empty());
    assert!(daemon.manager.disks()[0].layers.len() > layers);
}

#[test]
fn a_backup_to_a_file_that_can_not_be_is_refused_and_spares_it() {
    let bench = Bench::new();
    let daemon = bench.open();
    let path = bench.path("spared");
    std::fs::write(&path, b"mine").unwrap();
    bench.target(&daemon, "t");
    for (more, story) in [
        (json!({"format": "vmdk"}), "Unknown file format 'vmdk'"),
        (json!({"mode": "existing"}), "'format' must be given: what is in an image is not guessed"),
        (
            json!({"format": "raw", "compress": true}),
            &*format!("Compression is not supported for this drive {}", path.display()),
        ),
        (json!({"format": "raw", "job-id": "1"}), "Invalid job ID '1'"),
        (json!({"device": "x"}), "Cannot find device='x' nor node-name='x'"),
        (json!({"sync": "incremental"}), "must provide a valid bitmap name for 'incremental' sync mode"),
    ] {
        let refused = transaction(&daemon, json!([drive_backup("vda", &path, more)])).unwrap_err();
        assert_eq!(refused.to_string(), story);
    }
    let mut compressed = full("vda", "t");
    compressed["data"]["compress"] = json!(true);
    let refused = transaction(&daemon, json!([compressed])).unwrap_err();
    assert_eq!(refused.to_string(), "Compression is not supported for this drive t");
    let own = bench.path("vda.raw");
    let refused =
        transaction(&daemon, json!([drive_backup("vdb", &own, json!({"format": "raw"}))])).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy, "a disk's own file: {refused}");
    assert_eq!(std::fs::metadata(&own).unwrap().len(), SIZE);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    assert!(daemon.manager.jobs().is_empty());
}

/// `manifest.json`, emptied, is the loss of all disks.
#[test]
fn what_is_in_the_state_directory_is_no_target_by_any_name() {
    let bench = Bench::new();
    let daemon = bench.open();
    transaction(&daemon, json!([bitmap("add", "vda", "b")])).unwrap();
    let state = bench.path("state");
    let [symbolic, hard, folder] = ["symbolic", "hard", "folder"].map(|name| bench.path(name));
    std::os::unix::fs::symlink(state.join("manifest.json"), &symbolic).unwrap();
    std::os::unix::fs::symlink(&state, &folder).unwrap();
    std::fs::hard_link(state.join("manifest.json"), &hard).unwrap();
    let files = || {
        let mut found = Vec::new();
        let mut folders = vec![state.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
                match entry.file_type().unwrap().is_dir() {
                    true => folders.push(entry.path()),
                    false => found.push((entry.path(), std::fs::read(entry.path()).unwrap())),
                }
            }
        }
        found.sort();
        found
    };
    let before = files();
    let own: Vec<_> = before.iter().map(|(path, _)| path.clone()).collect();
    assert!(own.contains(&state.join("manifest.json")) && own.len() > 2, "{own:?}");
    for path in own.iter().chain([&symbolic, &hard, &folder.join("new"), &state.join("new")]) {
        let refused = |error: &str| assert!(error.contains("is in the state directory"), "{error}");
        for format in ["raw", "qcow2"] {
            let action = drive_backup("vda", path, json!({"format": format}));
            refused(&transaction(&daemon, json!([action])).unwrap_err().to_string());
        }
        refused(&create(&daemon, json!({"driver": "file", "filename": path, "size": 4096})).unwrap());
        let file = json!({"driver": "file", "filename": path});
        refused(&create(&daemon, json!({"driver": "qcow2", "file": file, "size": 4096})).unwrap());
        let node = json!({"driver": "raw", "node-name": "n", "file": file});
        refused(&add(&daemon, node).unwrap_err().to_string());
        assert!(files() == before, "{}", path.display());
    }
    // Nor does an image that is in use lose a byte, whoever uses it.
    let other = bench.target(&daemon, "t");
    std::fs::write(&other, vec![5; SIZE as usize]).unwrap();
    let layers: Vec<_> = daemon.manager.disks()[0].layers.iter().map(|layer| layer.path.clone()).collect();
    assert_eq!(layers.len(), 2);
    for path in layers.iter().chain([&other]) {
        let before = std::fs::read(path).unwrap();
        for format in ["raw", "qcow2"] {
            let action = drive_backup("vdb", path, json!({"format": format}));
            assert_eq!(transaction(&daemon, json!([action])).unwrap_err().kind(), ErrorKind::Busy);
        }
        let refused = create(&daemon, json!({"driver": "file", "filename": path, "size": 4096})).unwrap();
        assert!(refused.contains("in use"), "{refused}");
        assert!(std::fs::read(path).unwrap() == before);
    }
}

#[test]
fn images_that_are_made_are_what_was_asked_for() {
    let bench = Bench::new();
    let daemon = bench.open();
    let path = bench.path("image");
    assert_eq!(create(&daemon, json!({"driver": "file", "filename": path, "size": 1 << 20})), None);
    assert_eq!(std::fs::read(&path).unwrap(), vec![0; 1 << 20]);
    add(&daemon, json!({"driver": "file", "node-name": "f", "filename": path})).unwrap();
    let options = |more: Value| {
        let mut options = json!({"driver": "qcow2", "file": "f", "size": SIZE});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    let info = || {
        let output =
            Command::new("qemu-img").args(["info", "-U", "--output=json", text(&path)]).output().unwrap();
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    assert_eq!(create(&daemon, options(json!({}))), None);
    assert_eq!((&info()["cluster-size"], &info()["virtual-size"]), (&json!(65536), &json!(SIZE)));
    let all = json!({"cluster-size": 131_072, "extended-l2": true, "lazy-refcounts": true, "compression-type": "zstd",
        "version": "v3", "refcount-bits": 16, "preallocation": "off", "backing-file": "b", "backing-fmt": "raw"});
    assert_eq!(create(&daemon, options(all)), None);
    let (told, about) = (info(), info()["format-specific"]["data"].clone());
    assert_eq!((&told["cluster-size"], &told["backing-filename"]), (&json!(131_072), &json!("b")));
    assert_eq!(
        (&about["extended-l2"], &about["lazy-refcounts"], &about["compression-type"]),
        (&json!(true), &json!(true), &json!("zstd"))
    );
    for (more, story) in [
        (json!({"version": "v2"}), "images of version 'v2' are not made: use 'v3'"),
        (json!({"refcount-bits": 1}), "'refcount-bits' can only be 16"),
        (json!({"preallocation": "full"}), "Unsupported preallocation mode 'full'"),
        (json!({"cluster-size": 1000}), "Cluster size must be a power of two between 512 and 2048k"),
        (json!({"size": 1000}), "Image size must be a multiple of 512 bytes"),
        (json!({"backing-fmt": "raw"}), "Backing format cannot be used without backing file"),
        (json!({"file": "x"}), "Cannot find device='x' nor node-name='x'"),
    ] {
        assert_eq!(create(&daemon, options(more)).as_deref(), Some(story));
    }
    // What is in use is not made anew.
    add(&daemon, json!({"driver": "qcow2", "node-name": "q", "file": "f"})).unwrap();
    let busy = create(&daemon, options(json!({}))).unwrap();
    assert!(busy.contains("node 'q' uses 'f'"), "{busy}");
    assert_eq!(info()["cluster-size"], 131_072);
    assert!(daemon.manager.block_jobs().is_empty());
}
