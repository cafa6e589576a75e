//! Targets that go wrong in the midst of a backup: its job may fail, and nobody else is disturbed.

use std::path::Path;

use serde_json::json;

use crate::broken::Broken;
use crate::faults::{BYTES, CHUNK, Listener, assert_same, dirty, target, wanted, write};
use crate::full::in_memory;
use crate::served::Served;

/// Bytes a second: slow enough to be met in the midst.
const SLOW: u64 = 4 << 20;

/// Spoils the target of a backup in its midst. Whatever becomes of the job, the guest, another job and the next backup do not
/// suffer.
fn spoil(format: &'static str, harm: fn(&Path)) {
    let mut served = Served::start_in(in_memory(), wanted(2, "raw"), "");
    write(&served, 0, 0..BYTES / CHUNK as u64, 1);
    write(&served, 1, 0..BYTES / CHUNK as u64, 2);
    let path = target(&served, "t", format);
    target(&served, "other", "raw");
    let mut listener = Listener::new(&served);
    for (disk, node) in [("vd0", "t"), ("vd1", "other")] {
        let backup =
            json!({ "device": disk, "target": node, "sync": "full", "speed": SLOW, "auto-dismiss": false });
        listener.ask("blockdev-backup", backup);
    }
    while listener.await_job("vd0", &["running"])["current-progress"].as_u64() < Some(BYTES / 4) {}
    harm(&path);
    write(&served, 0, 3..9, 3);
    // As for QEMU, a file that is gone is written to its end, and one that was cut off grows again; tables that are cut off
    // are an error.
    let error = listener.finish("vd0");
    assert!(error.is_none() || format == "qcow2", "{error:?}");
    assert_eq!(listener.finish("vd1"), None);
    served.ask("blockdev-del", json!({ "node-name": "t" }));
    let next = target(&served, "next", "qcow2");
    listener.ask(
        "blockdev-backup",
        json!({ "device": "vd0", "target": "next", "sync": "full", "auto-dismiss": false }),
    );
    assert_eq!(listener.finish("vd0"), None);
    served.ask("blockdev-del", json!({ "node-name": "next" }));
    assert_same(&served, &next, "qcow2");
    served.stop();
}

#[test]
fn a_target_that_is_removed_or_cut_off_in_the_midst_disturbs_nobody_else() {
    for format in ["raw", "qcow2"] {
        spoil(format, |path| std::fs::remove_file(path).unwrap());
        spoil(format, |path| std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap());
    }
}

/// The page cache takes what is written, and the error comes when it is brought to the device: nothing of that counts as
/// copied.
#[test]
#[ignore = "needs root, to mount a tmpfs and for a loop device"]
fn a_target_device_that_gives_errors_fails_its_job_and_no_other() {
    let folder = in_memory();
    let broken = Broken::new(folder.path().join("room"));
    let mut served = Served::start_in(folder, wanted(1, "raw"), "");
    served.restart_with(&["--sandbox", "off"]);
    served.ask("block-dirty-bitmap-add", json!({ "node": "vd0", "name": "b", "persistent": true }));
    write(&served, 0, 0..BYTES / CHUNK as u64, 1);
    let file = json!({ "driver": "host_device", "filename": broken.device });
    served.ask("blockdev-add", json!({ "driver": "raw", "node-name": "t", "file": file }));
    let path = target(&served, "other", "raw");
    let mut listener = Listener::new(&served);
    let backup = |id: &str, target: &str, mode: &str| {
        json!({ "job-id": id, "device": "vd0", "target": target, "sync": "bitmap", "bitmap": "b",
            "bitmap-mode": mode, "auto-dismiss": false })
    };
    for mode in ["on-success", "always"] {
        listener.ask("blockdev-backup", backup("bad", "t", mode));
        let full = json!({ "job-id": "good", "device": "vd0", "target": "other", "sync": "full", "auto-dismiss": false });
        listener.ask("blockdev-backup", full);
        assert!(listener.finish("bad").is_some());
        assert_eq!(listener.finish("good"), None);
        assert_eq!(dirty(&served, 0), BYTES, "{mode}");
    }
    write(&served, 0, 3..9, 2);
    listener.ask("blockdev-backup", backup("good", "other", "always"));
    assert_eq!(listener.finish("good"), None);
    assert_eq!(dirty(&served, 0), 0);
    for node in ["t", "other"] {
        served.ask("blockdev-del", json!({ "node-name": node }));
    }
    assert_same(&served, &path, "raw");
    served.stop();
    drop(broken);
}
