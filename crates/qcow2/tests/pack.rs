//! Compressed clusters, with QEMU as the oracle.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use block::testing::{FaultStorage, MemStorage, Random};
use block::{ByteRange, Disk, ErrorKind, Storage, blocking, write_disk};
use qcow2::{Image, Journal, Mode, Parts};
use support::{Files, assert_same, check, contents, memory, open_file, options, qemu, some_bytes};

const CAPACITY: u64 = (5 << 20) + 1536;

fn open(path: &Path) -> Image {
    let journal = Journal::open(memory(), memory(), "boot").unwrap();
    Image::open(Parts::new(open_file(path, true), None), Mode::Writable(journal)).unwrap()
}

/// The disk's clusters, each as long as it is.
fn clusters(image: &Image) -> impl Iterator<Item = ByteRange> + use<> {
    let (capacity, size) = (image.capacity(), image.cluster_size());
    (0..capacity.div_ceil(size)).map(move |index| {
        let offset = index * size;
        ByteRange { offset, len: size.min(capacity - offset) }
    })
}

fn close(image: Image) {
    image.seal();
    image.flush().run().unwrap();
}

#[test]
fn qemu_reads_what_is_compressed_in_every_kind_of_image() {
    for kind in [
        "cluster_size=64k",
        "cluster_size=64k,compression_type=zstd",
        "cluster_size=512",
        "cluster_size=2M",
        "cluster_size=128k,extended_l2=on",
        "cluster_size=64k,refcount_bits=1",
        "cluster_size=4k,refcount_bits=2",
        "compat=0.10",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let size = CAPACITY.to_string();
        qemu("qemu-img", folder.path(), &["create", "-q", "-f", "qcow2", "-o", kind, "image", &size]);
        let path = folder.path().join("image");
        let mut random = Random(1);
        let mut expected = vec![0; CAPACITY as usize];
        for phase in 0..2 {
            let image = open(&path);
            for range in clusters(&image) {
                let bytes = some_bytes(&mut random, range.len as usize);
                match random.below(8) {
                    0 => continue,
                    1 => write_disk(&image, range.offset, &bytes).unwrap(),
                    _ => image.write_compressed(range.offset, &bytes).unwrap(),
                }
                expected[range.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
                if phase > 0 && random.below(64) == 0 {
                    image.flush().run().unwrap();
                }
            }
            assert_same(&contents(&image), &expected, kind);
            close(image);
            let checked = qemu("qemu-img", folder.path(), &["check", "-f", "qcow2", "image"]);
            assert!(checked.contains("No errors were found"), "{kind}: {checked}");
            // The program has nothing to say of images with one cluster.
            assert!(checked.contains("% compressed"), "{kind}: {checked}");
            fs::write(folder.path().join("expected"), &expected).unwrap();
            qemu("qemu-img", folder.path(), &["compare", "-f", "qcow2", "-F", "raw", "image", "expected"]);
        }
    }
}

#[test]
fn a_compressed_image_is_about_as_small_as_qemus() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(2);
    let bytes: Vec<u8> =
        (0..CAPACITY).map(|at| if at % 16 < 9 { 7 } else { random.number() as u8 }).collect();
    fs::write(folder.path().join("raw"), &bytes).unwrap();
    qemu("qemu-img", folder.path(), &["convert", "-c", "-f", "raw", "-O", "qcow2", "raw", "theirs"]);
    qemu("qemu-img", folder.path(), &["create", "-q", "-f", "qcow2", "ours", &CAPACITY.to_string()]);
    let image = open(&folder.path().join("ours"));
    for range in clusters(&image) {
        image.write_compressed(range.offset, &bytes[range.offset as usize..range.end() as usize]).unwrap();
    }
    close(image);
    let len = |name| fs::metadata(folder.path().join(name)).unwrap().len() as f64;
    assert!(len("ours") < len("theirs") * 1.05, "{} {}", len("ours"), len("theirs"));
}

#[test]
fn only_whole_clusters_are_compressed() {
    let files = Files::new(memory(), &options(CAPACITY, 16, false));
    let image = files.open(None).unwrap();
    let last = CAPACITY >> 16 << 16;
    for (offset, len) in
        [(0, 0), (0, 65535), (512, 65536), (0, 131_072), (last, 65536), (last, 512), (last + 65536, 1)]
    {
        let refused = image.write_compressed(offset, &vec![1; len]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{offset} {len}");
    }
    image.seal();
    let refused = image.write_compressed(0, &[1; 65536]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
}

/// Two neighbours share a host cluster: one that is gone must not take the other's bytes with it, and both gone leave room.
#[test]
fn a_host_cluster_is_used_again_when_nothing_in_it_is_left() {
    let storage = memory();
    let files = Files::new(storage.clone(), &options(1 << 20, 16, false));
    let image = files.open(None).unwrap();
    let cluster = |value: u8| vec![value; 65536];
    let mut expected = vec![0; 1 << 20];
    let mut write = |image: &Image, index: usize, value: u8| {
        image.write_compressed((index as u64) << 16, &cluster(value)).unwrap();
        expected[index << 16..][..65536].fill(value);
        assert_same(&contents(image), &expected, "after a write");
    };
    write(&image, 0, 1);
    write(&image, 1, 2);
    image.flush().run().unwrap();
    let len = storage.len().unwrap();
    for round in 0..300_u32 {
        write(&image, round as usize % 2, round as u8);
        if round % 3 == 0 {
            image.flush().run().unwrap();
        }
    }
    close(image);
    assert!(storage.len().unwrap() <= len + (8 << 16), "{} of {len}", storage.len().unwrap());
    assert_eq!(check(&storage.bytes()), support::Verdict::default());
}

#[test]
fn a_write_that_failed_leaves_the_old_bytes_and_takes_no_room() {
    let storage = Arc::new(FaultStorage::new(MemStorage::default()));
    let files = Files::new(storage.clone(), &options(1 << 20, 16, false));
    let image = files.open(None).unwrap();
    let mut random = Random(3);
    let old: Vec<u8> = (0..65536).map(|at| if at % 2 == 0 { 0 } else { random.number() as u8 }).collect();
    image.write_compressed(0, &old).unwrap();
    image.flush().run().unwrap();
    let len = storage.len().unwrap();
    for _ in 0..100 {
        storage.fail_writes(1);
        image.write_compressed(0, &old.iter().map(|byte| !byte).collect::<Vec<_>>()).unwrap_err();
        storage.fail_writes(0);
        assert_same(&contents(&image)[..65536], &old, "after a failure");
    }
    image.write_compressed(65536, &old).unwrap();
    close(image);
    assert!(storage.len().unwrap() <= len + 65536, "{} {len}", storage.len().unwrap());
    assert_eq!(check(&storage.bytes()), support::Verdict::default());
}

/// A write of a part of a cluster copies the rest of it: a cluster that is compressed meanwhile would be lost.
#[test]
fn a_cluster_is_compressed_when_no_other_write_is_under_way_in_it() {
    let files = Files::new(memory(), &options(1 << 20, 16, false));
    let image = Arc::new(files.open(None).unwrap());
    let range = ByteRange { offset: 512, len: 512 };
    let guard = blocking(|waker| image.resolve_write(range, waker, &mut Vec::new())).unwrap();
    let other = Arc::clone(&image);
    let packed = std::thread::spawn(move || other.write_compressed(0, &[7; 65536]));
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!packed.is_finished());
    guard.complete().unwrap();
    packed.join().unwrap().unwrap();
    assert_same(&contents(&*image)[..65536], &[7; 65536], "the later one");
}

#[test]
fn a_killed_process_loses_no_compressed_cluster() {
    let storage = memory();
    let files = Files::new(storage.clone(), &options(1 << 20, 16, true));
    let mut expected = vec![0; 1 << 20];
    let mut random = Random(4);
    for round in 0..20_u64 {
        let image = files.open(None).unwrap();
        assert_same(&contents(&image), &expected, "what the one before wrote");
        for index in [round % 16, (round * 7 + 3) % 16] {
            let bytes = some_bytes(&mut random, 65536);
            image.write_compressed(index << 16, &bytes).unwrap();
            expected[(index << 16) as usize..][..65536].copy_from_slice(&bytes);
            if round % 3 == 0 {
                image.flush().run().unwrap();
            }
        }
    }
    close(files.open(None).unwrap());
    assert_eq!(check(&storage.bytes()).errors, Vec::<String>::new());
}
