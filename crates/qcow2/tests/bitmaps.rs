//! Persistent dirty bitmaps: QEMU made them, we keep them up, QEMU goes on with them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use block::testing::{MemStorage, Random};
use block::{ByteRange, Disk, Error, ErrorKind, Storage, blocking, write_disk};
use qcow2::{Image, Journal, Mode, Parts, Report};
use support::{Hook, Hooked, assert_same, contents, memory};

const CAPACITY: u64 = 4 << 20;
/// Bytes of a granule of the bitmap that follows writes.
const GRANULE: u64 = 4096;

fn run(folder: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The number after `"field": `.
fn number(text: &str, field: &str) -> u64 {
    let after = text.split(&format!("\"{field}\": ")).nth(1).unwrap();
    after.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

/// An image's file, while nobody has it open.
struct World {
    folder: tempfile::TempDir,
    bytes: Vec<u8>,
}

impl World {
    /// With a bitmap `follows`, that knows of one write, and one `stays`, that knows of the same and follows no more.
    fn new(options: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run = |program, arguments: &[&str]| run(folder.path(), program, arguments);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "image", "4M"]);
        run("qemu-img", &["bitmap", "--add", "-g", "4096", "image", "follows"]);
        run("qemu-img", &["bitmap", "--add", "-g", "512", "image", "stays"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 1 1M 100k", "image"]);
        run("qemu-img", &["bitmap", "--disable", "image", "stays"]);
        let bytes = fs::read(folder.path().join("image")).unwrap();
        Self { folder, bytes }
    }

    fn write_file(&self) -> &Path {
        fs::write(self.folder.path().join("image"), &self.bytes).unwrap();
        self.folder.path()
    }

    /// The granules of a bitmap that are dirty, as QEMU reads them: exported by NBD, where they look like holes.
    fn dirty(&self, name: &str, granule: u64) -> BTreeSet<u64> {
        let folder = self.write_file();
        let socket = folder.join("socket");
        let path = socket.to_str().unwrap();
        let server = ["-f", "qcow2", "-r", "-t", "-B", name, "-k", path, "image"];
        let mut server = Command::new("qemu-nbd").args(server).current_dir(folder).spawn().unwrap();
        while !socket.exists() {
            assert!(server.try_wait().unwrap().is_none(), "QEMU does not read the bitmap '{name}'");
            std::thread::sleep(Duration::from_millis(5));
        }
        let export =
            format!("driver=nbd,server.type=unix,server.path={path},x-dirty-bitmap=qemu:dirty-bitmap:{name}");
        let text = run(folder, "qemu-img", &["map", "--output=json", "--image-opts", &export]);
        server.kill().unwrap();
        server.wait().unwrap();
        fs::remove_file(&socket).unwrap();
        let holes = text.lines().filter(|line| line.contains("\"data\": false"));
        let granules = |line: &str| {
            let (start, len) = (number(line, "start"), number(line, "length"));
            start / granule..(start + len).div_ceil(granule)
        };
        holes.flat_map(granules).collect()
    }

    /// Whether QEMU says that the bitmap is in use, which is to say not to be trusted.
    fn is_in_use(&self, name: &str) -> bool {
        let text = run(self.write_file(), "qemu-img", &["info", "-f", "qcow2", "--output=json", "image"]);
        let at = text.find(&format!("\"name\": \"{name}\"")).unwrap();
        text[text[..at].rfind("\"flags\"").unwrap()..at].contains("in-use")
    }

    /// QEMU finds no fault, nor do we.
    fn check(&self) {
        let text = run(self.write_file(), "qemu-img", &["check", "-f", "qcow2", "image"]);
        assert!(text.contains("No errors were found"), "{text}");
        assert_eq!(qcow2::check(&MemStorage::from(self.bytes.clone())).unwrap(), Report::default());
    }

    fn open(&self, backing: Option<Arc<dyn Disk>>) -> (Image, Arc<MemStorage>) {
        let storage = Arc::new(MemStorage::from(self.bytes.clone()));
        let journal = Journal::open(memory(), memory(), "boot").unwrap();
        let parts = Parts::new(storage.clone(), backing);
        (Image::open(parts, Mode::Writable(journal)).unwrap(), storage)
    }
}

fn close(image: &Image) {
    image.seal();
    image.flush().run().unwrap();
    image.close().unwrap();
}

fn granules(offset: u64, len: u64) -> std::ops::Range<u64> {
    offset / GRANULE..(offset + len).div_ceil(GRANULE)
}

#[test]
fn all_that_a_guest_changes_is_in_the_bitmap_that_qemu_goes_on_with() {
    for (options, seed) in
        [("cluster_size=64k", 1), ("cluster_size=512", 2), ("extended_l2=on,cluster_size=16k", 3)]
    {
        let mut world = World::new(options);
        let (mut expected, stays) = (world.dirty("follows", GRANULE), world.dirty("stays", 512));
        assert_eq!((expected.len(), stays.len()), (25, 200));
        let (image, storage) = world.open(None);
        let mut random = Random(seed);
        for round in 0..30 {
            let ByteRange { offset, len } = random.range(CAPACITY);
            let range = ByteRange { offset, len: len.min(9000) };
            match round % 4 {
                0 => blocking(|waker| image.discard(range, waker)).unwrap(),
                1 => blocking(|waker| image.write_zeroes(range, true, waker)).unwrap(),
                _ => write_disk(&image, range.offset, &vec![round; range.len as usize]).unwrap(),
            }
            expected.extend(granules(range.offset, range.len));
        }
        image.flush().run().unwrap();
        world.bytes = storage.bytes();
        assert!(world.is_in_use("follows") && !world.is_in_use("stays"), "while it is written");
        assert_eq!(image.close().unwrap_err().kind(), ErrorKind::Busy);
        close(&image);
        image.close().unwrap();
        world.bytes = storage.bytes();
        world.check();
        assert!(!world.is_in_use("follows"));
        assert_eq!(world.dirty("follows", GRANULE), expected, "{options}");
        assert_eq!(world.dirty("stays", 512), stays, "{options}");
        // And once more, over what we saved.
        run(world.write_file(), "qemu-io", &["-f", "qcow2", "-c", "write -q 2M 64k", "image"]);
        world.bytes = fs::read(world.folder.path().join("image")).unwrap();
        expected.extend(granules(2 << 20, 64 << 10));
        let (image, storage) = world.open(None);
        write_disk(&image, CAPACITY - 1, &[1]).unwrap();
        expected.extend(granules(CAPACITY - 1, 1));
        close(&image);
        world.bytes = storage.bytes();
        assert_eq!(world.dirty("follows", GRANULE), expected, "{options}");
        world.check();
    }
}

#[test]
fn a_bitmap_of_a_killed_writer_is_never_trusted_again() {
    let mut world = World::new("cluster_size=64k");
    let before = world.bytes.clone();
    let (image, storage) = world.open(None);
    assert!(storage.bytes() != before, "in use before the first write");
    drop(image);
    for _ in 0..2 {
        world.bytes = storage.bytes();
        assert!(world.is_in_use("follows"));
        let (image, storage) = world.open(None);
        write_disk(&image, 0, &[1; 512]).unwrap();
        close(&image);
        world.bytes = storage.bytes();
        assert!(world.is_in_use("follows") && !world.is_in_use("stays"));
        world.check();
    }
}

#[test]
fn an_image_that_was_only_read_keeps_its_bitmaps_as_they_are() {
    let world = World::new("cluster_size=64k");
    let storage = Arc::new(MemStorage::from(world.bytes.clone()));
    let image = Image::open(Parts::new(storage.clone(), None), Mode::ReadOnly).unwrap();
    contents(&image);
    image.close().unwrap();
    assert!(storage.bytes() == world.bytes);
}

#[test]
fn bitmaps_grow_with_the_disk() {
    for options in ["cluster_size=64k", "cluster_size=512"] {
        let mut world = World::new(options);
        let (mut expected, stays) = (world.dirty("follows", GRANULE), world.dirty("stays", 512));
        let (image, storage) = world.open(None);
        image.grow(4 * CAPACITY).unwrap();
        image.grow(5 * CAPACITY + 512).unwrap();
        write_disk(&image, 3 * CAPACITY - 1, &[1; 2]).unwrap();
        write_disk(&image, 5 * CAPACITY, &[1; 512]).unwrap();
        expected.extend(granules(3 * CAPACITY - 1, 2).chain(granules(5 * CAPACITY, 512)));
        let read = contents(&image);
        close(&image);
        world.bytes = storage.bytes();
        assert_eq!(world.dirty("follows", GRANULE), expected, "{options}");
        assert_eq!(world.dirty("stays", 512), stays, "{options}");
        world.check();
        assert_same(&contents(&world.open(None).0), &read, options);
    }
}

#[test]
fn without_room_to_save_them_bitmaps_stay_in_use_and_can_be_saved_later() {
    let mut world = World::new("cluster_size=512");
    let storage = memory();
    storage.write_at(&world.bytes, 0).unwrap();
    let journal = Journal::open(memory(), memory(), "boot").unwrap();
    let image = Image::open(Parts::new(storage.clone(), None), Mode::Writable(journal)).unwrap();
    let mut expected = world.dirty("follows", GRANULE);
    for offset in (0..CAPACITY).step_by(1 << 17) {
        write_disk(&image, offset, &[1; 512]).unwrap();
        expected.extend(granules(offset, 512));
    }
    image.grow(200 << 20).unwrap();
    write_disk(&image, 199 << 20, &[1; 512]).unwrap();
    expected.extend(granules(199 << 20, 512));
    image.seal();
    image.flush().run().unwrap();
    storage.limit_len(storage.len().unwrap());
    assert_eq!(image.close().unwrap_err().kind(), ErrorKind::NoSpace);
    world.bytes = storage.bytes();
    assert!(world.is_in_use("follows"));
    storage.limit_len(u64::MAX);
    image.close().unwrap();
    world.bytes = storage.bytes();
    assert_eq!(world.dirty("follows", GRANULE), expected);
    world.check();
}

/// A file in memory of which one sync fails, for want of room: the `n`th from when it is told so.
#[derive(Debug, Default)]
struct FailingSync {
    inner: MemStorage,
    left: AtomicI64,
}

impl Hooked for FailingSync {
    fn inner(&self) -> &dyn Storage {
        &self.inner
    }

    fn sync(&self) -> block::Result<()> {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            1 => Err(Error::new(ErrorKind::NoSpace, "injected: no space left")),
            _ => self.inner.sync(),
        }
    }
}

/// The kernel says once that it lost what a guest wrote, and a thin volume says so as want of room: the one who was told took it
/// for something that may be tried again, and the guest's next flush was acknowledged.
#[test]
fn a_sync_that_fails_is_final_whoever_asked_for_it() {
    let world = World::new("cluster_size=512");
    let works: [fn(&Image) -> block::Result<()>; 2] =
        [|image| image.grow(50 * CAPACITY), |image| image.set_backing(Some(("beneath", "raw")))];
    for work in works {
        for failing in 1.. {
            let storage = Arc::new(Hook::<FailingSync>::default());
            storage.0.inner.write_at(&world.bytes, 0).unwrap();
            let journal = Journal::open(memory(), memory(), "boot").unwrap();
            let image = Image::open(Parts::new(storage.clone(), None), Mode::Writable(journal)).unwrap();
            write_disk(&image, 0, &[7; 512]).unwrap();
            storage.0.left.store(failing, Ordering::SeqCst);
            if work(&image).is_ok() {
                assert!(failing > 1, "nothing was synced");
                break;
            }
            assert!(image.has_failed(), "sync {failing}");
            assert_eq!(image.flush().run().unwrap_err().kind(), ErrorKind::Latched, "sync {failing}");
        }
    }
}
