//! Images from an untrusted hand: an error or bytes, never a panic, and never memory out of proportion.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;

use block::testing::{MemStorage, Random};
use block::{ByteRange, Disk, ErrorKind, blocking, read_disk, write_disk};
use qcow2::{CreateOptions, Header, Image, Journal, Mode, Parts};
use support::{Files, memory, options};

/// An image with data in it, cleanly closed.
fn valid(extended: bool) -> Vec<u8> {
    let storage = memory();
    let backing = Some(("base".to_owned(), "raw".to_owned()));
    let files = Files::new(storage.clone(), &CreateOptions { backing, ..options(1 << 20, 16, extended) });
    let image = files.open(None).unwrap();
    write_disk(&image, 0, &[7; 70_000]).unwrap();
    write_disk(&image, 500_000, &[8; 512]).unwrap();
    image.flush().run().unwrap();
    storage.bytes()
}

fn open(bytes: &[u8], writable: bool) -> block::Result<Image> {
    let mode = match writable {
        true => Mode::Writable(Journal::open(memory(), memory(), "boot")?),
        false => Mode::ReadOnly,
    };
    Image::open(Parts::new(Arc::new(MemStorage::from(bytes.to_vec())), None), mode)
}

fn with(bytes: &[u8], at: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + value.len()].copy_from_slice(value);
    bytes
}

#[test]
fn a_malformed_header_is_refused() {
    let image = valid(true);
    let (corrupt, unsupported) = (ErrorKind::Corrupt, ErrorKind::Unsupported);
    for (what, at, value, kind) in [
        ("magic", 0, &[0; 4][..], corrupt),
        ("version", 4, &[0, 0, 0, 4], unsupported),
        ("name offset", 8, &[0xff; 8], corrupt),
        ("name offset past the cluster", 8, &[0, 0, 0, 0, 0, 1, 0, 0], corrupt),
        ("name length", 16, &[0, 0, 4, 0], corrupt),
        ("cluster_bits small", 20, &[0, 0, 0, 8], corrupt),
        ("cluster_bits too small for subclusters", 20, &[0, 0, 0, 13], corrupt),
        ("cluster_bits large", 20, &[0, 0, 0, 22], corrupt),
        ("size huge", 24, &[0xff; 8], corrupt),
        ("size more than L1 maps", 24, &[0, 0, 1, 0, 0, 0, 0, 0], corrupt),
        ("AES", 32, &[0, 0, 0, 1], unsupported),
        ("no L1", 36, &[0; 4], corrupt),
        ("L1 at the header", 40, &[0; 8], corrupt),
        ("L1 not aligned", 40, &[0, 0, 0, 0, 0, 3, 2, 0], corrupt),
        ("L1 past the end", 40, &[0, 0, 0, 1, 0, 0, 0, 0], corrupt),
        ("L1 overflows", 40, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], corrupt),
        ("refcount table huge", 56, &[0, 0, 1, 0], corrupt),
        ("LUKS", 32, &[0, 0, 0, 2], unsupported),
        ("compression type without its bit", 79, &[0x18], corrupt),
        ("snapshots past the end", 60, &[0, 0, 0, 1, 0, 0, 1], corrupt),
        ("snapshots at the header", 60, &[0, 0, 0, 1], corrupt),
        ("name inside the header", 8, &[0, 0, 0, 0, 0, 0, 0, 100], corrupt),
        ("unknown feature", 72, &[0x80], unsupported),
        ("refcount_order", 99, &[7], corrupt),
        ("header_length small", 103, &[80], corrupt),
        ("header_length odd", 103, &[105], corrupt),
        ("extension too long", 108, &[0xff; 4], corrupt),
    ] {
        let bytes = with(&image, at, value);
        let error = Header::read(&MemStorage::from(bytes.clone())).map(|header| panic!("{what}: {header:?}"));
        assert_eq!(error.unwrap_err().kind(), kind, "{what}");
        assert_eq!(open(&bytes, false).unwrap_err().kind(), kind, "{what}");
    }
    for len in [0, 71, 90, 104, 110] {
        assert_eq!(open(&image[..len], false).unwrap_err().kind(), ErrorKind::Corrupt, "cut to {len}");
    }
}

#[test]
fn what_only_writing_would_hurt_is_refused_for_writing() {
    let image = valid(true);
    let table = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
    for (what, at, value, word) in [
        ("corrupt", 79, &[0x12][..], "qemu-img check -r"),
        ("snapshots", 60, &[0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0], "snapshot's L1"),
        ("refcount table at the header", 48, &[0; 8], "overlap"),
        ("refcount table at L1", 48, &image[40..48], "overlap"),
        ("refcount block at L1", table, &image[40..48], "overlap"),
        ("refcount block past the end", table, &[0x0f; 8], "no block"),
    ] {
        let bytes = with(&image, at, value);
        assert!(open(&bytes, false).is_ok(), "{what}");
        let error = open(&bytes, true).unwrap_err();
        assert!(error.to_string().contains(word), "{what}: {error}");
    }
}

#[test]
fn tables_that_lie_are_found_out() {
    let image = valid(true);
    let l1 = u64::from_be_bytes(image[40..48].try_into().unwrap()) as usize;
    let l2 = (u64::from_be_bytes(image[l1..l1 + 8].try_into().unwrap()) & !(1 << 63)) as usize;
    let read =
        |bytes: &[u8], writable| open(bytes, writable).and_then(|image| read_disk(&image, 0, &mut [0; 512]));
    for (what, at, value) in [
        ("L2 past the end", l1, &[0x80, 0, 0, 1, 0, 0, 0, 0][..]),
        ("L2 not aligned", l1 + 6, &[2]),
        ("L1 reserved bits", l1 + 7, &[1]),
        ("data past the end", l2, &[0x80, 0, 0, 1, 0, 0, 0, 0]),
        ("data not aligned", l2 + 6, &[2]),
        ("reserved bits", l2 + 7, &[4]),
        ("data nowhere", l2, &[0; 8]),
        ("zero and data", l2 + 8, &[0xff; 8]),
    ] {
        let bytes = with(&image, at, value);
        assert_eq!(read(&bytes, false).unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
    }
    // A guest must not get to write the tables that say where its own bytes are.
    for at in [40, 48] {
        let mut table = image[at..at + 8].to_vec();
        table[0] |= 0x80;
        assert_eq!(read(&with(&image, l2, &table), true).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    // What is not marked as the image's own may be another's too: it is written elsewhere.
    let mut unshared = image.clone();
    unshared[l2] &= 0x7f;
    let writable = open(&unshared, true).unwrap();
    write_disk(&writable, 0, &[1]).unwrap();
    let mut found = [0; 2];
    read_disk(&writable, 0, &mut found).unwrap();
    assert_eq!(found, [1, 7]);
}

#[test]
fn random_damage_never_panics() {
    let images = [valid(true), valid(false)];
    let mut random = Random(1);
    for round in 0..1500 {
        let mut bytes = images[round % 2].clone();
        // Where the tables are: most of the rest is data.
        for _ in 0..1 + random.below(4) {
            let cluster = random.below(bytes.len() as u64 / 65536) << 16;
            let reach = [112, 512][random.below(2) as usize];
            let at = (cluster + random.below(reach)) as usize;
            bytes[at] = [0, 0xff, 0x80, 1, random.number() as u8][random.below(5) as usize];
        }
        let Ok(image) = open(&bytes, random.below(2) == 0) else { continue };
        let capacity = image.capacity().min(1 << 20);
        for _ in 0..4 {
            let ByteRange { offset, len } = random.range(capacity);
            let _ = read_disk(&image, offset, &mut vec![0; len as usize]);
            let _ = write_disk(&image, offset, &vec![1; len as usize]);
            let _ = blocking(|waker| image.write_zeroes(ByteRange { offset, len }, true, waker));
        }
        let _ = image.flush().run();
    }
}

#[test]
fn a_journal_of_another_image_is_refused() {
    let [one, other] =
        [1_u64 << 20, 4 << 20].map(|capacity| Files::new(memory(), &options(capacity, 16, true)));
    write_disk(&other.open(None).unwrap(), 3 << 20, &[1; 512]).unwrap();
    let mixed = Files { image: one.image.clone(), journal: other.journal.clone() };
    assert_eq!(mixed.open(None).unwrap_err().kind(), ErrorKind::Corrupt);
}

/// Records that fit together in themselves, and place data where the image can have none.
#[test]
fn a_journal_that_places_data_nowhere_is_refused() {
    for host in [u64::MAX << 16, 1 << 62, 1 << 56, 1 << 50, 1 << 24, (1 << 16) + 512, 1 << 16, 0] {
        let files = Files::new(memory(), &options(1 << 20, 16, true));
        write_disk(&files.open(None).unwrap(), 0, &[1; 4096]).unwrap();
        let half = &files.journal[0];
        let mut header = [0; 88];
        half.read_at(&mut header, 0).unwrap();
        let word = if host == 0 { 0 } else { host | 1 << 63 };
        let body = [&[0_u64, word, 1].map(u64::to_be_bytes).concat()[..], &[0; 4]].concat();
        let mut crc =
            crc32fast::Hasher::new_with_initial(u32::from_be_bytes(header[80..84].try_into().unwrap()));
        crc.update(&body);
        half.write_at(&[&body[..], &crc.finalize().to_be_bytes()].concat(), 88).unwrap();
        assert_eq!(files.open(None).unwrap_err().kind(), ErrorKind::Corrupt, "{host:#x}");
    }
}

#[test]
fn ranges_past_the_end_and_files_in_use_are_refused() {
    let files = Files::new(memory(), &options(1_000_001, 16, true));
    let image = files.open(None).unwrap();
    assert_eq!(write_disk(&image, 1_000_000, &[1; 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(read_disk(&image, u64::MAX, &mut [0; 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
    write_disk(&image, 1_000_000, &[1]).unwrap();
    let again = qcow2::create(&*files.image, &CreateOptions::overlay(512, None));
    assert_eq!(again.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(files.image.len().unwrap() > 0);
}

/// A write that goes on into a part of the disk that can not be read fails, and takes no room with it each time.
#[test]
fn writes_that_fail_at_a_broken_table_take_no_room() {
    // A table of such an image maps 512 MiB; a slice of it 32.
    let storage = memory();
    let files = Files::new(storage.clone(), &options(1 << 30, 16, false));
    let image = files.open(None).unwrap();
    write_disk(&image, (32 << 20) - 65536, &[7; 65536 + 512]).unwrap();
    image.flush().run().unwrap();
    let mut bytes = storage.bytes();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = word(&bytes, word(&bytes, 40) as usize) as usize & 0x00ff_ffff_ffff_fe00;
    bytes = with(&bytes, l2 + 4096, &(1_u64 << 63 | 1 << 40).to_be_bytes());
    let broken = Arc::new(MemStorage::from(bytes));
    let image = Files { image: broken.clone(), journal: [memory(), memory()] }.open(None).unwrap();
    let end = broken.bytes().len();
    for _ in 0..100 {
        let error = write_disk(&image, (32 << 20) - 131_072, &[8; 196_608]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    write_disk(&image, 0, &[9; 65536]).unwrap();
    assert_eq!(broken.bytes().len(), end + 65536);
}
