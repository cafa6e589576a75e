//! What the tests share: images with their files, and a checker of the format of its own.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::HashMap;
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::testing::{FaultStorage, MemStorage, Random};
use block::{ByteRange, Disk, Storage, read_disk};
use hostio::{Cache, HostFile, Open};
use qcow2::{CreateOptions, Header, Image, Journal, Mode, Parts};

/// A program of QEMU's, run in `folder`, which succeeds. What it says.
pub(crate) fn qemu(program: &str, folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(folder).output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// An image of QEMU's with clusters of 512 bytes, in `storage`: a refcount block counts 128 KiB, an L2 table maps 32 KiB, so
/// there are new ones of both all the time.
pub(crate) fn small_clusters(storage: &dyn Storage, capacity: u64) {
    let folder = tempfile::tempdir().unwrap();
    let size = capacity.to_string();
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "image", &size];
    qemu("qemu-img", folder.path(), &create);
    storage.write_at(&fs::read(folder.path().join("image")).unwrap(), 0).unwrap();
    storage.sync().unwrap();
}

pub(crate) fn open_file(path: &Path, writable: bool) -> Arc<dyn Storage> {
    Arc::new(HostFile::open(path, Open { writable, cache: Cache::Writeback }).unwrap())
}

/// A storage whose writes, or syncs, may do something else.
pub(crate) trait Hooked: Send + Sync + Debug {
    /// What is beneath.
    fn inner(&self) -> &dyn Storage;

    fn write(&self, buf: &[u8], offset: u64) -> block::Result<()> {
        self.inner().write_at(buf, offset)
    }

    fn sync(&self) -> block::Result<()> {
        self.inner().sync()
    }
}

/// It, as a storage.
#[derive(Debug, Default)]
pub(crate) struct Hook<H>(pub(crate) H);

impl<H: Hooked> Storage for Hook<H> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> block::Result<()> {
        self.0.inner().read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> block::Result<()> {
        self.0.write(buf, offset)
    }

    fn sync(&self) -> block::Result<()> {
        self.0.sync()
    }

    fn len(&self) -> block::Result<u64> {
        self.0.inner().len()
    }

    fn set_len(&self, len: u64) -> block::Result<()> {
        self.0.inner().set_len(len)
    }

    fn punch_hole(&self, range: ByteRange) -> block::Result<()> {
        self.0.inner().punch_hole(range)
    }
}

pub(crate) fn memory() -> Arc<FaultStorage> {
    Arc::new(FaultStorage::new(MemStorage::default()))
}

/// An image's files, which outlive the process that has it open.
#[derive(Clone)]
pub(crate) struct Files {
    pub(crate) image: Arc<dyn Storage>,
    pub(crate) journal: [Arc<dyn Storage>; 2],
}

impl Files {
    pub(crate) fn new(image: Arc<dyn Storage>, options: &CreateOptions) -> Self {
        qcow2::create(&*image, options).unwrap();
        Self { image, journal: [memory(), memory()] }
    }

    pub(crate) fn open(&self, backing: Option<Arc<dyn Disk>>) -> block::Result<Image> {
        self.open_on_boot(backing, "this boot")
    }

    pub(crate) fn open_on_boot(&self, backing: Option<Arc<dyn Disk>>, boot: &str) -> block::Result<Image> {
        let [a, b] = self.journal.clone();
        let parts = Parts::new(self.image.clone(), backing);
        Image::open(parts, Mode::Writable(Journal::open(a, b, boot)?))
    }

    /// Opens these parts with the image's journal.
    pub(crate) fn open_parts(&self, parts: Parts) -> block::Result<Image> {
        let [a, b] = self.journal.clone();
        Image::open(parts, Mode::Writable(Journal::open(a, b, "this boot")?))
    }
}

pub(crate) fn options(capacity: u64, cluster_bits: u32, extended_l2: bool) -> CreateOptions {
    CreateOptions::new(capacity, cluster_bits, extended_l2)
}

/// Bytes that get smaller by half or so if they are compressed, or do not at all.
pub(crate) fn some_bytes(random: &mut Random, len: usize) -> Vec<u8> {
    let shrinks = random.below(4) > 0;
    let mut byte = || random.number() as u8;
    (0..len).map(|at| if shrinks && at % 16 < 9 { at as u8 } else { byte() }).collect()
}

pub(crate) fn contents(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.capacity() as usize];
    read_disk(disk, 0, &mut bytes).unwrap();
    bytes
}

/// Where two contents differ first; shorter to read than both of them.
#[track_caller]
pub(crate) fn assert_same(found: &[u8], expected: &[u8], story: &str) {
    assert_eq!(found.len(), expected.len(), "{story}");
    if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
        panic!("{story}: byte {at:#x} is {} and should be {}", found[at], expected[at]);
    }
}

fn be(bytes: &[u8], at: u64, len: usize) -> u64 {
    let at = at as usize;
    bytes.get(at..at + len).unwrap_or(&[]).iter().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

/// What a checker found wrong with an image.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Clusters that tables name more often than they are counted, or entries that contradict the format.
    pub(crate) errors: Vec<String>,
    /// Clusters that are counted more often than named.
    pub(crate) leaks: usize,
}

/// Checks an image from its bytes, by the specification and without the crate's own tables.
pub(crate) fn check(bytes: &[u8]) -> Verdict {
    let header = Header::read(&MemStorage::from(bytes.to_vec())).unwrap();
    let (bits, size) = (header.cluster_bits, 1_u64 << header.cluster_bits);
    let mut named: HashMap<u64, u64> = HashMap::from([(0, 1)]);
    let mut verdict = Verdict::default();
    let (table, table_clusters) = (be(bytes, 48, 8), be(bytes, 56, 4));
    let (l1, l1_entries) = (be(bytes, 40, 8), be(bytes, 36, 4));
    let mut name = |at: u64, count: u64| {
        (0..count).for_each(|n| *named.entry((at >> bits) + n).or_default() += 1);
    };
    name(table, table_clusters);
    name(l1, (l1_entries * 8).div_ceil(size));
    let blocks: Vec<u64> = (0..table_clusters * size / 8).map(|n| be(bytes, table + n * 8, 8)).collect();
    blocks.iter().filter(|block| **block != 0).for_each(|block| name(*block, 1));
    let entry_size = if header.extended_l2 { 16 } else { 8 };
    for n in 0..l1_entries {
        let l2 = be(bytes, l1 + n * 8, 8) & 0x00ff_ffff_ffff_fe00;
        if l2 == 0 {
            continue;
        }
        name(l2, 1);
        for entry in (0..size / entry_size).map(|index| l2 + index * entry_size) {
            let (word, bitmap) = (be(bytes, entry, 8), be(bytes, entry + 8, 8));
            if word >> 62 == 1 {
                let split = 62 - (bits - 8);
                let (first, more) = (word & ((1 << split) - 1), (word & !(1 << 62)) >> split);
                let last = first / 512 * 512 + more * 512;
                name(first, (last >> bits) - (first >> bits) + 1);
                continue;
            }
            let offset = word & 0x00ff_ffff_ffff_fe00;
            if offset != 0 {
                name(offset, 1);
            }
            let bad_bitmap =
                bitmap & (bitmap >> 32) & 0xffff_ffff != 0 || (bitmap as u32 != 0 && offset == 0);
            if offset % size != 0 || (header.extended_l2 && bad_bitmap) {
                verdict.errors.push(format!("entry at {entry:#x}: {word:#x} {bitmap:#x}"));
            }
        }
    }
    let per_block = size / 2;
    let counted = |cluster: u64| match blocks.get((cluster / per_block) as usize) {
        Some(block) if *block != 0 => be(bytes, block + cluster % per_block * 2, 2),
        _ => 0,
    };
    let mut clusters: Vec<u64> = named.keys().copied().collect();
    clusters.extend(0..(bytes.len() as u64).div_ceil(size));
    clusters.sort_unstable();
    clusters.dedup();
    for cluster in clusters {
        let (count, names) = (counted(cluster), named.get(&cluster).copied().unwrap_or(0));
        if count < names {
            verdict.errors.push(format!("cluster {cluster}: named {names} times, counted {count}"));
        } else if count > names {
            verdict.leaks += 1;
        }
    }
    verdict
}
