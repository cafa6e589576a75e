//! Images that fail a check: they are never written, and cost no more than honest ones to find out.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::io::Write;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::testing::MemStorage;
use block::{ByteRange, Disk, Error, ErrorKind, Result, Storage, read_disk, write_disk};
use flate2::Compression;
use flate2::write::DeflateEncoder;
use qcow2::{CreateOptions, Header, Image, Journal, Mode, Parts};
use support::{Files, memory, options};

const SIZE: usize = 65536;

fn be(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// With an internal snapshot and a dirty bitmap, made by QEMU; and such that whoever opens it for writing has to write at
/// once: its last cluster is short, and it has an autoclear bit that nobody knows.
fn image(extended: bool) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let status = Command::new(program).args(arguments).current_dir(folder.path()).status().unwrap();
        assert!(status.success(), "{program} {arguments:?}");
    };
    let options = if extended { "extended_l2=on" } else { "extended_l2=off" };
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "image", "2M"]);
    run("qemu-img", &["bitmap", "--add", "image", "dirty"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 3 0 200k", "image"]);
    run("qemu-img", &["snapshot", "-c", "one", "image"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 4 100k 200k", "image"]);
    let mut bytes = std::fs::read(folder.path().join("image")).unwrap();
    bytes[88] = 0x40;
    bytes.extend([7; 512]);
    bytes
}

fn open(storage: Arc<dyn Storage>, writable: bool) -> Result<Image> {
    let mode = match writable {
        true => Mode::Writable(Journal::open(memory(), memory(), "boot")?),
        false => Mode::ReadOnly,
    };
    Image::open(Parts::new(storage, None), mode)
}

/// Where what is in an image of [`image`].
struct Places {
    l1: usize,
    l2: usize,
    refcount_table: usize,
    block: usize,
    snapshots: usize,
    snapshot_l1: usize,
    directory: usize,
    bitmap_table: usize,
}

impl Places {
    fn of(bytes: &[u8]) -> Self {
        let extension = (0..512).find(|at| bytes[*at..at + 4] == [0x23, 0x85, 0x28, 0x75]).unwrap();
        let (l1, refcount_table) = (be(bytes, 40) as usize, be(bytes, 48) as usize);
        let (snapshots, directory) = (be(bytes, 64) as usize, be(bytes, extension + 24) as usize);
        Self {
            l1,
            l2: (be(bytes, l1) & !(1 << 63)) as usize,
            refcount_table,
            block: be(bytes, refcount_table) as usize,
            snapshots,
            snapshot_l1: be(bytes, snapshots) as usize,
            directory,
            bitmap_table: be(bytes, directory) as usize,
        }
    }

    /// Words that make tables overlap, lie outside the file, or lie, and what they do.
    fn lies(&self) -> Vec<(&'static str, usize, u64)> {
        let own = |at: usize| 1 << 63 | at as u64;
        vec![
            ("the L1 table at the header", 40, 0),
            ("the L1 table at itself, by L2", self.l1, own(self.l1)),
            ("an L2 table at the header", self.l1, 1 << 63 | 1 << 8),
            ("an L2 table at the refcount table", self.l1, own(self.refcount_table)),
            ("an L2 table at a refcount block", self.l1, own(self.block)),
            ("an L2 table at the snapshots", self.l1, own(self.snapshots)),
            ("an L2 table at a snapshot's L1 table", self.l1, own(self.snapshot_l1)),
            ("an L2 table past the end", self.l1, own(1 << 40)),
            ("an L2 table that is not aligned", self.l1, own(self.l2 + 512)),
            ("an L1 entry with reserved bits", self.l1, own(self.l2) | 1 << 56),
            ("the refcount table at the header", 48, 0),
            ("the refcount table at the L1 table", 48, self.l1 as u64),
            ("the refcount table past the end", 48, 1 << 40),
            ("a refcount block at its table", self.refcount_table, self.refcount_table as u64),
            ("a refcount block at the L1 table", self.refcount_table, self.l1 as u64),
            ("a refcount block past the end", self.refcount_table, 1 << 40),
            ("a refcount block named twice", self.refcount_table + 8, self.block as u64),
            ("the snapshots at the header", 64, 0),
            ("the snapshots at the L1 table", 64, self.l1 as u64),
            ("the snapshots past the end", 64, 1 << 40),
            ("a snapshot's L1 table at the disk's", self.snapshots, self.l1 as u64),
            ("a snapshot's L1 table at the refcount table", self.snapshots, self.refcount_table as u64),
            ("a snapshot's L1 table past the end", self.snapshots, 1 << 40),
            ("a snapshot's L1 table of 32 GiB", self.snapshots + 8, u64::MAX << 32),
            ("the bitmap directory of another length", self.directory + 16, u64::MAX),
            ("a bitmap's table at the L1 table", self.directory, self.l1 as u64),
            ("a bitmap's table at the directory", self.directory, self.directory as u64),
            ("a bitmap's table past the end", self.directory, 1 << 40),
            ("a bitmap's table of another size", self.directory + 8, 99 << 32 | 2),
            ("a bitmap's data at the L1 table", self.bitmap_table, self.l1 as u64),
            ("a bitmap's data past the end", self.bitmap_table, 1 << 40),
            ("a bitmap's table with reserved bits", self.bitmap_table, 2),
            ("no size", 24, u64::MAX),
        ]
    }
}

#[test]
fn an_image_that_fails_a_check_is_never_written() {
    for extended in [false, true] {
        let good = image(extended);
        for (what, at, word) in Places::of(&good).lies() {
            for dirty in [0, 1] {
                let mut bytes = good.clone();
                bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
                bytes[79] |= dirty;
                let storage = Arc::new(MemStorage::from(bytes.clone()));
                let error = open(storage.clone(), true).map(|_| panic!("{what}: it was opened")).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
                assert!(storage.bytes() == bytes, "{what}: it was written ({error})");
            }
        }
        let storage = Arc::new(MemStorage::from(good.clone()));
        open(storage.clone(), true).unwrap();
        assert!(
            storage.bytes() != good,
            "what has to be written of a good image shows that the others were not"
        );
    }
}

/// A file of any size that is zero but for its beginning, and knows how much of it was read.
#[derive(Debug)]
struct Sparse {
    head: MemStorage,
    len: u64,
    read: AtomicU64,
    largest: AtomicU64,
}

impl Sparse {
    fn new(head: Vec<u8>, len: u64) -> Arc<Self> {
        let none = || AtomicU64::new(0);
        Arc::new(Self { head: MemStorage::from(head), len, read: none(), largest: none() })
    }
}

impl Storage for Sparse {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.largest.fetch_max(buf.len() as u64, Ordering::Relaxed);
        if offset + buf.len() as u64 > self.len {
            return Err(Error::new(ErrorKind::Io, "past the end"));
        }
        buf.fill(0);
        let there = self.head.len()?.saturating_sub(offset).min(buf.len() as u64) as usize;
        if there > 0 { self.head.read_at(&mut buf[..there], offset) } else { Ok(()) }
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "a file of the imagination"))
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn set_len(&self, _: u64) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "a file of the imagination"))
    }

    fn punch_hole(&self, _: ByteRange) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "a file of the imagination"))
    }
}

#[test]
fn sizes_that_are_made_up_cost_no_more_than_the_largest_honest_ones() {
    let good = image(false);
    let word = |value: u64| value.to_be_bytes().to_vec();
    // As large as they may be, where the file has nothing but holes.
    let snapshots = [word(1 << 40), vec![0xff; 4], vec![0; 60]].concat();
    let far = |at: usize, len: Vec<u8>| vec![(at, word(1 << 40)), (at + 8, len)];
    for (what, changes) in [
        ("an L1 table of 32 MiB", vec![(24, word(1 << 40)), (36, vec![0, 0x40, 0, 0]), (40, word(1 << 41))]),
        ("a refcount table of 8 MiB", far(48, vec![0, 0, 0, 128])),
        ("65536 snapshots", vec![(60, vec![0, 1, 0, 0]), (64, word(1 << 40))]),
        ("65537 snapshots", vec![(60, vec![0, 1, 0, 1])]),
        ("an L1 table of a snapshot of 32 GiB", vec![(Places::of(&good).snapshots, snapshots)]),
        ("a bitmap's table of 1 GiB", far(Places::of(&good).directory, vec![8, 0, 0, 0])),
        ("a bitmap's table of 32 GiB", far(Places::of(&good).directory, vec![0xff; 4])),
    ] {
        let mut bytes = good.clone();
        changes.iter().for_each(|(at, value)| bytes[*at..at + value.len()].copy_from_slice(value));
        for writable in [false, true] {
            let storage = Sparse::new(bytes.clone(), 1 << 50);
            let opened = open(storage.clone(), writable);
            assert!(!writable || opened.is_err(), "{what}");
            if let Ok(image) = opened {
                _ = read_disk(&image, 0, &mut vec![0; 1 << 20]);
            }
            let (read, largest) = (&storage.read, &storage.largest);
            assert!(read.load(Ordering::Relaxed) < 64 << 20, "{what}: {read:?}");
            assert!(largest.load(Ordering::Relaxed) <= 32 << 20, "{what}: {largest:?}");
        }
    }
}

/// Deflate data of `len` zeroes.
fn deflated(len: usize) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    let zeroes = vec![0; 1 << 20];
    (0..len.div_ceil(1 << 20)).for_each(|_| encoder.write_all(&zeroes).unwrap());
    encoder.finish().unwrap()
}

#[test]
fn a_compressed_cluster_that_grows_is_refused() {
    let storage = memory();
    let files = Files::new(storage.clone(), &CreateOptions { ..options(1 << 20, 16, false) });
    write_disk(&files.open(None).unwrap(), 0, &[7; 2 * SIZE]).unwrap();
    files.open(None).unwrap().flush().run().unwrap();
    let good = storage.bytes();
    let l1 = be(&good, 40) as usize;
    let l2 = (be(&good, l1) & !(1 << 63)) as usize;
    let data = (be(&good, l2) & !(1 << 63)) as usize;
    // A hundred MiB in less than two clusters, which is all that a descriptor can name; and less than a cluster.
    for packed in [deflated(100 << 20), deflated(SIZE / 2 * 3), deflated(1)[..20].to_vec()] {
        assert!(packed.len() < 2 * SIZE);
        let mut bytes = good.clone();
        bytes[data..data + packed.len()].copy_from_slice(&packed);
        let descriptor = 1 << 62 | 255_u64 << 54 | data as u64;
        bytes[l2..l2 + 8].copy_from_slice(&descriptor.to_be_bytes());
        bytes.resize(bytes.len() + 2 * SIZE, 0);
        for writable in [false, true] {
            let image = open(Arc::new(MemStorage::from(bytes.clone())), writable).unwrap();
            assert_eq!(read_disk(&image, 0, &mut [0; 512]).unwrap_err().kind(), ErrorKind::Corrupt);
            if writable {
                // To write a part of it, the rest is needed.
                assert_eq!(write_disk(&image, 0, &[1; 512]).unwrap_err().kind(), ErrorKind::Corrupt);
                write_disk(&image, 0, &[1; SIZE]).unwrap();
            }
        }
    }
}

#[test]
fn a_header_is_not_changed_if_anything_in_it_is_wrong() {
    let good = image(true);
    for (at, value) in [(4, 9), (20, 8), (24, 0xff), (40, 0xff), (79, 0x12), (99, 9), (103, 105)] {
        let mut bytes = good.clone();
        bytes[at] = value;
        let storage = MemStorage::from(bytes.clone());
        qcow2::set_backing(&storage, Some(("base", "raw"))).unwrap_err();
        assert!(storage.bytes() == bytes, "{at}");
    }
    let storage = MemStorage::from(good);
    qcow2::set_backing(&storage, Some(("base", "raw"))).unwrap();
    assert_eq!(Header::read(&storage).unwrap().backing_file.as_deref(), Some("base"));
}
