use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

use super::*;
use crate::coverage::{FileSystem, coverage};
use crate::fake::{Fake, script, within};
use crate::session::Agent;

/// More than scheduling on a busy machine can cost; much less than a hang.
const SLACK: Duration = Duration::from_millis(1500);

fn connect(fake: &Fake) -> Session {
    Agent::new(fake.path()).connect(within(5000)).unwrap()
}

fn plain() -> Coverage {
    let root =
        FileSystem { name: "vda".into(), mountpoint: "/".into(), kind: "ext4".into(), disk: Vec::new() };
    coverage(&AgentInfo::default(), &[root], None)
}

fn ok(value: impl serde::Serialize) -> serde_json::Value {
    json!({ "return": value })
}

const EXEC: [&str; 2] = ["guest-exec", "guest-exec-status"];

#[test]
fn a_pre_sync_repeats_until_little_is_left() {
    let fake = Fake::new(vec![script(|peer| {
        let mut runs = 0;
        let mut asked = 0;
        peer.serve(|command, arguments| match command {
            "guest-exec" => {
                assert_eq!(*arguments, json!({ "path": "sync", "arg": ["-f", "/"] }));
                runs += 1;
                asked = 0;
                ok(json!({ "pid": runs }))
            }
            _ => {
                assert_eq!(*arguments, json!({ "pid": runs }));
                asked += 1;
                let exited = runs > 1 || asked > 6; // the first pass is slow
                ok(json!({ "exited": exited, "exitcode": 0 }))
            }
        });
    })]);
    let mut session = connect(&fake);
    let report = session.pre_sync(&AgentInfo::new("", EXEC), &plain(), within(5000));
    assert_eq!((report.means, &report.shortfall), (Some(SyncMeans::FileSystems), &None));
    assert!(report.passes >= 2, "one slow pass is not the end: {report:?}");
    drop(session);
    fake.join();
}

#[test]
fn a_sync_that_takes_no_operands_is_asked_to_sync_all() {
    let all = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&all);
    let fake = Fake::new(vec![script(move |peer| {
        peer.serve(|command, arguments| {
            if command == "guest-exec" {
                let bare = arguments["arg"] == json!([]);
                seen.store(u64::from(bare), Ordering::Relaxed);
                return ok(json!({ "pid": 9 }));
            }
            ok(json!({ "exited": true, "exitcode": 1 - seen.load(Ordering::Relaxed) }))
        });
    })]);
    let mut session = connect(&fake);
    let report = session.pre_sync(&AgentInfo::new("", EXEC), &plain(), within(5000));
    assert_eq!((report.means, report.shortfall), (Some(SyncMeans::All), None));
    drop(session);
    fake.join();
    assert_eq!(all.load(Ordering::Relaxed), 1);
}

#[test]
fn a_pre_sync_that_cannot_be_had_says_why_and_is_no_error() {
    let fake = Fake::new(vec![script(|peer| {
        peer.serve(|command, _| match command {
            "guest-exec" => ok(json!({ "pid": 9 })),
            "guest-exec-status" => ok(json!({ "exited": false })),
            _ => json!({ "return": {} }),
        });
    })]);
    let mut session = connect(&fake);
    let blocked = session.pre_sync(&AgentInfo::default(), &plain(), within(5000));
    assert!(blocked.shortfall.unwrap().contains("guest-exec"));
    let start = Instant::now();
    let endless = session.pre_sync(&AgentInfo::new("", EXEC), &plain(), within(200));
    assert!(start.elapsed() < Duration::from_millis(200) + SLACK);
    assert_eq!((endless.means, endless.passes), (None, 0));
    assert!(endless.shortfall.is_some());
    session.ping(within(5000)).unwrap();
    drop(session);
    fake.join();
}
