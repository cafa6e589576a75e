//! The real tools as oracles: what QEMU makes we read and write, what we make QEMU reads and finds no fault with.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block::testing::Random;
use block::{ByteRange, Disk, ErrorKind, Layer, Place, RawDisk, blocking, write_disk};
use hostio::{Cache, HostFile};
use qcow2::{CreateOptions, Header, Image, Journal, Mode, Parts};
use support::{assert_same, contents, memory, open_file, qemu};

const CAPACITY: u64 = 4 << 20;

fn raw(path: &Path) -> Arc<dyn Disk> {
    Arc::new(RawDisk::new(open_file(path, false), true).unwrap())
}

/// Opens `image` for writing, its journal beside it.
fn open_image(image: &Path, backing: Option<Arc<dyn Disk>>) -> Image {
    let journal = ["a", "b"].map(|half| {
        let path = image.with_extension(half);
        fs::OpenOptions::new().create(true).append(true).open(&path).unwrap();
        open_file(&path, true)
    });
    let [a, b] = journal;
    let mode = Mode::Writable(Journal::open(a, b, "boot").unwrap());
    Image::open(Parts::new(open_file(image, true), backing), mode).unwrap()
}

fn scribble(disk: &dyn Disk, expected: &mut [u8], random: &mut Random, count: u64) {
    for _ in 0..count {
        let ByteRange { offset, len } = random.range(disk.capacity());
        let bytes = match random.below(5) {
            0 => {
                let unmap = random.below(2) == 0;
                blocking(|waker| disk.write_zeroes(ByteRange { offset, len }, unmap, waker)).unwrap();
                vec![0; len as usize]
            }
            _ => {
                let bytes = vec![random.number() as u8; len as usize];
                write_disk(disk, offset, &bytes).unwrap();
                bytes
            }
        };
        expected[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
}

/// QEMU finds no error and no leak, and the same bytes as `expected`.
fn assert_qemu_agrees(folder: &Path, image: &str, expected: &[u8]) {
    let checked = qemu("qemu-img", folder, &["check", "-f", "qcow2", image]);
    assert!(checked.contains("No errors were found"), "{checked}");
    fs::write(folder.join("expected"), expected).unwrap();
    qemu("qemu-img", folder, &["compare", "-f", "qcow2", "-F", "raw", image, "expected"]);
}

fn make_base(folder: &Path) -> (PathBuf, Vec<u8>) {
    let bytes: Vec<u8> = (0..CAPACITY).map(|at| (at / 512 + 1) as u8).collect();
    fs::write(folder.join("base"), &bytes).unwrap();
    (folder.join("base"), bytes)
}

#[test]
fn qemu_finds_no_fault_with_our_overlays() {
    for (cluster_bits, extended_l2) in [(16, false), (16, true), (17, true), (21, true), (21, false)] {
        let folder = tempfile::tempdir().unwrap();
        let (base, mut expected) = make_base(folder.path());
        let path = folder.path().join("overlay");
        let backing = Some(("base".to_owned(), "raw".to_owned()));
        let options = CreateOptions { backing, ..CreateOptions::new(CAPACITY, cluster_bits, extended_l2) };
        qcow2::create(&HostFile::create(&path, Cache::Writeback).unwrap(), &options).unwrap();
        assert_qemu_agrees(folder.path(), "overlay", &expected);
        let mut random = Random(u64::from(cluster_bits));
        for phase in 0..4 {
            let image = open_image(&path, Some(raw(&base)));
            scribble(&image, &mut expected, &mut random, 40);
            if phase % 2 == 0 {
                // Killed: what it flushed at some time is without a fault, and the next phase has the rest.
                image.flush().run().unwrap();
                scribble(&image, &mut expected, &mut random, 10);
                drop(image);
                let checked = qemu("qemu-img", folder.path(), &["check", "-f", "qcow2", "overlay"]);
                assert!(checked.contains("No errors were found"), "{checked}");
            } else {
                image.seal();
                image.flush().run().unwrap();
                assert_same(&contents(&image), &expected, "as the process sees it");
                drop(image);
                assert_qemu_agrees(folder.path(), "overlay", &expected);
            }
        }
    }
}

#[test]
fn we_read_and_write_what_qemu_makes() {
    for options in
        ["cluster_size=64k", "cluster_size=128k,extended_l2=on", "cluster_size=2M", "preallocation=metadata"]
    {
        let folder = tempfile::tempdir().unwrap();
        let (base, _) = make_base(folder.path());
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", options];
        let prealloc = options.contains("preallocation");
        if !prealloc {
            arguments.extend(["-b", "base", "-F", "raw"]);
        }
        qemu("qemu-img", folder.path(), &[&arguments[..], &["image", "4M"]].concat());
        let commands = ["write -P 9 5000 70000", "write -z 1M 200k", "write -P 8 3M 4k", "discard 2M 128k"];
        let mut io = vec!["-f", "qcow2"];
        commands.iter().for_each(|command| io.extend(["-c", command]));
        qemu("qemu-io", folder.path(), &[&io[..], &["image"]].concat());
        // A discard of a part of a cluster may do nothing: QEMU is asked what there is now.
        qemu("qemu-img", folder.path(), &["convert", "-f", "qcow2", "-O", "raw", "image", "expected"]);
        let mut expected = fs::read(folder.path().join("expected")).unwrap();
        assert_eq!((expected[5000], expected[1 << 20], expected[3 << 20]), (9, 0, 8));
        let path = folder.path().join("image");
        let backing = || (!prealloc).then(|| raw(&base));
        let header = Header::read(&*open_file(&path, false)).unwrap();
        assert_eq!(header.backing_file.as_deref(), (!prealloc).then_some("base"));
        assert_eq!(header.backing_format.as_deref(), (!prealloc).then_some("raw"));
        let image = Image::open(Parts::new(open_file(&path, false), backing()), Mode::ReadOnly).unwrap();
        assert_same(&contents(&image), &expected, options);
        drop(image);
        let image = open_image(&path, backing());
        scribble(&image, &mut expected, &mut Random(7), 60);
        image.seal();
        image.flush().run().unwrap();
        drop(image);
        assert_qemu_agrees(folder.path(), "image", &expected);
        qemu("qemu-io", folder.path(), &["-f", "qcow2", "-c", "write -P 1 0 1M", "image"]);
        expected[..1 << 20].fill(1);
        assert_qemu_agrees(folder.path(), "image", &expected);
    }
}

#[test]
fn qemu_and_we_draw_the_same_map() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let options = CreateOptions::overlay(CAPACITY, None);
    qcow2::create(&HostFile::create(&path, Cache::Writeback).unwrap(), &options).unwrap();
    let image = open_image(&path, None);
    write_disk(&image, 4096, &[1; 8192]).unwrap();
    write_disk(&image, 1 << 20, &[2; 300_000]).unwrap();
    image.flush().run().unwrap();
    let mut ours = Vec::new();
    let mut offset = 0;
    while offset < CAPACITY {
        let run = image.run_at(ByteRange { offset, len: CAPACITY - offset }).unwrap();
        if let Place::Data(host) = run.place {
            ours.push((offset, run.range.len, host));
        }
        offset = run.range.end();
    }
    drop(image);
    let text = qemu("qemu-img", folder.path(), &["map", "-f", "qcow2", "image"]);
    let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
    let theirs: Vec<(u64, u64, u64)> = text
        .lines()
        .skip(1)
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (number(words[0]), number(words[1]), number(words[2]))
        })
        .collect();
    assert_eq!(ours, theirs);
    assert_eq!(ours.len(), 2);
}

#[test]
fn a_file_that_outgrows_its_refcount_blocks_gets_more() {
    // A block counts 32768 clusters of 64 KiB: 2 GiB. As if a process had been killed that wrote so much in vain, the
    // file is longer than that, and sparse.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let options = CreateOptions::new(3 << 30, 16, true);
    qcow2::create(&HostFile::create(&path, Cache::Writeback).unwrap(), &options).unwrap();
    open_file(&path, true).set_len((4 << 30) - (3 << 16)).unwrap();
    let image = open_image(&path, None);
    for cluster in 0..8 {
        write_disk(&image, cluster << 16, &[1; 2048]).unwrap();
        image.flush().run().unwrap();
    }
    image.seal();
    image.flush().run().unwrap();
    drop(image);
    let checked = qemu("qemu-img", folder.path(), &["check", "-f", "qcow2", "image"]);
    assert!(checked.contains("No errors were found"), "{checked}");
}

#[test]
fn what_we_do_not_have_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let create = |options: &[&str], name: &str| {
        qemu("qemu-img", folder.path(), &[&["create", "-q", "-f", "qcow2"], options, &[name, "1M"]].concat());
        open_file(&folder.path().join(name), true)
    };
    let writable = |storage| {
        let journal = Journal::open(memory(), memory(), "boot").unwrap();
        Image::open(Parts::new(storage, None), Mode::Writable(journal)).unwrap_err()
    };
    let readable = |storage| Image::open(Parts::new(storage, None), Mode::ReadOnly);
    let secret = [
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
    ];
    let storage = create(&secret, "encrypted");
    for error in [writable(storage.clone()), readable(storage).unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("encrypted"), "{error}");
    }
    // Its other half is for the caller to find.
    let storage = create(&["-o", "data_file=data.raw"], "external");
    for error in [writable(storage.clone()), readable(storage).unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("external file"), "{error}");
    }
}

#[test]
fn an_image_that_was_not_closed_is_repaired_before_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    qemu(
        "qemu-img",
        folder.path(),
        &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "image", "4M"],
    );
    let killed = ["-f", "qcow2", "-c", "write -P 5 0 1M", "-c", "flush", "-c", "sigraise 9", "image"];
    Command::new("qemu-io").args(killed).current_dir(folder.path()).output().unwrap();
    let path = folder.path().join("image");
    assert!(qcow2::check(&*open_file(&path, false)).unwrap().short > 0);
    let mut expected = vec![0; CAPACITY as usize];
    expected[..1 << 20].fill(5);
    let image = open_image(&path, None);
    scribble(&image, &mut expected, &mut Random(3), 40);
    image.seal();
    image.flush().run().unwrap();
    drop(image);
    assert_qemu_agrees(folder.path(), "image", &expected);
}

#[test]
fn autoclear_bits_that_we_do_not_know_go_when_we_write() {
    let folder = tempfile::tempdir().unwrap();
    qemu("qemu-img", folder.path(), &["create", "-q", "-f", "qcow2", "image", "1M"]);
    qemu("qemu-img", folder.path(), &["bitmap", "--add", "image", "dirty"]);
    let path = folder.path().join("image");
    open_file(&path, true).write_at(&[0x81], 95).unwrap();
    let autoclear = || fs::read(&path).unwrap()[88..96].to_vec();
    drop(Image::open(Parts::new(open_file(&path, false), None), Mode::ReadOnly).unwrap());
    assert_eq!(autoclear(), [0, 0, 0, 0, 0, 0, 0, 0x81]);
    drop(open_image(&path, None));
    // The one that vouches for the bitmaps stays.
    assert_eq!(autoclear(), [0, 0, 0, 0, 0, 0, 0, 1]);
}
