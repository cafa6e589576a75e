//! Two daemons, each with a state directory of its own, that are given the same images: whatever could do harm is refused, by
//! the locks that QEMU takes too. They end with the process.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::faults::{BYTES, CHUNK, Listener, text, wanted, write};
use crate::full::in_memory;
use crate::images::qemu_img;
use crate::ledger::Clock;
use crate::served::{Served, program};

/// Has another daemon serve this image, which must be refused because `used`, that or what is beneath it, is in use.
fn refused(served: &Served, image: &Path, format: &str, keys: &str, used: &Path) {
    let [state, control, socket] = ["other", "other.control", "other.sock"].map(|name| served.path(name));
    let words = ["serve", "--state", text(&state), "--control", text(&control), "--disk"];
    let disk = format!("id=other,path={},format={format},socket={}{keys}", text(image), text(&socket));
    // One that serves it is ended, with another code.
    let output = Command::new("timeout").arg("10").arg(program()).args(words).arg(&disk).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{disk}: {said}");
    assert!(said.contains("in use by another process") && said.contains(text(used)), "{disk}: {said}");
}

/// An overlay of QEMU's making.
fn overlay(served: &Served, name: &str, base: &Path, format: &str) -> PathBuf {
    let path = served.path(name);
    let size = BYTES.to_string();
    let words = ["create", "-q", "-u", "-f", "qcow2", "-b", text(base), "-F", format, text(&path), &size];
    assert!(qemu_img(&words).status.success());
    path
}

/// Another daemon's image beneath one's own would change while it is read, and a second writer spoils it.
#[test]
fn what_one_daemon_writes_another_gets_neither_as_a_disk_nor_beneath_one() {
    for format in ["raw", "qcow2"] {
        let served = Served::start_in(in_memory(), wanted(1, format), "");
        let (base, _) = served.layers("vd0").remove(0);
        let above = overlay(&served, "above", &base, format);
        refused(&served, &base, format, "", &base);
        refused(&served, &base, format, ",readonly=on", &base);
        refused(&served, &above, "qcow2", "", &base);

        served.snapshot("one", &Clock::new());
        let (top, _) = served.layers("vd0").remove(1);
        let above = overlay(&served, "above-top", &top, "qcow2");
        refused(&served, &base, format, "", &base);
        refused(&served, &top, "qcow2", "", &top);
        refused(&served, &top, "qcow2", ",readonly=on", &top);
        refused(&served, &above, "qcow2", "", &top);
    }
}

/// Two that only read an image do each other no harm, and neither merges into it as long as the other one reads.
#[test]
fn what_two_daemons_read_neither_writes_to() {
    let mut served = Served::start_in(in_memory(), wanted(1, "raw"), "");
    write(&served, 0, 0..8, 1);
    served.snapshot("one", &Clock::new());
    write(&served, 0, 0..4, 2);
    let before = served.read(0);
    let (base, _) = served.layers("vd0").remove(0);
    let folder = in_memory();
    let above = overlay(&served, "above", &base, "raw");
    let mut other = Served::over(folder, &[above], wanted(1, "qcow2"), "");
    let frozen = other.read(0);
    write(&other, 0, 6..8, 3);

    let mut listener = Listener::new(&served);
    let delete = json!({ "name": "one", "auto-dismiss": false, "job-id": "delete" });
    listener.ask("snapshot-delete", delete.clone());
    let error = listener.finish("delete").unwrap();
    assert!(error.contains("in use by another process"), "{error}");
    assert!(served.read(0) == before);
    assert!(other.read(0)[..6 * CHUNK] == frozen[..6 * CHUNK]);
    other.stop();
    listener.ask("snapshot-delete", delete);
    assert_eq!(listener.finish("delete"), None);
    assert!(served.read(0) == before);
    served.stop();
}

/// The kernel has the locks of a process that was killed as long as its requests are under way: the next daemon waits for
/// them, and then it is the only one.
#[test]
fn after_a_kill_the_next_daemon_has_the_image_and_keeps_others_from_it() {
    for format in ["raw", "qcow2"] {
        let mut served = Served::start_in(in_memory(), wanted(1, format), "");
        let (base, _) = served.layers("vd0").remove(0);
        for round in 0..5 {
            write(&served, 0, 0..8, round);
            served.kill();
            served.restart();
            refused(&served, &base, format, "", &base);
        }
    }
}
