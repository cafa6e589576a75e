//! Partition tables against sfdisk, and what is not a file system.

use std::process::{Command, Stdio};

use snapshot::probe::{FsKind, FsVerdict, Verdict};

use crate::disk::Image;
use crate::tools::run;
use crate::{expect, ext, fat, ntfs, only, ufs};

const MIB: u64 = 1 << 20;

/// A disk with the table that the script tells sfdisk to make.
pub(crate) fn make(len: u64, script: &str) -> Image {
    let (image, input) = (Image::new(len), Image::new(0));
    input.write(0, script.as_bytes());
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("sfdisk");
    command.args(["-q", image.path()]).env("PATH", path).stdout(Stdio::null());
    let status = command.stdin(std::fs::File::open(input.path()).unwrap()).status();
    assert!(status.expect("install the Debian package fdisk, which has sfdisk").success());
    image
}

/// Number, first byte, bytes and name of each partition, as sfdisk prints them.
fn listed(image: &Image) -> Vec<(u32, u64, u64, Option<String>)> {
    let said = run("sfdisk", &["--dump", image.path()]).text;
    let lines = said.lines().filter_map(|line| line.strip_prefix(image.path()));
    let partition = |line: &str| {
        let (number, fields) = line.split_once(':').unwrap();
        let field = |key: &str| {
            let found = fields.split(',').find_map(|field| field.trim().strip_prefix(key));
            found.map(|value| value.trim_start_matches('=').trim().trim_matches('"').to_owned())
        };
        let sectors = |key: &str| field(key).unwrap().parse::<u64>().unwrap() * 512;
        // After a path that ends with a digit there is a `p` before the number.
        let number = number.trim().trim_start_matches('p').parse().unwrap();
        (number, sectors("start"), sectors("size"), field("name"))
    };
    lines.map(partition).filter(|(_, _, size, _)| *size > 0).collect()
}

fn places(verdicts: &[FsVerdict]) -> Vec<(u32, u64, u64, Option<String>)> {
    let place = |found: &FsVerdict| Some((found.partition?, found.offset, found.size, found.name.clone()));
    verdicts.iter().filter_map(place).collect()
}

fn kinds(verdicts: &[FsVerdict]) -> Vec<(FsKind, Verdict)> {
    verdicts.iter().map(|found| (found.kind, found.verdict)).collect()
}

/// A GPT disk as guests have them, with something in each partition.
pub(crate) fn gpt() -> Image {
    let script = "label: gpt\n\
        size=1MiB, type=21686148-6449-6E6F-744E-656564454649\n\
        size=17MiB, type=uefi, name=\"EFI System\"\n\
        size=20MiB, name=\"root\"\n\
        size=10MiB, name=\"bsd\"\n\
        size=20MiB, name=\"Basic data partition\"\n\
        size=4MiB, name=\"nothing\"\n";
    let image = make(80 * MIB, script);
    let places = listed(&image);
    for (place, content) in
        places[1..].iter().zip([fat::make("16", 16), ext::make("ext4"), ufs::make(2, "le"), ntfs::make()])
    {
        image.place(place.1, &content);
    }
    image
}

/// Logical partitions between primary ones.
pub(crate) fn mbr() -> Image {
    let script = "label: dos\n1: size=20MiB, type=83\n2: size=30MiB, type=5\n3: size=20MiB, type=7\n\
        5: size=9MiB, type=c\n6: size=17MiB, type=83\n";
    let image = make(80 * MIB, script);
    let places = listed(&image);
    let contents =
        [(1, ext::make("ext3")), (3, ntfs::make()), (5, fat::make("12", 4)), (6, ext::make("ext2"))];
    for (number, content) in contents {
        let place = places.iter().find(|place| place.0 == number).unwrap();
        image.place(place.1, &content);
    }
    image
}

#[test]
fn a_gpt_is_read_as_sfdisk_reads_it() {
    let image = gpt();
    let found = image.probe();
    assert_eq!(places(&found), listed(&image));
    let expected = [
        (FsKind::Reserved, Verdict::Opaque),
        (FsKind::Vfat, Verdict::Clean),
        (FsKind::Ext4, Verdict::Clean),
        (FsKind::Ufs2, Verdict::Clean),
        (FsKind::Ntfs, Verdict::Clean),
        (FsKind::Unknown, Verdict::Unknown),
    ];
    assert_eq!(kinds(&found), expected);
}

#[test]
fn the_second_gpt_serves_where_the_first_is_damaged() {
    for damaged in [512 + 24, 1024 + 56] {
        let image = gpt();
        let whole = image.probe();
        image.write(damaged, b"damage");
        let mut found = image.probe();
        let complaint = found.pop().unwrap();
        assert_eq!(found, whole);
        assert!(complaint.detail.contains("second was used"), "{}", complaint.detail);
    }
}

#[test]
fn a_gpt_without_a_valid_copy_is_told() {
    let image = gpt();
    image.write(512, b"damage");
    image.write(image.len() - 512, b"damage");
    let found = only(&image);
    assert!(found.detail.contains("neither copy"), "{}", found.detail);
}

#[test]
fn an_mbr_with_logical_partitions_is_read_as_sfdisk_reads_it() {
    let image = mbr();
    let found = image.probe();
    let mut listed = listed(&image);
    // The extended partition is only the frame of the logical ones.
    listed.retain(|place| place.0 != 2);
    assert_eq!(places(&found), listed);
    let expected = [
        (FsKind::Ext3, Verdict::Clean),
        (FsKind::Ntfs, Verdict::Clean),
        (FsKind::Vfat, Verdict::Clean),
        (FsKind::Ext2, Verdict::Clean),
    ];
    assert_eq!(kinds(&found), expected);
}

#[test]
fn a_chain_of_logical_partitions_that_bites_its_tail_ends() {
    let image = mbr();
    let first = image.read(446 + 16 + 8, 4);
    let record = u64::from(u32::from_le_bytes(first.try_into().unwrap())) * 512;
    // The second entry leads to the first record again: 0 sectors from the start of the extended partition.
    image.write(record + 446 + 16 + 8, &[0; 4]);
    let found = image.probe();
    assert!(found.len() > 100, "{}", found.len());
    assert_eq!(found.last().unwrap().partition, None);
}

#[test]
fn a_boot_sector_of_a_file_system_is_no_partition_table() {
    for (image, kind) in [(fat::make("16", 32), FsKind::Vfat), (ntfs::make(), FsKind::Ntfs)] {
        // Boot code that could be an entry.
        image.write(446, &[0x80, 1, 1, 0, 0x83, 1, 1, 0, 64, 0, 0, 0, 64, 0, 0, 0]);
        expect(&image, kind, Verdict::Clean);
    }
}

#[test]
fn a_partition_past_the_end_of_the_disk_is_told() {
    let image = make(80 * MIB, "label: dos\nsize=20MiB, type=83\n");
    image.write(446 + 12, &u32::MAX.to_le_bytes());
    let found = image.probe();
    assert_eq!(kinds(&found), [(FsKind::Unknown, Verdict::Unknown)]);
    assert!(found[0].detail.contains("not lie within"), "{}", found[0].detail);
}

#[test]
fn two_signatures_at_once_are_not_guessed_between() {
    let image = ext::make("ext4");
    image.write(0, &fat::make("16", 16).read(0, 512));
    let found = expect(&image, FsKind::Unknown, Verdict::Unknown);
    assert!(found.detail.contains("ext4, vfat"), "{}", found.detail);
}

#[test]
fn swap_is_named() {
    let image = Image::new(MIB);
    run("mkswap", &[image.path()]);
    expect(&image, FsKind::Swap, Verdict::Opaque);
}

#[test]
fn an_empty_disk_has_no_signature() {
    expect(&Image::new(MIB), FsKind::Unknown, Verdict::Unknown);
    // Too small for anything.
    expect(&Image::new(512), FsKind::Unknown, Verdict::Unknown);
}
