//! UFS: images of NetBSD's makefs; there is no other tool on Linux, so flags are set as the BSDs' kernels do.

use snapshot::probe::{FsKind, Verdict};

use crate::disk::Image;
use crate::expect;
use crate::tools::run;

/// makefs puts both versions' super-block there.
const SUPER_BLOCK: u64 = 8192;
const CLEAN: u64 = SUPER_BLOCK + 209;
const JOURNAL: u64 = SUPER_BLOCK + 864;
const FLAGS: u64 = SUPER_BLOCK + 1312;

pub(crate) fn make(version: u8, byte_order: &str) -> Image {
    let tree = tempfile::tempdir().unwrap();
    std::fs::write(tree.path().join("file"), "content").unwrap();
    let (image, options) = (Image::new(0), format!("version={version}"));
    let tree = tree.path().to_str().unwrap();
    run("makefs", &["-t", "ffs", "-B", byte_order, "-o", &options, "-s", "8m", image.path(), tree]);
    image
}

#[test]
fn new_ones_are_clean_in_either_byte_order() {
    for (version, kind) in [(1, FsKind::Ufs1), (2, FsKind::Ufs2)] {
        for byte_order in ["le", "be"] {
            let image = make(version, byte_order);
            expect(&image, kind, Verdict::Clean);
            let said = run("blkid", &["-p", "-o", "export", image.path()]);
            assert_eq!((said.field("TYPE="), said.field("VERSION=")), ("ufs".into(), version.to_string()));
        }
    }
}

#[test]
fn a_mounted_one_without_a_journal_is_dirty() {
    for version in [1, 2] {
        let image = make(version, "le");
        // FreeBSD's, then NetBSD's value while mounted for writing.
        for clean in [0, 2] {
            image.write(CLEAN, &[clean]);
            assert_eq!(crate::only(&image).verdict, Verdict::Dirty);
        }
    }
}

#[test]
fn a_mounted_one_with_a_journal_needs_replay() {
    // FreeBSD: journaled soft updates.
    let image = make(2, "be");
    image.write(FLAGS, &0x8_u32.to_be_bytes());
    expect(&image, FsKind::Ufs2, Verdict::Clean);
    image.write(CLEAN, &[0]);
    expect(&image, FsKind::Ufs2, Verdict::Replay);
    // NetBSD: WAPBL, version 1, at the end of the partition.
    let image = make(2, "le");
    image.write(CLEAN, &[2]);
    image.write(FLAGS, &0x100_u32.to_le_bytes());
    image.write(JOURNAL, &[1, 1]);
    expect(&image, FsKind::Ufs2, Verdict::Replay);
    // FreeBSD again: the same flag stands for NFSv4 ACLs.
    image.write(JOURNAL, &[0, 0]);
    expect(&image, FsKind::Ufs2, Verdict::Dirty);
}

#[test]
fn one_that_asks_for_fsck_is_dirty_even_if_unmounted() {
    let image = make(2, "le");
    image.write(FLAGS, &0x4_u32.to_le_bytes());
    expect(&image, FsKind::Ufs2, Verdict::Dirty);
}
