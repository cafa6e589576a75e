//! States that the kernel makes: mounted and written, frozen, unmounted.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use snapshot::probe::{FsKind, Verdict};

use crate::disk::{Image, copy};
use crate::tools::{ask, run};
use crate::{btrfs, expect, ext, only, xfs};

/// An image, mounted; unmounted when dropped, thawed before.
struct Mounted {
    image: Image,
    folder: tempfile::TempDir,
}

impl Mounted {
    fn new(image: Image) -> Self {
        let folder = tempfile::tempdir().unwrap();
        run("mount", &["-o", "loop", image.path(), folder.path().to_str().unwrap()]);
        Self { image, folder }
    }

    fn path(&self) -> &str {
        self.folder.path().to_str().unwrap()
    }

    /// Makes some files; the last one is synced by itself, so that a log has something to replay.
    fn work(&self, files: usize) {
        for number in 0..files {
            std::fs::write(self.folder.path().join(format!("file-{number}")), "content").unwrap();
        }
        let mut file = File::create(self.folder.path().join("synced")).unwrap();
        file.write_all(&[7; 9000]).unwrap();
        file.sync_all().unwrap();
    }

    fn now(&self) -> Image {
        copy(Path::new(self.image.path()))
    }

    fn frozen(&self) -> Image {
        run("fsfreeze", &["-f", self.path()]);
        let image = self.now();
        run("fsfreeze", &["-u", self.path()]);
        image
    }

    fn unmount(self) -> Image {
        run("umount", &[self.path()]);
        copy(Path::new(self.image.path()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        ask("fsfreeze", &["-u", self.path()]);
        ask("umount", &[self.path()]);
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn ext4_needs_replay_while_mounted_and_none_frozen_or_unmounted() {
    let mounted = Mounted::new(ext::make("ext4"));
    mounted.work(20);
    expect(&mounted.now(), FsKind::Ext4, Verdict::Replay);
    let frozen = mounted.frozen();
    expect(&frozen, FsKind::Ext4, Verdict::Clean);
    assert_eq!(ask("e2fsck", &["-fn", frozen.path()]).status, 0);
    expect(&mounted.unmount(), FsKind::Ext4, Verdict::Clean);
}

#[test]
#[ignore = "needs root, loop devices and the kernel's xfs"]
fn xfs_needs_replay_while_mounted_and_none_frozen_or_unmounted() {
    let mounted = Mounted::new(xfs::make(&[]));
    // Enough rounds for the log to grow past what is searched at once.
    for round in 0..5 {
        mounted.work(300 * round + 20);
        expect(&mounted.now(), FsKind::Xfs, Verdict::Replay);
        let frozen = mounted.frozen();
        let found = expect(&frozen, FsKind::Xfs, Verdict::Clean);
        assert!(found.detail.contains("covered"), "{}", found.detail);
    }
    let unmounted = mounted.unmount();
    let found = expect(&unmounted, FsKind::Xfs, Verdict::Clean);
    assert!(found.detail.contains("unmount record"), "{}", found.detail);
    assert_eq!(ask("xfs_repair", &["-n", unmounted.path()]).status, 0);
}

#[test]
#[ignore = "needs root, loop devices and the kernel's xfs"]
fn a_mount_recovers_a_frozen_xfs_to_one_that_xfs_repair_finds_clean() {
    let mounted = Mounted::new(xfs::make(&[]));
    mounted.work(100);
    let frozen = mounted.frozen();
    // The copy has the same identity, and the kernel mounts only one of them.
    drop(mounted);
    let replayed = Mounted::new(frozen).unmount();
    assert_eq!(ask("xfs_repair", &["-n", replayed.path()]).status, 0);
    expect(&replayed, FsKind::Xfs, Verdict::Clean);
}

#[test]
#[ignore = "needs root, loop devices and the kernel's btrfs"]
fn btrfs_needs_replay_after_an_fsync_and_none_frozen_or_unmounted() {
    let mounted = Mounted::new(btrfs::make());
    mounted.work(20);
    expect(&mounted.now(), FsKind::Btrfs, Verdict::Replay);
    let frozen = mounted.frozen();
    expect(&frozen, FsKind::Btrfs, Verdict::Clean);
    assert_eq!(ask("btrfs", &["check", frozen.path()]).status, 0);
    expect(&mounted.unmount(), FsKind::Btrfs, Verdict::Clean);
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_physical_volume_of_lvm_is_named() {
    let image = Image::new(16 << 20);
    let device = run("losetup", &["-f", "--show", image.path()]).text.trim().to_owned();
    let made = ask("pvcreate", &["--devices", &device, &device]);
    run("losetup", &["-d", &device]);
    assert_eq!(made.status, 0, "{}", made.text);
    let found = only(&image);
    assert_eq!((found.kind, found.verdict), (FsKind::Lvm, Verdict::Opaque));
}
