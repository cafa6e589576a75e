use std::fs;
use std::path::Path;
use std::sync::Arc;

use block::ErrorKind;
use block::testing::{CrashStorage, MemStorage};

use super::*;
use crate::bytes::be64;
use crate::check::repair::recount;
use crate::testing;

fn qemu(folder: &Path, program: &str, arguments: &[&str]) -> String {
    testing::qemu(folder, program, arguments).0
}

/// What `qemu-img check` counts: contradictions and short refcounts together, and leaks. `None` if it gives up.
fn by_qemu(folder: &Path, bytes: &[u8]) -> Option<(u64, u64)> {
    fs::write(folder.join("checked"), bytes).unwrap();
    let text = qemu(folder, "qemu-img", &["check", "-f", "qcow2", "--output=json", "checked"]);
    let number = |field: &str| {
        let after = text.split(&format!("\"{field}\": ")).nth(1)?;
        after.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    number("check-errors").filter(|errors| *errors == 0)?;
    Some((number("corruptions").unwrap_or(0), number("leaks").unwrap_or(0)))
}

/// An image made by QEMU with these options, with data, zeroes, holes, and what `more` does with it.
fn make(folder: &Path, options: &str, more: &[(&str, &[&str])]) -> Vec<u8> {
    qemu(folder, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "image", "4M"]);
    let io = ["write -P 9 5000 300000", "write -z 1M 200k", "write -P 8 3M 4k", "discard 64k 128k"];
    let io: Vec<&str> = io.iter().flat_map(|command| ["-c", command]).collect();
    qemu(folder, "qemu-io", &[&io[..], &["-f", "qcow2", "image"]].concat());
    more.iter().for_each(|(program, arguments)| _ = qemu(folder, program, arguments));
    fs::read(folder.join("image")).unwrap()
}

const SNAPSHOT: (&str, &[&str]) = ("qemu-img", &["snapshot", "-c", "one", "image"]);
const WRITE: (&str, &[&str]) = ("qemu-io", &["-f", "qcow2", "-c", "write -P 3 0 100k", "image"]);
const BITMAP: (&str, &[&str]) = ("qemu-img", &["bitmap", "--add", "-g", "512", "image", "dirty"]);
const COMPRESS: (&str, &[&str]) = ("qemu-io", &["-f", "qcow2", "-c", "write -c -P 5 2M 256k", "image"]);

fn images(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let all = [
        ("cluster_size=64k", &[SNAPSHOT, WRITE, COMPRESS][..]),
        ("cluster_size=512,refcount_bits=64", &[BITMAP, WRITE, SNAPSHOT, WRITE]),
        ("cluster_size=4k,refcount_bits=2", &[SNAPSHOT, WRITE]),
        ("cluster_size=2M,refcount_bits=1", &[WRITE]),
        ("cluster_size=16k,extended_l2=on,refcount_bits=8", &[BITMAP, WRITE, BITMAP]),
        ("cluster_size=64k,extended_l2=on,compression_type=zstd", &[COMPRESS, SNAPSHOT, WRITE]),
        ("compat=0.10", &[SNAPSHOT, WRITE]),
        ("data_file=data", &[WRITE]),
    ];
    all.iter().map(|(options, more)| (options.to_string(), make(folder, options, more))).collect()
}

#[test]
fn qemu_and_we_find_no_fault_with_the_same_images() {
    let folder = tempfile::tempdir().unwrap();
    for (options, bytes) in images(folder.path()) {
        let report = check(&MemStorage::from(bytes.clone())).unwrap();
        assert_eq!(report, Report::default(), "{options}");
        assert_eq!(by_qemu(folder.path(), &bytes), Some((0, 0)), "{options}");
    }
}

/// The bytes of the image's first refcount block.
fn first_block(bytes: &[u8]) -> std::ops::Range<usize> {
    let header = Header::read(&MemStorage::from(bytes.to_vec())).unwrap();
    let at = be64(bytes, header.refcount_table.0 as usize) as usize;
    at..at + (1 << header.cluster_bits)
}

#[test]
fn wrong_refcounts_are_counted_as_qemu_counts_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut seen = Report::default();
    for (options, image) in images(folder.path()) {
        // Past the image's end too: a refcount of what is not there is a leak.
        for (step, value) in [(1, 0), (3, 1), (97, 0x55)] {
            let mut bytes = image.clone();
            first_block(&image).take(2000).step_by(step).skip(step % 4).for_each(|at| bytes[at] = value);
            let report = check(&MemStorage::from(bytes.clone())).unwrap();
            let ours = (report.broken + report.short, report.leaks);
            let theirs = by_qemu(folder.path(), &bytes).unwrap();
            // QEMU holds the marks against the wrong refcounts, so it tells of more.
            assert_eq!(ours.1, theirs.1, "{options} {step} {value:#x}");
            assert!(ours.0 <= theirs.0, "{options} {step} {value:#x}: {ours:?} {theirs:?}");
            (seen.short, seen.leaks) = (seen.short + report.short, seen.leaks + report.leaks);
            let budgeted = check_with(&MemStorage::from(bytes), &header_of(&image), 1).unwrap();
            assert_eq!(budgeted, report, "{options}");
        }
    }
    assert!(seen.short > 100 && seen.leaks > 50, "{seen:?}");
}

fn header_of(bytes: &[u8]) -> Header {
    Header::read(&MemStorage::from(bytes.to_vec())).unwrap()
}

#[test]
fn entries_that_make_no_sense_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let image = make(folder.path(), "cluster_size=4k", &[SNAPSHOT, WRITE, BITMAP]);
    let header = header_of(&image);
    let l1 = header.l1.0 as usize;
    let l2 = (be64(&image, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let snapshot = header.snapshots_at.0 as usize;
    let (table, size) = (header.refcount_table.0 as usize, 1_u64 << header.cluster_bits);
    for (what, at, value) in [
        ("L2 past the end", l1, 1 << 63 | 1 << 40),
        ("L2 not aligned", l1, 1 << 63 | (l2 as u64 + 512)),
        ("L2 at L1", l1, 1 << 63 | l1 as u64),
        ("L2 twice", l1 + 8, be64(&image, l1)),
        ("data past the end", l2, 1 << 63 | 1 << 40),
        ("data at L2", l2, 1 << 63 | l2 as u64),
        ("data at the header", l2, 1 << 63),
        ("data at the snapshots", l2, 1 << 63 | snapshot as u64),
        ("reserved bits", l2, 1 << 63 | (5 * size) | 2),
        ("compressed past the end", l2, 1 << 62 | 1 << 40),
        ("a block past the end", table, 1 << 40),
        ("a block at L1", table + 8, l1 as u64),
    ] {
        let mut bytes = image.clone();
        bytes[at..at + 8].copy_from_slice(&u64::to_be_bytes(value));
        let report = check(&MemStorage::from(bytes.clone())).unwrap();
        assert!(report.broken > 0, "{what}: {report:?}");
        let storage = MemStorage::from(bytes.clone());
        assert_eq!(repair(&storage, &header).unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
        assert!(storage.bytes() == bytes, "{what}: it was written");
    }
}

/// A block of such an image counts 16 million clusters, and its table names a million blocks.
#[test]
fn a_table_that_names_one_block_a_million_times_takes_no_longer() {
    let folder = tempfile::tempdir().unwrap();
    let mut image = make(folder.path(), "cluster_size=2M,refcount_bits=1", &[]);
    let header = header_of(&image);
    let block = image[header.refcount_table.0 as usize..][..8].to_vec();
    let end = image.len().next_multiple_of(2 << 20);
    image.resize(end, 0);
    image[48..56].copy_from_slice(&(end as u64).to_be_bytes());
    image[56..60].copy_from_slice(&4_u32.to_be_bytes());
    image.extend(block.repeat(1 << 20));
    let (told, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || told.send(check(&MemStorage::from(image)).unwrap().broken));
    let broken = hear.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
    assert!(broken > 0);
}

/// An image with lazy refcounts whose writer was killed, and what its disk reads.
fn killed(folder: &Path, options: &str, commands: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let options = format!("lazy_refcounts=on,{options}");
    qemu(folder, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, "image", "4M"]);
    let commands = [commands, &["flush", "sigraise 9"]].concat();
    let io: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    qemu(folder, "qemu-io", &[&io[..], &["-f", "qcow2", "image"]].concat());
    let bytes = fs::read(folder.join("image")).unwrap();
    qemu(folder, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "image", "raw"]);
    (bytes, fs::read(folder.join("raw")).unwrap())
}

fn assert_whole(folder: &Path, image: &[u8], expected: &[u8], story: &str) {
    assert_eq!(by_qemu(folder, image), Some((0, 0)), "{story}");
    qemu(folder, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "checked", "found"]);
    assert!(fs::read(folder.join("found")).unwrap() == expected, "{story}");
}

const LAZY: [(&str, &[&str]); 4] = [
    ("cluster_size=64k", &["write -P 7 100k 1M"]),
    ("cluster_size=512,refcount_bits=64", &["write -P 7 1k 1M", "write -P 6 2M 100k", "discard 1k 64k"]),
    ("cluster_size=4k,refcount_bits=1", &["write -P 7 0 4M"]),
    ("cluster_size=16k,extended_l2=on,refcount_bits=32", &["write -P 7 5k 700k", "write -z 3M 64k"]),
];

#[test]
fn stale_refcounts_are_repaired() {
    let folder = tempfile::tempdir().unwrap();
    for (options, commands) in LAZY {
        let (image, expected) = killed(folder.path(), options, commands);
        let storage = MemStorage::from(image);
        let header = Header::read(&storage).unwrap();
        assert!(header.is_dirty(), "{options}");
        assert!(check(&storage).unwrap().short > 0, "{options}");
        repair(&storage, &header).unwrap();
        assert!(!Header::read(&storage).unwrap().is_dirty());
        assert_eq!(check(&storage).unwrap(), Report::default(), "{options}");
        assert_whole(folder.path(), &storage.bytes(), &expected, options);
    }
}

/// An image whose refcount table names only its first block, as if the others had never been written; and whose table is
/// too small for them, if that is asked for.
fn without_blocks(folder: &Path, small_table: bool) -> (Vec<u8>, Vec<u8>) {
    // A cluster of the table names blocks for 2 MiB.
    let write = if small_table { "write -P 7 0 2100k" } else { "write -P 7 0 200k" };
    let (mut image, expected) = killed(folder, LAZY[1].0, &[write]);
    let header = header_of(&image);
    let (table, len) = (header.refcount_table.0 as usize, header.refcount_table_clusters as usize * 512);
    image[table + 8..table + len].fill(0);
    if small_table {
        image[56..60].copy_from_slice(&1_u32.to_be_bytes());
    }
    (image, expected)
}

#[test]
fn a_refcount_table_that_is_too_small_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (image, expected) = without_blocks(folder.path(), true);
    let header = header_of(&image);
    for budget in [1, 100] {
        let storage = MemStorage::from(image.clone());
        recount(&storage, &header, budget).unwrap();
        let after = header_of(&storage.bytes());
        assert!(after.refcount_table_clusters > 1 && after.refcount_table != header.refcount_table);
        assert_eq!(check(&storage).unwrap(), Report::default());
        assert_whole(folder.path(), &storage.bytes(), &expected, "a new table");
    }
}

#[test]
fn a_repair_that_power_is_lost_in_is_repaired_again() {
    let folder = tempfile::tempdir().unwrap();
    lose_power_in_repair(folder.path(), &killed(folder.path(), LAZY[1].0, LAZY[1].1));
    for small_table in [false, true] {
        lose_power_in_repair(folder.path(), &without_blocks(folder.path(), small_table));
    }
}

/// Stops a repair after some of its steps, the last ones above all, and looks at what a loss of power then leaves.
fn lose_power_in_repair(folder: &Path, (image, expected): &(Vec<u8>, Vec<u8>)) {
    let header = header_of(image);
    let start = |steps| {
        let inner = Arc::new(CrashStorage::new());
        inner.write_at(image, 0).unwrap();
        inner.sync().unwrap();
        testing::Stops::new(inner, steps)
    };
    let whole = start(u64::MAX);
    repair(&whole, &header).unwrap();
    assert_whole(folder, &whole.inner.after_power_loss(|| false).bytes(), expected, "done and durable");
    let total = u64::MAX - whole.left();
    let mut seed = 1_u64;
    for steps in (0..total).filter(|steps| steps % 32 == 0 || steps + 16 > total) {
        let storage = start(steps);
        repair(&storage, &header).unwrap_err();
        for keep in 0..24 {
            let left = storage.inner.after_power_loss(|| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                keep == 1 || (keep > 1 && seed >> 60 & 1 == 1)
            });
            let header = Header::read(&left).unwrap();
            // The bit says the truth: without it all is right.
            if header.is_dirty() {
                repair(&left, &header).unwrap();
            }
            assert_eq!(check(&left).unwrap(), Report::default(), "{steps} {keep}");
        }
    }
}
