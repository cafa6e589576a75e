//! Syncs that fail, and daemons that are started again in the same boot: the host shows what it could not write as if all was
//! well, until it needs the memory, and its next sync succeeds. See fsync(2), "ERRORS", and QEMU's `file-posix.c`, which refuses
//! all flushes after such a failure.

use std::fs::File;

use frazil_tests::{Driver, Request};
use serde_json::{Value, json};

use crate::broken::Broken;
use crate::faults::{BYTES, CHUNK, wanted, write};
use crate::full::in_memory;
use crate::served::Served;

/// Chunks of the first half, which are written and flushed before there are errors.
const FLUSHED: u64 = BYTES / CHUNK as u64 / 2;

/// A chunk of the second half.
const LOST: u64 = FLUSHED + 5;

/// A disk on a broken device, the first half of which the guest has written and flushed.
struct World {
    served: Served,
    broken: Broken,
    /// As long as somebody has it open, the page cache of a device stays.
    _keeper: File,
}

impl World {
    /// And a guest that has written to the other half, which no sync will bring to the device.
    fn new() -> (Self, Driver) {
        let folder = in_memory();
        let broken = Broken::new(folder.path().join("room"));
        let keeper = File::open(&broken.device).unwrap();
        let base = broken.device.clone();
        let served = Served::over(folder, &[base], wanted(1, "raw"), ",werror=report");
        write(&served, 0, 0..FLUSHED, 1);
        let world = Self { served, broken, _keeper: keeper };
        let driver = world.put(2);
        (world, driver)
    }

    /// A guest that has written to the other half.
    fn put(&self, byte: u8) -> Driver {
        let mut driver = Driver::connect(&self.served.sockets[0], 1, 1, CHUNK).unwrap();
        driver.queues[0].fill(0, &vec![byte; CHUNK]);
        assert_eq!(driver.queues[0].ask(Request::Write(LOST * CHUNK as u64)), 0);
        driver
    }

    /// Mends the device, and starts another daemon.
    fn restart(&mut self) {
        self.broken.mend();
        self.served.kill();
        self.served.restart();
    }

    fn snapshots(&self) -> Value {
        self.served.ask("query-snapshots", json!({}))
    }
}

fn chunk(bytes: &[u8], number: u64) -> &[u8] {
    &bytes[number as usize * CHUNK..][..CHUNK]
}

/// The daemon was started again, the guest's disk looked as if nothing had happened, flushes succeeded, and what had never come
/// to the device was gone when the host needed its memory.
#[test]
#[ignore = "needs root, to mount a tmpfs and for a loop device"]
fn what_a_flush_could_not_sync_is_not_shown_by_the_next_daemon() {
    let (mut world, mut driver) = World::new();
    for _ in 0..2 {
        assert_ne!(driver.queues[0].ask(Request::Flush), 0, "a failed sync is final");
    }
    assert_ne!(driver.queues[0].ask(Request::Write(0)), 0);
    drop(driver);
    let status = world.served.ask("query-frazil", json!({}));
    assert!(status.to_string().contains("\"sync-failed\":true"), "{status}");
    world.restart();

    let (shown, on_disk) = (world.served.read(0), world.broken.bytes());
    assert!(chunk(&shown, LOST) == [0; CHUNK], "what was lost is shown");
    assert!(shown == on_disk);
    assert!(shown[..BYTES as usize / 2].iter().any(|byte| *byte != 0), "what was flushed is there");
    let status = world.served.ask("query-frazil", json!({}));
    assert!(!status.to_string().contains("sync-failed"), "{status}");
    let mut driver = world.put(3);
    assert_eq!(driver.queues[0].ask(Request::Flush), 0);
    assert!(chunk(&world.broken.bytes(), LOST) == [3; CHUNK]);
    // The note of the failure went with it: what is acknowledged now outlives the daemon.
    drop(driver);
    drop(world.put(4));
    world.restart();
    assert!(chunk(&world.served.read(0), LOST) == [4; CHUNK]);
}

/// The next daemon took the sync for done: the snapshot was told as sealed, and held what was not on the disk.
#[test]
#[ignore = "needs root, to mount a tmpfs and for a loop device"]
fn a_snapshot_that_could_not_be_sealed_is_dropped_by_the_next_daemon() {
    let (mut world, mut driver) = World::new();
    let taken = world.served.qmp().execute("snapshot-create", json!({ "name": "bad" }), |_, _| {});
    assert_eq!(world.snapshots()[0]["sealed"], false, "{taken:?}");
    // A flush is a promise about both layers.
    driver.queues[0].fill(0, &vec![5; CHUNK]);
    assert_eq!(driver.queues[0].ask(Request::Write(0)), 0);
    assert_ne!(driver.queues[0].ask(Request::Flush), 0);
    drop(driver);
    world.restart();

    assert_eq!(world.snapshots(), json!([]));
    let (shown, on_disk) = (world.served.read(0), world.broken.bytes());
    assert!(shown[CHUNK..] == on_disk[CHUNK..], "what was lost is shown");
    assert!(chunk(&shown, 0) == [5; CHUNK], "the overlay has lost nothing");
    let mut driver = world.put(3);
    assert_eq!(driver.queues[0].ask(Request::Flush), 0);
    drop(driver);
    world.served.ask("snapshot-create", json!({ "name": "good" }));
    assert_eq!(world.snapshots()[0]["sealed"], true);
    assert!(chunk(&world.served.export("good", "vd0"), LOST) == [3; CHUNK]);
    world.served.stop();
}
