//! The file-system probe against the real tools: they make the images, and they judge them too.
//!
//! Where no tool makes a state (a log in use, a dirty bit) it is written into an image that a tool made, and the tools
//! still have to agree on what they see. The tests of `mounted` let the kernel make the states; they need root, loop
//! devices and the kernel's file systems, so they run only when asked for (`--run-ignored all`).

#![allow(clippy::unwrap_used, clippy::panic, reason = "what fails in a test's helper fails the test")]

mod btrfs;
mod disk;
mod ext;
mod fat;
mod fuzz;
mod mounted;
mod ntfs;
mod tables;
mod tools;
mod ufs;
mod xfs;

use disk::Image;
use snapshot::probe::{FsKind, FsVerdict, Verdict};

/// The one verdict on an image that holds one file system and no partition table.
fn only(image: &Image) -> FsVerdict {
    let mut verdicts = image.probe();
    assert_eq!(verdicts.len(), 1, "{verdicts:?}");
    let verdict = verdicts.remove(0);
    assert_eq!((verdict.partition, verdict.offset, verdict.size), (None, 0, image.len()));
    verdict
}

/// The same, with its kind and verdict checked.
fn expect(image: &Image, kind: FsKind, verdict: Verdict) -> FsVerdict {
    let found = only(image);
    assert_eq!((found.kind, found.verdict), (kind, verdict), "{found:?}");
    found
}
