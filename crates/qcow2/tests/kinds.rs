//! Images of all the kinds that QEMU makes: read, written, discarded and killed, and found without a fault by QEMU.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use block::testing::Random;
use block::{ByteRange, Disk, RawDisk, Storage, blocking, read_disk, write_disk};
use qcow2::{Image, Journal, Mode, Parts};
use support::{assert_same, contents, memory, open_file, qemu};

/// Not a multiple of most cluster sizes.
const CAPACITY: u64 = (3 << 20) + 5 * 512;

/// A kind of image, and what QEMU did to it before we got it.
struct Kind {
    /// Options of `qemu-img create`.
    create: &'static str,
    /// Whether it has a backing file, half as long as it is.
    backing: bool,
    /// Whether QEMU compresses some of it.
    compressed: bool,
    /// Whether it has internal snapshots.
    snapshots: bool,
}

const PLAIN: Kind = Kind { create: "", backing: true, compressed: false, snapshots: false };

struct World {
    folder: tempfile::TempDir,
    kind: Kind,
    random: Random,
    journal: [Arc<dyn Storage>; 2],
    cache_bytes: u64,
    expected: Vec<u8>,
    /// What the internal snapshots hold.
    snapshots: Vec<(&'static str, Vec<u8>)>,
}

impl World {
    fn new(kind: Kind, seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..CAPACITY / 1024 * 512).map(|at| (at / 512 + 1) as u8).collect();
        fs::write(folder.path().join("base"), &bytes).unwrap();
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if !kind.create.is_empty() {
            arguments.extend(["-o", kind.create]);
        }
        if kind.backing {
            arguments.extend(["-b", "base", "-F", "raw"]);
        }
        let size = CAPACITY.to_string();
        qemu("qemu-img", folder.path(), &[&arguments[..], &["image", &size]].concat());
        let random = Random(seed);
        let cache_bytes = [0, 1 << 14, 1 << 20][seed as usize % 3];
        let journal: [Arc<dyn Storage>; 2] = [memory(), memory()];
        let mut world =
            Self { folder, kind, random, journal, cache_bytes, expected: Vec::new(), snapshots: Vec::new() };
        world.let_qemu_write();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn let_qemu_write(&mut self) {
        let mut commands = vec!["write -P 9 5000 270000", "write -z 1M 200k", "write -P 8 2M 4k"];
        if self.kind.compressed {
            commands.extend([
                "write -c -P 7 512k 256k",
                "write -c -P 3 2560k 128k",
                "write -c -P 4 1792k 64k",
            ]);
        }
        self.qemu_io(&commands);
        if self.kind.snapshots {
            for (name, command) in [("one", "write -P 21 300k 500k"), ("two", "discard 64k 640k")] {
                qemu("qemu-img", self.folder.path(), &["snapshot", "-c", name, "image"]);
                let contents = self.as_qemu_reads();
                self.snapshots.push((name, contents));
                self.qemu_io(&[command]);
            }
        }
        self.expected = self.as_qemu_reads();
    }

    fn qemu_io(&self, commands: &[&str]) {
        let mut arguments = vec!["-f", "qcow2"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        qemu("qemu-io", self.folder.path(), &[&arguments[..], &["image"]].concat());
    }

    fn as_qemu_reads(&self) -> Vec<u8> {
        qemu("qemu-img", self.folder.path(), &["convert", "-f", "qcow2", "-O", "raw", "image", "read"]);
        fs::read(self.path("read")).unwrap()
    }

    fn open(&self, writable: bool) -> Image {
        let [a, b] = self.journal.clone();
        let base: Arc<dyn Disk> = Arc::new(RawDisk::new(open_file(&self.path("base"), false), true).unwrap());
        let external = self.kind.create.contains("data_file");
        let parts = Parts {
            storage: open_file(&self.path("image"), writable),
            data_file: external.then(|| open_file(&self.path("data"), writable)),
            backing: self.kind.backing.then_some(base),
            cache_bytes: self.cache_bytes,
        };
        let mode = match writable {
            true => Mode::Writable(Journal::open(a, b, "boot").unwrap()),
            false => Mode::ReadOnly,
        };
        Image::open(parts, mode).unwrap()
    }

    fn scribble(&mut self, image: &Image, count: u64) {
        for _ in 0..count {
            let ByteRange { offset, len } = self.random.range(CAPACITY);
            let range = ByteRange { offset, len };
            let place = offset as usize..(offset + len) as usize;
            match self.random.below(8) {
                0 | 1 => {
                    blocking(|waker| image.discard(range, waker)).unwrap();
                    let mut found = vec![0; len as usize];
                    read_disk(image, offset, &mut found).unwrap();
                    let old = &mut self.expected[place];
                    assert!(found.iter().zip(&*old).all(|(found, old)| *found == 0 || found == old));
                    old.copy_from_slice(&found);
                }
                2 => {
                    let unmap = self.random.below(2) == 0;
                    blocking(|waker| image.write_zeroes(range, unmap, waker)).unwrap();
                    self.expected[place].fill(0);
                }
                3 => image.flush().run().unwrap(),
                _ => {
                    let value = self.random.number() as u8;
                    write_disk(image, offset, &vec![value; len as usize]).unwrap();
                    self.expected[place].fill(value);
                }
            }
        }
        assert_same(&contents(image), &self.expected, self.kind.create);
    }

    /// QEMU finds no error, and no leak but those of a kill, and the same bytes.
    fn check(&self, killed: bool) {
        let arguments = ["check", "-f", "qcow2", "image"];
        let output =
            Command::new("qemu-img").args(arguments).current_dir(self.folder.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let code = output.status.code();
        assert!(code == Some(0) || (killed && code == Some(3)), "{}: {text}", self.kind.create);
        if !killed {
            fs::write(self.path("expected"), &self.expected).unwrap();
            let compare = ["compare", "-f", "qcow2", "-F", "raw", "image", "expected"];
            qemu("qemu-img", self.folder.path(), &compare);
        }
        for (name, contents) in &self.snapshots {
            let convert = ["convert", "-l", name, "-f", "qcow2", "-O", "raw", "image", "read"];
            qemu("qemu-img", self.folder.path(), &convert);
            assert_same(&fs::read(self.path("read")).unwrap(), contents, name);
        }
    }

    fn run(&mut self) {
        assert_same(&contents(&self.open(false)), &self.expected, self.kind.create);
        for phase in 0..4 {
            let image = self.open(true);
            self.scribble(&image, 50);
            if phase % 2 == 0 {
                // Killed: what it flushed at some time is without a fault, and the next phase has the rest.
                image.flush().run().unwrap();
                self.scribble(&image, 10);
                drop(image);
                self.check(true);
            } else {
                image.seal();
                image.flush().run().unwrap();
                drop(image);
                self.check(false);
                assert_same(&contents(&self.open(false)), &self.expected, "read only");
            }
        }
        // QEMU can go on with it.
        self.qemu_io(&["write -P 1 0 1M", "discard 1M 1M", "write -P 2 1500k 100k"]);
        self.expected = self.as_qemu_reads();
        let image = self.open(true);
        assert_same(&contents(&image), &self.expected, "what QEMU wrote after us");
        self.scribble(&image, 20);
        image.seal();
        image.flush().run().unwrap();
        drop(image);
        self.check(false);
    }
}

fn run(kinds: impl IntoIterator<Item = Kind>) {
    for (seed, kind) in kinds.into_iter().enumerate() {
        World::new(kind, seed as u64).run();
    }
}

#[test]
fn clusters_of_all_sizes() {
    let sizes = ["512", "2k", "64k", "2M"];
    let create = |size: &str| -> &'static str { format!("cluster_size={size}").leak() };
    run(sizes.map(|size| Kind { create: create(size), ..PLAIN }));
    run([Kind { create: "cluster_size=16k,extended_l2=on", ..PLAIN }]);
}

#[test]
fn version_2_has_no_zero_flag() {
    run([
        Kind { create: "compat=0.10", ..PLAIN },
        Kind { create: "compat=0.10,cluster_size=4k", backing: false, ..PLAIN },
        Kind { create: "compat=0.10", compressed: true, snapshots: true, ..PLAIN },
    ]);
}

#[test]
fn refcounts_of_all_widths() {
    for bits in [1, 2, 4, 8, 32, 64] {
        let create = format!("refcount_bits={bits},cluster_size=8k").leak();
        run([Kind { create, snapshots: bits > 1, compressed: bits > 4, ..PLAIN }]);
    }
}

#[test]
fn compressed_clusters_are_read_and_move_when_they_are_written() {
    run([
        Kind { create: "", compressed: true, ..PLAIN },
        Kind { create: "compression_type=zstd", compressed: true, ..PLAIN },
        Kind { create: "extended_l2=on,cluster_size=32k", compressed: true, backing: false, ..PLAIN },
    ]);
}

#[test]
fn internal_snapshots_keep_what_they_hold() {
    run([
        Kind { create: "", snapshots: true, ..PLAIN },
        Kind { create: "cluster_size=4k", snapshots: true, compressed: true, ..PLAIN },
        Kind { create: "cluster_size=32k,extended_l2=on", snapshots: true, backing: false, ..PLAIN },
    ]);
}

#[test]
fn preallocated_images_are_written_where_they_are() {
    run(["metadata", "falloc", "full"].map(|how| {
        let create = format!("preallocation={how}").leak();
        Kind { create, backing: false, ..PLAIN }
    }));
    run([Kind { create: "preallocation=metadata,extended_l2=on", ..PLAIN }]);
}

#[test]
fn data_in_an_external_file_is_where_the_guest_has_it() {
    run([
        Kind { create: "data_file=data", ..PLAIN },
        Kind { create: "data_file=data,extended_l2=on,cluster_size=32k", backing: false, ..PLAIN },
    ]);
    let mut raw = World::new(Kind { create: "data_file=data,data_file_raw=on", backing: false, ..PLAIN }, 1);
    raw.run();
    assert_same(&fs::read(raw.path("data")).unwrap()[..CAPACITY as usize], &raw.expected, "the raw file");
}
