//! Persistent dirty bitmaps of QEMU's: kept up while we write, believed by QEMU afterwards, and never when we were killed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::{ByteRange, Disk, ErrorKind, Storage, blocking, write_disk};
use hostio::{Cache, HostFile, Open};
use qcow2::{Image, Journal, Mode, Parts};
use support::memory;

const CAPACITY: u64 = 8 << 20;
const GRANULARITY: u64 = 64 << 10;

fn qemu(program: &str, folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(folder).output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// An image with a bitmap that follows writes, of which QEMU wrote the first piece.
fn image() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let size = CAPACITY.to_string();
    qemu("qemu-img", folder.path(), &["create", "-q", "-f", "qcow2", "image", &size]);
    qemu("qemu-img", folder.path(), &["bitmap", "--add", "-g", "64k", "image", "dirty"]);
    qemu("qemu-io", folder.path(), &["-f", "qcow2", "-c", "write -P 1 0 4k", "image"]);
    folder
}

fn open(folder: &Path) -> Image {
    let open = Open { writable: true, cache: Cache::Writeback };
    let storage: Arc<dyn Storage> = Arc::new(HostFile::open(&folder.join("image"), open).unwrap());
    let journal = Journal::open(memory(), memory(), "boot").unwrap();
    Image::open(Parts::new(storage, None), Mode::Writable(journal)).unwrap()
}

/// The granules that QEMU takes for dirty.
fn dirty(folder: &Path) -> Vec<u64> {
    let script = r#"
qemu-nbd -f qcow2 -B dirty -x q -k "$PWD/socket" image &
for i in $(seq 100); do [ -S socket ] && break; sleep 0.05; done
qemu-img map --output=json --image-opts \
  driver=nbd,export=q,server.type=unix,server.path=socket,x-dirty-bitmap=qemu:dirty-bitmap:dirty
kill $! 2>/dev/null; wait $!; rm -f socket
"#;
    let output = Command::new("bash").args(["-c", script]).current_dir(folder).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut found = Vec::new();
    // One run a line: `"data": false` is what the bitmap says is dirty.
    for line in text.lines().filter(|line| line.contains("\"data\": false")) {
        let number = |name: &str| -> u64 {
            let (_, rest) = line.split_once(&format!("\"{name}\": ")).unwrap();
            rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
        };
        let (start, len) = (number("start"), number("length"));
        found.extend(start / GRANULARITY..(start + len).div_ceil(GRANULARITY));
    }
    assert!(text.contains("start"), "{text} {}", String::from_utf8_lossy(&output.stderr));
    found
}

#[test]
fn what_we_write_is_dirty_for_qemu() {
    let folder = image();
    assert_eq!(dirty(folder.path()), [0]);
    let image = open(folder.path());
    assert_eq!(image.close().unwrap_err().kind(), ErrorKind::Busy);
    write_disk(&image, 3 * GRANULARITY + 100, &[1; 10]).unwrap();
    // In place, by zeroes, and by a discard.
    write_disk(&image, 5, &[1; 10]).unwrap();
    let range = |offset| ByteRange { offset, len: 512 };
    blocking(|waker| image.write_zeroes(range(7 * GRANULARITY - 256), true, waker)).unwrap();
    blocking(|waker| image.discard(range(11 * GRANULARITY), waker)).unwrap();
    image.seal();
    image.flush().run().unwrap();
    image.close().unwrap();
    image.close().unwrap();
    drop(image);
    let expected = [0, 3, 6, 7, 11];
    assert_eq!(dirty(folder.path()), expected);
    let checked = qemu("qemu-img", folder.path(), &["check", "-f", "qcow2", "image"]);
    assert!(checked.contains("No errors were found"), "{checked}");
    // QEMU goes on with it, and so do we; a disk that has grown meanwhile too.
    qemu("qemu-io", folder.path(), &["-f", "qcow2", "-c", "write -P 1 1M 4k", "image"]);
    let image = open(folder.path());
    image.grow(2 * CAPACITY).unwrap();
    write_disk(&image, 2 * CAPACITY - 512, &[1; 512]).unwrap();
    image.seal();
    image.flush().run().unwrap();
    image.close().unwrap();
    drop(image);
    assert_eq!(dirty(folder.path()), [&expected[..], &[16, 255]].concat());
    let checked = qemu("qemu-img", folder.path(), &["check", "-f", "qcow2", "image"]);
    assert!(checked.contains("No errors were found"), "{checked}");
}

#[test]
fn a_bitmap_of_a_killed_writer_is_not_believed() {
    let folder = image();
    let image = open(folder.path());
    write_disk(&image, 3 * GRANULARITY, &[1; 512]).unwrap();
    image.flush().run().unwrap();
    drop(image);
    let info = qemu("qemu-img", folder.path(), &["info", "image"]);
    assert!(info.contains("in-use"), "{info}");
    // Also not after we have closed it properly the next time.
    let image = open(folder.path());
    image.seal();
    image.flush().run().unwrap();
    image.close().unwrap();
    drop(image);
    assert!(qemu("qemu-img", folder.path(), &["info", "image"]).contains("in-use"));
}
