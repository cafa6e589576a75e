//! How backups end, and what becomes of their bitmaps.

use serde_json::json;
use snapshot::{Halt, HostedJob, Job, JobType, JobVerb, Labor};

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

/// What a defect would do.
struct Defective;

impl Labor for Defective {
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
