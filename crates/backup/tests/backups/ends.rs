//! How backups end, and what becomes of their bitmaps.

use std::os::unix::fs::FileExt;

use serde_json::json;
use snapshot::{Halt, HostedJob, ImageFormat, Job, JobType, JobVerb, Labor};

use crate::bench::*;

#[test]
fn a_backup_that_is_called_off_or_dies_leaves_its_bitmap_as_it_was() {
    let bench = Bench::new();
    let daemon = bench.open();
    bench.target(&daemon, "t");
    let add_persistent =
        json!([{"type": "block-dirty-bitmap-add", "data": {"node": "vda", "name": "b", "persistent": true}}]);
    transaction(&daemon, add_persistent).unwrap();
    for at in 0..64 {
        write(&daemon, "vda", at << 16, 1);
    }
    let mut slow = incremental("vda", "t", "b");
    slow["data"]["speed"] = json!(65536);
    transaction(&daemon, json!([slow])).unwrap();
    let busy = transaction(&daemon, json!([bitmap("clear", "vda", "b")])).unwrap_err();
    assert_eq!(busy.to_string(), "Bitmap 'b' is currently in use by another operation and cannot be used");
    daemon.manager.ask_job("t", JobVerb::Cancel).unwrap();
    assert_eq!(finish(&daemon, "t").as_deref(), Some("Operation canceled"));
    assert_eq!(dirty(&daemon, "vda", "b"), 4 << 20);
    transaction(&daemon, json!([slow])).unwrap();
    daemon.manager.shut_down().unwrap();
    drop(daemon);
    let daemon = bench.open();
    assert_eq!(dirty(&daemon, "vda", "b"), 4 << 20);
    bench.target(&daemon, "u");
    transaction(&daemon, json!([incremental("vda", "u", "b")])).unwrap();
    assert_eq!(finish(&daemon, "u"), None);
    assert_eq!(dirty(&daemon, "vda", "b"), 0);
}

/// A program cleaned the bitmap in the transaction that began its increment, and the daemon died before the increment was
/// whole: it would have been lost for all later ones.
#[test]
fn a_bitmap_that_is_cleaned_beside_a_backup_is_clean_when_that_has_succeeded() {
    let bench = Bench::new();
    let daemon = bench.open();
    bench.target(&daemon, "t");
    let persistent =
        json!([{"type": "block-dirty-bitmap-add", "data": {"node": "vda", "name": "b", "persistent": true}}]);
    transaction(&daemon, persistent).unwrap();
    (0..16).for_each(|at| write(&daemon, "vda", at << 16, 1));
    let mut slow = full("vda", "t");
    slow["data"]["speed"] = json!(65536);
    slow["data"]["auto-finalize"] = json!(false);
    transaction(&daemon, json!([slow, bitmap("clear", "vda", "b")])).unwrap();
    write(&daemon, "vda", 100 << 16, 2);
    assert_eq!(dirty(&daemon, "vda", "b"), 17 << 16);
    daemon.manager.shut_down().unwrap();
    drop(daemon);
    let daemon = bench.open();
    assert_eq!(dirty(&daemon, "vda", "b"), 17 << 16);
    bench.target(&daemon, "u");
    transaction(&daemon, json!([bitmap("clear", "vda", "b"), full("vda", "u")])).unwrap();
    write(&daemon, "vda", 3 << 16, 3);
    assert_eq!(finish(&daemon, "u"), None);
    assert_eq!(dirty(&daemon, "vda", "b"), 1 << 16);
}

/// QEMU's `always`: what was copied is clean though the job has failed, and the next one copies the rest.
#[test]
fn a_bitmap_that_is_always_synchronized_holds_what_was_not_copied_and_what_is_new() {
    let bench = Bench::new();
    let daemon = bench.open();
    for (sync, recording) in [("bitmap", true), ("full", true), ("bitmap", false)] {
        let target = bench.target(&daemon, "t");
        transaction(&daemon, json!([bitmap("add", "vda", "b")])).unwrap();
        (0..64).for_each(|at| write(&daemon, "vda", at << 16, 1));
        if !recording {
            transaction(&daemon, json!([bitmap("disable", "vda", "b")])).unwrap();
        }
        let mut slow = incremental("vda", "t", "b");
        let mode = json!({"sync": sync, "bitmap-mode": "always", "speed": 1 << 20});
        slow["data"].as_object_mut().unwrap().extend(mode.as_object().unwrap().clone());
        transaction(&daemon, json!([slow])).unwrap();
        write(&daemon, "vda", 100 << 16, 2);
        write(&daemon, "vda", 0, 2);
        while daemon.manager.jobs()[0].current_progress < 1 << 20 {
            std::thread::yield_now();
        }
        daemon.manager.ask_job("t", JobVerb::Cancel).unwrap();
        let copied = daemon.manager.jobs()[0].current_progress;
        assert_eq!(finish(&daemon, "t").as_deref(), Some("Operation canceled"));
        let new = if recording { 2 << 16 } else { 0 };
        let (all, left) = (if sync == "full" { SIZE } else { 64 << 16 }, dirty(&daemon, "vda", "b"));
        // What is in flight when a job is called off is copied to its end.
        assert!(left <= all - copied + new, "{left} of {all} are dirty, {copied} copied");
        assert!(left >= 1 << 20, "{left}");

        let expected = content(&daemon, "vda");
        slow["data"]["speed"] = json!(0);
        slow["data"]["sync"] = json!("bitmap");
        transaction(&daemon, json!([slow])).unwrap();
        assert_eq!(finish(&daemon, "t"), None);
        assert_eq!(dirty(&daemon, "vda", "b"), 0);
        let found = std::fs::read(&target).unwrap();
        assert!(!recording || found == expected, "{sync}");
        assert!((1..64).all(|at| found[at << 16..][..512] == expected[at << 16..][..512]), "{sync}");
        transaction(&daemon, json!([bitmap("remove", "vda", "b")])).unwrap();
        daemon.backups.remove_node("t").unwrap();
    }
}

/// A part that can not be read is left out, as asked: the job ends well, and the bitmap must not say that all was copied.
#[test]
fn what_was_left_out_stays_dirty() {
    let mut bench = Bench::new();
    let (raw, base) = (bench.path("raw"), bench.path("base"));
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at * at / 977) as u8).collect();
    std::fs::write(&raw, bytes).unwrap();
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", text(&raw), text(&base)]);
    // A compressed cluster that is none.
    let file = std::fs::OpenOptions::new().write(true).open(&base).unwrap();
    file.write_all_at(&[0xff; 512], file.metadata().unwrap().len() / 2).unwrap();
    (bench.disks[0].path, bench.disks[0].format) = (base, ImageFormat::Qcow2);
    let daemon = bench.open();
    bench.target(&daemon, "t");
    transaction(&daemon, json!([bitmap("add", "vda", "b")])).unwrap();
    write(&daemon, "vda", 0, 1);
    let mut left = Vec::new();
    for mode in ["on-success", "always"] {
        let mut backup = incremental("vda", "t", "b");
        let more = json!({"sync": "full", "bitmap-mode": mode, "on-source-error": "ignore"});
        backup["data"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        transaction(&daemon, json!([backup])).unwrap();
        assert_eq!(finish(&daemon, "t"), None);
        left.push(dirty(&daemon, "vda", "b"));
    }
    // As it was; and then what was left out, in pieces of so much, and nothing else.
    assert!(left[0] == 1 << 16 && left[1] > 0 && left[1] <= 2 << 18 && left[1] % (1 << 18) == 0, "{left:?}");
}

/// What a defect would do.
struct Defective;

impl Labor for Defective {
    fn makes(&self) -> String {
        "nothing".to_owned()
    }

    fn run(self: Box<Self>, _job: &Job) -> Result<(), Halt> {
        panic!("as asked")
    }
}

#[test]
fn a_job_that_panics_fails_and_does_not_stay() {
    let bench = Bench::new();
    let daemon = bench.open();
    for _ in 0..2 {
        let asked = HostedJob {
            id: "j".to_owned(),
            kind: JobType::Backup,
            speed: 0,
            auto_finalize: true,
            auto_dismiss: false,
            client: None,
            group: None,
        };
        daemon.manager.enter_job(asked).unwrap().start(Box::new(Defective)).unwrap();
        assert!(finish(&daemon, "j").unwrap().contains("internal error"));
    }
    assert!(daemon.manager.jobs().is_empty());
}
