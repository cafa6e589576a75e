//! Disks that are made larger while they are served.

use std::time::{Duration, Instant};

use frazil_tests::{Driver, Request};
use serde_json::json;

use crate::images::check_sound;
use crate::served::{Served, Wanted};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;

fn ask(served: &Served, request: Request) -> (i32, Vec<u8>) {
    let mut driver = Driver::connect(&served.sockets[0], 1, 1, BLOCK as usize).unwrap();
    driver.queues[0].fill(0, &[7; BLOCK as usize]);
    (driver.queues[0].ask(request), driver.queues[0].bytes(0))
}

fn capacity(served: &Served) -> u64 {
    served.ask("query-block", json!({}))[0]["inserted"]["image"]["virtual-size"].as_u64().unwrap()
}

#[test]
fn a_disk_grows_and_stays_grown() {
    for cache in ["writeback", "none"] {
        let wanted = Wanted { format: "raw", cache, disks: 1, queues: 1, bytes: MIB };
        let mut served = Served::start(wanted);
        let grown = served.command(&["disk", "resize", "vd0", "3M", "--control", "control"]);
        assert!(grown.status.success(), "{grown:?}");
        assert_eq!(String::from_utf8_lossy(&grown.stdout), "resized disk vd0 to 3 MiB\n");
        let unknown = served.command(&["disk", "resize", "vdx", "3M", "--control", "control"]);
        let told = String::from_utf8_lossy(&unknown.stderr);
        assert!(told.contains("`frazil status` show what there is"), "{told}");
        assert_eq!(capacity(&served), 3 * MIB);
        assert_eq!(ask(&served, Request::Read(2 * MIB)), (0, vec![0; BLOCK as usize]));
        assert_eq!(ask(&served, Request::Write(3 * MIB - BLOCK)).0, 0);
        // All of it is there after the death of the process.
        served.kill();
        served.restart();
        assert_eq!(ask(&served, Request::Read(3 * MIB - BLOCK)), (0, vec![7; BLOCK as usize]));
        served.ask("block_resize", json!({ "device": "vd0", "size": 3 * MIB }));
        for (size, reason) in [
            (2 * MIB, "disk vd0 can not shrink: what is cut off would be lost"),
            (3 * MIB + 1, "disk vd0 has a size that is a multiple of 512 bytes"),
        ] {
            assert_eq!(served.refusal("block_resize", json!({ "device": "vd0", "size": size })), reason);
        }
        served.ask("snapshot-create", json!({ "name": "grown" }));
        let bytes = served.export("grown", "vd0");
        assert_eq!((bytes.len() as u64, bytes.last()), (3 * MIB, Some(&7)));
        served.stop();
    }
}

#[test]
fn an_overlay_grows_over_a_smaller_base_and_going_back_brings_the_old_size() {
    let wanted = Wanted { format: "raw", cache: "writeback", disks: 1, queues: 1, bytes: MIB };
    let mut served = Served::start(wanted);
    assert_eq!(ask(&served, Request::Write(MIB - BLOCK)).0, 0);
    served.ask("snapshot-create", json!({ "name": "small" }));
    served.ask("block_resize", json!({ "device": "vd0", "size": 3 * MIB }));
    assert_eq!(ask(&served, Request::Read(MIB - BLOCK)), (0, vec![7; BLOCK as usize]));
    assert_eq!(ask(&served, Request::Read(MIB)), (0, vec![0; BLOCK as usize]));
    assert_eq!(ask(&served, Request::Write(3 * MIB - BLOCK)).0, 0);
    served.kill();
    served.restart();
    assert_eq!(capacity(&served), 3 * MIB);
    assert_eq!(ask(&served, Request::Read(3 * MIB - BLOCK)), (0, vec![7; BLOCK as usize]));
    served.ask("snapshot-create", json!({ "name": "large" }));
    assert_eq!(served.export("small", "vd0").len() as u64, MIB);
    assert_eq!(served.export("large", "vd0").len() as u64, 3 * MIB);
    wait_for_nobody(&served);
    served.ask("snapshot-revert", json!({ "name": "small", "discard-newer": true }));
    assert_eq!(capacity(&served), MIB);
    assert_eq!(ask(&served, Request::Read(MIB)).0, -5);
    served.stop();
    let layers = served.layers("vd0");
    layers.iter().filter(|(_, format)| format == "qcow2").for_each(|(path, _)| check_sound(path));
}

/// That a guest is gone is noticed a little later.
fn wait_for_nobody(served: &Served) {
    let is_connected = || served.ask("query-frazil", json!({}))["disks"][0]["connected"] == true;
    let deadline = Instant::now() + Duration::from_secs(20);
    while is_connected() {
        assert!(Instant::now() < deadline, "a guest that is gone is still told to be connected");
    }
}

#[test]
fn a_disk_does_not_grow_under_a_cut() {
    let wanted = Wanted { format: "raw", cache: "writeback", disks: 1, queues: 1, bytes: MIB };
    let served = Served::start(wanted);
    served.ask("snapshot-prepare", json!({ "name": "held", "lease": 20_000 }));
    let refused = served.refusal("block_resize", json!({ "device": "vd0", "size": 2 * MIB }));
    assert!(refused.contains("snapshot 'held' is prepared"), "{refused}");
    served.ask("snapshot-abort", json!({ "name": "held" }));
    served.ask("block_resize", json!({ "node-name": "vd0.0", "size": 2 * MIB }));
    assert_eq!(capacity(&served), 2 * MIB);
}
