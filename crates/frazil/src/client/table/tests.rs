use serde_json::{Value, json};

use super::*;

fn record() -> Value {
    json!({
        "name": "monday",
        "time": "2026-11-22T08:07:31.123456789Z",
        "grade": "filesystem",
        "reason": "2 of 2 file systems were frozen",
        "frozen-count": 2,
        "thawed-count": 2,
        "timing": {
            "prepare": 12.34, "pre-sync": 1234.5, "freeze": 20.0, "gate": 0.0123, "drain": 0.5, "pivot": 0.004,
            "open": 0.02, "thaw": 3.0, "seal": 150.0, "gate-closed": 0.54, "frozen": 25.25, "longest-wait": 1.0,
        },
        "sealed": true,
        "disks": [
            { "id": "vda", "path": "/img/root.img", "format": "raw" },
            { "id": "vdb", "path": "/img/data.vdb-000001.qcow2", "format": "qcow2" },
        ],
    })
}

fn decoded<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_list_has_a_line_a_snapshot() {
    let mut crash = record();
    crash["name"] = json!("tuesday-noon");
    crash["grade"] = json!("crash");
    crash["timing"].as_object_mut().unwrap().remove("frozen");
    let text = list(&decoded::<Vec<_>>(json!([record(), crash])));
    let expected = "\
NAME          TIME                  GRADE        FROZEN    GATE     WAIT  DISKS
monday        2026-11-22T08:07:31Z  filesystem  25.2 ms  540 µs  1.00 ms  vda,vdb
tuesday-noon  2026-11-22T08:07:31Z  crash             -  540 µs  1.00 ms  vda,vdb
";
    assert_eq!(text, expected);
    assert_eq!(list(&[]), "no snapshots\n");
}

#[test]
fn a_snapshot_is_shown_with_images_steps_and_probe() {
    let mut shown = record();
    shown["probe"] = json!([{ "id": "vda", "volumes": [{
        "partition": 1, "offset": 1 << 20, "size": 1 << 30, "kind": "ext4", "verdict": "replay",
        "detail": "needs_recovery", "unknowable": "",
    }] }]);
    let expected = "\
name       monday
time       2026-11-22T08:07:31Z
grade      filesystem
reason     2 of 2 file systems were frozen
agent      2 frozen, 2 thawed
durable    yes

DISK  FORMAT  IMAGE
vda   raw     /img/root.img
vdb   qcow2   /img/data.vdb-000001.qcow2

STEP                     TOOK
prepare               12.3 ms
pre-sync               1.23 s
freeze                20.0 ms
gate                    12 µs
drain                  500 µs
pivot                    4 µs
open                    20 µs
thaw                  3.00 ms
seal                   150 ms
gate closed in all     540 µs
guest frozen in all   25.2 ms
longest request wait  1.00 ms

DISK  PART   SIZE  CONTENT  PROBE   WHY
vda      1  1 GiB  ext4     replay  needs_recovery
";
    assert_eq!(snapshot(&decoded(shown)), expected);
}

#[test]
fn a_snapshot_without_agent_says_so() {
    let mut bare = record();
    for member in ["frozen-count", "thawed-count"] {
        bare.as_object_mut().unwrap().remove(member);
    }
    bare["sealed"] = json!(false);
    let text = snapshot(&decoded(bare));
    assert!(text.contains("agent      not asked to freeze\n"), "{text}");
    assert!(text.contains("durable    not yet"), "{text}");
    assert!(!text.contains("PROBE"), "{text}");
}

#[test]
fn the_status_leads_with_a_thaw_that_is_owed_and_lists_the_disks() {
    let status = status(&decoded(json!({
        "uptime": 93_784, "state": "/st", "free": 1_610_612_736_u64, "freeze-owner": "frazil", "agent": "/a.sock",
        "thaw-owed": true, "prepared": "monday", "snapshots": 3,
        "sandbox": { "landlock": "partial", "seccomp": "full", "missing": ["outgoing TCP"] },
        "disks": [{
            "id": "vda", "capacity": 8_u64 << 30, "read-only": false, "connected": true,
            "cache": "writeback", "werror": "enospc", "io-status": "nospace", "parked": 3, "in-flight": 4,
            "layers": [
                { "node-name": "vda.0", "virtual-size": 1024, "path": "/img/root.img", "format": "raw" },
                { "node-name": "vda.1", "virtual-size": 1024, "path": "/img/root.vda-000001.qcow2", "format": "qcow2" },
            ],
        }],
    })));
    let expected = "\
up for     1 d 2 h
state      /st
free       1.5 GiB
freeze by  frazil
agent      /a.sock
thaw       OWED: the guest may be frozen, Frazil keeps trying
snapshots  3
sandbox    Landlock partial, seccomp full
not closed outgoing TCP
prepared   monday, waits for its release
waiting    3 requests of disk vda wait for room on the host

DISK   SIZE  ACCESS      FRONT-END  LAYERS  ACTIVE
vda   8 GiB  read-write  connected       2  /img/root.vda-000001.qcow2
";
    assert_eq!(status, expected);
}

#[test]
fn durations_sizes_and_spans_fit_their_units() {
    let times = [0.0004, 0.999, 1.0, 9.994, 10.0, 999.0, 1000.0].map(duration);
    assert_eq!(times, ["0 µs", "999 µs", "1.00 ms", "9.99 ms", "10.0 ms", "999 ms", "1.00 s"]);
    assert_eq!([0, 512, 1 << 10, 1536, u64::MAX].map(bytes), ["0 B", "512 B", "1 KiB", "1.5 KiB", "16 EiB"]);
    assert_eq!([59, 61, 3_661, 90_061].map(span), ["59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]);
}

#[test]
fn checkpoints_and_changes_have_a_line_each() {
    let checkpoint = json!({
        "name": "monday", "time": "2026-11-22T08:07:31Z", "grade": "crash", "reason": "the guest was not asked",
        "disks": [{ "id": "vda", "boundary": 1, "capacity": 4096 }, { "id": "vdb", "boundary": 3, "capacity": 512 }],
    });
    let expected = "\
NAME    TIME                  GRADE  DISKS
monday  2026-11-22T08:07:31Z  crash  vda,vdb
";
    assert_eq!(checkpoints(&decoded::<Vec<_>>(json!([checkpoint]))), expected);
    assert_eq!(checkpoints(&[]), "no checkpoints\n");
    let ranges = json!([{ "offset": 0, "length": 4096 }, { "offset": 1_048_576, "length": 65_536 }]);
    let found = |ranges: Value| json!({ "capacity": 1 << 30, "granularity": 4096, "ranges": ranges });
    let expected = " OFFSET  LENGTH\n      0    4096\n1048576   65536\n68 KiB of 1 GiB changed\n";
    assert_eq!(changes(&decoded(found(ranges))), expected);
    assert_eq!(changes(&decoded(found(json!([])))), "0 B of 1 GiB changed\n");
}
