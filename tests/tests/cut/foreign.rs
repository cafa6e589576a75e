//! Images of QEMU's making, of every kind, read and written through the daemon, and what the daemon made of them read
//! and written by QEMU: block by block the same.

use std::path::{Path, PathBuf};
use std::process::Command;

use block::testing::Random;
use frazil_tests::{Driver, DriverQueue, Request};

use crate::images::{check_clean, qemu_img};
use crate::ledger::Clock;
use crate::recipe::Recipe;
use crate::served::{Served, Wanted};

const SECTOR: usize = 512;
/// The longest request.
const LONGEST: usize = 96 << 10;

/// What a guest knows of its disk.
struct Guest {
    random: Random,
    expected: Vec<u8>,
    queue: DriverQueue,
    _driver: Driver,
}

impl Guest {
    fn connect(served: &Served, expected: Vec<u8>, seed: u64) -> Self {
        let mut driver = Driver::connect(&served.sockets[0], 1, 1, LONGEST).unwrap();
        assert_eq!(driver.capacity().unwrap(), expected.len() as u64);
        let queue = driver.queues.remove(0);
        Self { random: Random(seed), expected, queue, _driver: driver }
    }

    /// Reads all of the disk. Sectors that were discarded may be as before, or zero; from now on it is known which.
    fn verify(&mut self, discarded: &[bool], story: &str) {
        for start in (0..self.expected.len()).step_by(LONGEST) {
            // The last one begins earlier, for a request is a whole buffer.
            let start = start.min(self.expected.len().saturating_sub(LONGEST));
            assert_eq!(self.queue.ask(Request::Read(start as u64)), 0, "{story}: read at {start:#x}");
            let found = self.queue.bytes(0);
            for (at, found) in (start..).step_by(SECTOR).zip(found.chunks(SECTOR)) {
                let known = &mut self.expected[at..at + SECTOR];
                if discarded[at / SECTOR] && found.iter().all(|byte| *byte == 0) {
                    known.fill(0);
                }
                assert!(known == found, "{story}: the sector at {at:#x} is another");
            }
        }
    }

    /// Writes, zeroes and discards at random, some of all sizes.
    fn change(&mut self, steps: usize, story: &str) {
        let sectors = self.expected.len() / SECTOR;
        let mut discarded = vec![false; sectors];
        for step in 0..steps {
            let first = self.random.below((sectors - LONGEST / SECTOR) as u64) as usize;
            let count = 1 + self.random.below((LONGEST / SECTOR) as u64) as usize;
            let (at, len) = (first * SECTOR, count * SECTOR);
            let byte = self.random.number() as u8;
            let request = match self.random.below(8) {
                0 => Request::Discard(at as u64, len as u64),
                kind @ (1 | 2) => Request::WriteZeroes(at as u64, len as u64, kind == 1),
                3 => Request::Flush,
                _ => Request::Write(at as u64),
            };
            let (len, value) = match request {
                Request::Write(_) => (LONGEST, byte),
                Request::WriteZeroes(..) => (len, 0),
                _ => (0, 0),
            };
            if matches!(request, Request::Write(_)) {
                self.queue.fill(0, &vec![byte; LONGEST]);
            }
            assert_eq!(self.queue.ask(request), 0, "{story}: step {step}, {request:?}");
            self.expected[at..at + len].fill(value);
            discarded[first..first + len / SECTOR].fill(false);
            if let Request::Discard(..) = request {
                discarded[first..first + count].fill(true);
            }
        }
        self.verify(&discarded, story);
    }
}

/// The whole drill on one image.
fn drill(seed: u64) {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let recipe = Recipe::random(seed);
    let story = format!("seed {seed}, {recipe:?}");
    let base = recipe.make(folder.path());
    let frozen: Vec<_> =
        recipe.snapshots().map(|name| (name.clone(), snapshot_bytes(&base, &name))).collect();
    let before = bytes_of(&base);
    let bytes = before.len() as u64;
    let wanted = Wanted { format: "qcow2", cache: "writeback", disks: 1, queues: 1, bytes };
    let mut served = Served::over(folder, std::slice::from_ref(&base), wanted, "");
    let mut guest = Guest::connect(&served, before, seed);
    guest.verify(&vec![false; bytes as usize / SECTOR], &story);
    guest.change(60, &story);
    if seed.is_multiple_of(2) {
        served.snapshot("cut", &Clock::new());
        let then = guest.expected.clone();
        guest.change(40, &format!("{story}, on an overlay"));
        assert!(served.export("cut", "vd0") == then, "{story}: the snapshot");
    }
    let (mut expected, random) = (std::mem::take(&mut guest.expected), Random(seed + 1));
    drop(guest);
    served.stop();
    inspect(&served, &base, &expected, &frozen, &story);

    // The other way round: QEMU goes on where the daemon stopped, and the daemon after it.
    let (top, _) = served.layers("vd0").pop().unwrap();
    qemu_goes_on(&top, &mut expected, random);
    served.restart();
    let mut guest = Guest::connect(&served, expected, seed + 2);
    guest.verify(&vec![false; bytes as usize / SECTOR], &format!("{story}, after QEMU"));
    guest.change(20, &format!("{story}, after QEMU"));
    let expected = std::mem::take(&mut guest.expected);
    drop(guest);
    served.stop();
    inspect(&served, &base, &expected, &frozen, &story);
}

/// What QEMU finds after a clean stop: no error, no leak, the same bytes, and all internal snapshots as they were.
fn inspect(served: &Served, base: &Path, expected: &[u8], frozen: &[(String, Vec<u8>)], story: &str) {
    for (path, format) in served.layers("vd0") {
        if format == "qcow2" {
            check_clean(&path);
        }
    }
    let (top, _) = served.layers("vd0").pop().unwrap();
    assert!(bytes_of(&top) == expected, "{story}: QEMU reads something else");
    for (name, bytes) in frozen {
        assert!(snapshot_bytes(base, name) == *bytes, "{story}: the internal snapshot {name} has changed");
    }
}

fn qemu_goes_on(top: &Path, expected: &mut [u8], mut random: Random) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2"]);
    for _ in 0..8 {
        let first = random.below((expected.len() / SECTOR) as u64) as usize;
        let count = 1 + random.below((expected.len() / SECTOR - first) as u64).min(300) as usize;
        let (at, len) = (first * SECTOR, count * SECTOR);
        let byte = random.number() as u8;
        command.args(["-c", &format!("write -P {byte} {at} {len}")]);
        expected[at..at + len].fill(byte);
    }
    let done = command.arg(top).output().unwrap();
    assert!(done.status.success(), "{done:?}");
}

fn bytes_of(image: &Path) -> Vec<u8> {
    converted(image, &[])
}

fn snapshot_bytes(image: &Path, name: &str) -> Vec<u8> {
    converted(image, &["-l", &format!("snapshot.name={name}")])
}

fn converted(image: &Path, more: &[&str]) -> Vec<u8> {
    let target: PathBuf = image.with_extension("converted");
    let mut arguments = vec!["convert", "-f", "qcow2", "-O", "raw"];
    arguments.extend(more);
    arguments.extend([image.to_str().unwrap(), target.to_str().unwrap()]);
    let done = qemu_img(&arguments);
    assert!(done.status.success(), "{done:?}");
    let bytes = std::fs::read(&target).unwrap();
    std::fs::remove_file(target).unwrap();
    bytes
}

#[test]
fn images_of_all_kinds_are_the_same_to_qemu_and_to_us() {
    (0..24).for_each(drill);
}

#[test]
fn more_images_of_all_kinds_are_the_same_to_qemu_and_to_us() {
    (24..48).for_each(drill);
}
