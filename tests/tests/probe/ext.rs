//! ext2, ext3, ext4 against e2fsprogs.

use snapshot::probe::{FsKind, Verdict};

use crate::disk::Image;
use crate::tools::{ask, run};
use crate::{expect, only};

pub(crate) fn make(kind: &str) -> Image {
    let image = Image::new(16 << 20);
    run("mke2fs", &["-q", "-F", "-t", kind, "-L", "roots", image.path()]);
    image
}

fn edit(image: &Image, command: &str) {
    run("debugfs", &["-w", "-R", command, image.path()]);
}

/// What dumpe2fs says: the state's words, and whether recovery is needed.
fn dump(image: &Image) -> (String, bool) {
    let said = run("dumpe2fs", &["-h", image.path()]);
    (said.field("Filesystem state:"), said.field("Filesystem features:").contains("needs_recovery"))
}

#[test]
fn new_ones_are_clean_by_their_names_and_e2fsck_agrees() {
    for (name, kind) in [("ext2", FsKind::Ext2), ("ext3", FsKind::Ext3), ("ext4", FsKind::Ext4)] {
        let image = make(name);
        let found = expect(&image, kind, Verdict::Clean);
        assert_eq!(found.label.as_deref(), Some("roots"));
        assert_eq!(dump(&image), ("clean".into(), false));
        assert_eq!(ask("e2fsck", &["-fn", image.path()]).status, 0);
        assert_eq!(run("blkid", &["-p", "-o", "value", "-s", "TYPE", image.path()]).text.trim(), name);
    }
}

#[test]
fn one_that_needs_recovery_needs_replay() {
    for name in ["ext3", "ext4"] {
        let image = make(name);
        edit(&image, "feature needs_recovery");
        assert_eq!(dump(&image), ("clean".into(), true));
        assert_eq!(only(&image).verdict, Verdict::Replay);
        // What replay is: e2fsck does it, and nothing else is wrong.
        assert!(ask("e2fsck", &["-fy", image.path()]).status <= 1);
        assert_eq!(only(&image).verdict, Verdict::Clean);
    }
}

#[test]
fn one_that_was_not_unmounted_and_has_no_journal_is_dirty() {
    let image = make("ext2");
    edit(&image, "ssv state 0");
    assert_eq!(dump(&image), ("not clean".into(), false));
    expect(&image, FsKind::Ext2, Verdict::Dirty);
}

#[test]
fn noted_errors_are_dirty_whatever_the_journal_says() {
    let image = make("ext4");
    edit(&image, "ssv state 3");
    assert_eq!(dump(&image), ("clean with errors".into(), false));
    assert_eq!(only(&image).verdict, Verdict::Dirty);
    edit(&image, "feature needs_recovery");
    let found = only(&image);
    assert_eq!(found.verdict, Verdict::Dirty);
    assert!(found.detail.contains("needs_recovery is set"), "{}", found.detail);
}

#[test]
fn deleted_files_that_were_open_are_told_of_a_clean_one() {
    let image = make("ext4");
    edit(&image, "ssv last_orphan 12");
    let found = expect(&image, FsKind::Ext4, Verdict::Clean);
    assert!(found.detail.contains("deleted files"), "{}", found.detail);
}

#[test]
fn a_damaged_super_block_is_dirty() {
    let image = make("ext4");
    image.write(1024 + 0x78, b"other");
    assert_ne!(ask("dumpe2fs", &["-h", image.path()]).status, 0);
    expect(&image, FsKind::Ext4, Verdict::Dirty);
}

#[test]
fn a_journal_of_its_own_is_no_file_system() {
    let image = Image::new(16 << 20);
    run("mke2fs", &["-q", "-F", "-O", "journal_dev", image.path()]);
    assert_eq!(only(&image).verdict, Verdict::Opaque);
}
