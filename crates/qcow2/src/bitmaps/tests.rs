use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use block::testing::{CrashStorage, MemStorage};

use super::*;
use crate::bytes::be64;
use crate::check::check;
use crate::testing::{Stops, qemu};

fn run(folder: &Path, program: &str, arguments: &[&str]) -> String {
    let (text, succeeded) = qemu(folder, program, arguments);
    assert!(succeeded, "{program} {arguments:?}: {text}");
    text
}

/// An image of 4 MiB with a bitmap `one` that follows writes and knows of some, and one `two` that does not.
fn make(folder: &Path, options: &str) -> Vec<u8> {
    run(folder, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "image", "4M"]);
    run(folder, "qemu-img", &["bitmap", "--add", "-g", "4096", "image", "one"]);
    run(folder, "qemu-img", &["bitmap", "--add", "-g", "512", "image", "two"]);
    run(folder, "qemu-io", &["-f", "qcow2", "-c", "write 5000 300000", "-c", "write 3M 4k", "image"]);
    run(folder, "qemu-img", &["bitmap", "--disable", "image", "two"]);
    fs::read(folder.join("image")).unwrap()
}

/// The runs of a bitmap as QEMU reads it: exported by NBD, where what is dirty is shown as a hole.
fn by_qemu(folder: &Path, bytes: &[u8], name: &str) -> Vec<(u64, u64)> {
    fs::write(folder.join("read"), bytes).unwrap();
    let socket = folder.join("socket");
    let arguments = ["-f", "qcow2", "-r", "-t", "-B", name, "-k", socket.to_str().unwrap(), "read"];
    let mut server = Command::new("qemu-nbd").args(arguments).current_dir(folder).spawn().unwrap();
    while !socket.exists() {
        assert!(server.try_wait().unwrap().is_none(), "qemu-nbd does not know '{name}'");
        std::thread::sleep(Duration::from_millis(5));
    }
    let path = socket.display();
    let options =
        format!("driver=nbd,server.type=unix,server.path={path},x-dirty-bitmap=qemu:dirty-bitmap:{name}");
    let text = run(folder, "qemu-img", &["map", "--output=json", "--image-opts", &options]);
    server.kill().unwrap();
    server.wait().unwrap();
    fs::remove_file(socket).unwrap();
    let number = |line: &str, field: &str| {
        let after = line.split(&format!("\"{field}\": ")).nth(1).unwrap();
        after.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse::<u64>().unwrap()
    };
    let dirty = text.lines().filter(|line| line.contains("\"data\": false"));
    dirty.map(|line| (number(line, "start"), number(line, "length"))).collect()
}

/// Whether QEMU says that the bitmap is in use.
fn in_use_by_qemu(folder: &Path, bytes: &[u8], name: &str) -> bool {
    fs::write(folder.join("read"), bytes).unwrap();
    let text = run(folder, "qemu-img", &["info", "-f", "qcow2", "--output=json", "read"]);
    let at = text.find(&format!("\"name\": \"{name}\"")).unwrap();
    let start = text[..at].rfind("\"flags\"").unwrap();
    text[start..at].contains("in-use")
}

fn runs(bitmap: &DirtyBitmap) -> Vec<(u64, u64)> {
    let (mut found, mut offset) = (Vec::new(), 0);
    let all = bitmap.capacity();
    while let Some(run) = bitmap.next_dirty(ByteRange { offset, len: all - offset }) {
        found.push((run.offset, run.len));
        offset = run.end();
    }
    found
}

fn open(storage: &dyn Storage) -> Bitmaps {
    let header = Header::read(storage).unwrap();
    let mut places = std::collections::HashSet::new();
    let bitmaps = Bitmaps::open(storage, &header, |at, count| {
        let size = header.geometry().cluster_size();
        assert!((0..count).all(|n| places.insert(at.0 + n * size)), "{at:?}");
        Ok(())
    });
    bitmaps.unwrap().unwrap()
}

/// Takes clusters at the end of the file, and counts them where there is a refcount block.
struct TestRoom<'a>(&'a dyn Storage);

impl TestRoom<'_> {
    fn count(&self, at: HostOffset, clusters: u64, value: u64) {
        let header = Header::read(self.0).unwrap();
        let (width, size) = (header.refcount_width(), header.geometry().cluster_size());
        for cluster in (at.0 / size..).take(clusters as usize) {
            let mut entry = [0; 8];
            let index = cluster / width.per_block(size);
            self.0.read_at(&mut entry, header.refcount_table.0 + index * 8).unwrap();
            let block = be64(&entry, 0);
            assert_ne!(block, 0, "the test's image is too large");
            let mut bytes = vec![0; size as usize];
            self.0.read_at(&mut bytes, block).unwrap();
            width.set(&mut bytes, (cluster % width.per_block(size)) as usize, value).unwrap();
            self.0.write_at(&bytes, block).unwrap();
        }
    }
}

impl Room for TestRoom<'_> {
    fn take(&mut self, count: u64) -> Result<HostOffset> {
        let size = Header::read(self.0).unwrap().geometry().cluster_size();
        let at = self.0.len()?.next_multiple_of(size);
        self.0.set_len(at + count * size)?;
        self.count(HostOffset(at), count, 1);
        Ok(HostOffset(at))
    }

    fn settle(&mut self) -> Result<()> {
        self.0.sync()
    }

    fn give_back(&mut self, at: HostOffset, count: u64) -> Result<()> {
        self.count(at, count, 0);
        Ok(())
    }
}

const OPTIONS: [&str; 3] = ["cluster_size=64k", "cluster_size=512", "cluster_size=16k,extended_l2=on"];

#[test]
fn what_qemu_recorded_we_know_and_go_on_from() {
    let folder = tempfile::tempdir().unwrap();
    for options in OPTIONS {
        let storage = MemStorage::from(make(folder.path(), options));
        let bitmaps = open(&storage);
        assert_eq!(bitmaps.tracked.len(), 1, "{options}");
        let expected = by_qemu(folder.path(), &storage.bytes(), "one");
        assert_eq!(runs(&bitmaps.tracked[0]), expected, "{options}");
        let other = by_qemu(folder.path(), &storage.bytes(), "two");
        bitmaps.begin(&storage).unwrap();
        assert!(in_use_by_qemu(folder.path(), &storage.bytes(), "one"));
        assert!(!in_use_by_qemu(folder.path(), &storage.bytes(), "two"));
        assert_eq!(open(&storage).tracked.len(), 0, "in use is never trusted");
        // All of it but a part, so that there are clusters of ones, of zeroes and of both.
        bitmaps.mark(ByteRange { offset: 1 << 20, len: 3 << 20 });
        bitmaps.store(&storage, 4 << 20, &mut TestRoom(&storage)).unwrap();
        let bytes = storage.bytes();
        assert_eq!(by_qemu(folder.path(), &bytes, "one"), runs(&bitmaps.tracked[0]), "{options}");
        assert_eq!(by_qemu(folder.path(), &bytes, "two"), other, "{options}");
        assert!(!in_use_by_qemu(folder.path(), &bytes, "one"));
        assert_eq!(check(&storage).unwrap(), Default::default(), "{options}");
        run(folder.path(), "qemu-img", &["check", "-q", "-f", "qcow2", "read"]);
        assert_eq!(runs(&open(&storage).tracked[0]), runs(&bitmaps.tracked[0]));
        // QEMU goes on, with both of them.
        run(folder.path(), "qemu-io", &["-f", "qcow2", "-c", "write 400k 4k", "read"]);
        let after = MemStorage::from(fs::read(folder.path().join("read")).unwrap());
        let again = open(&after);
        assert!(runs(&again.tracked[0]).contains(&(400 << 10, 4096)), "{options}");
    }
}

#[test]
fn bitmaps_grow_with_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    for options in OPTIONS {
        let storage = MemStorage::from(make(folder.path(), options));
        let bitmaps = open(&storage);
        let other = by_qemu(folder.path(), &storage.bytes(), "two");
        bitmaps.begin(&storage).unwrap();
        bitmaps.grow(&storage, 5 << 20).unwrap();
        let grown = MemStorage::from(grow_header(&storage.bytes(), 5 << 20));
        bitmaps.mark(ByteRange { offset: (5 << 20) - 1, len: 1 });
        bitmaps.store(&grown, 5 << 20, &mut TestRoom(&grown)).unwrap();
        assert_eq!(check(&grown).unwrap(), Default::default(), "{options}");
        let bytes = grown.bytes();
        assert_eq!(by_qemu(folder.path(), &bytes, "one"), runs(&bitmaps.tracked[0]), "{options}");
        assert_eq!(runs(&bitmaps.tracked[0]).last(), Some(&((5 << 20) - 4096, 4096)));
        assert_eq!(by_qemu(folder.path(), &bytes, "two"), other, "{options}");
        run(folder.path(), "qemu-img", &["check", "-q", "-f", "qcow2", "read"]);
    }
}

/// The image with a larger capacity, and an L1 table at the end of the file that has room for it.
fn grow_header(bytes: &[u8], capacity: u64) -> Vec<u8> {
    let storage = MemStorage::from(bytes.to_vec());
    let header = Header::read(&storage).unwrap();
    let size = header.geometry().cluster_size();
    let grown = Header { capacity, ..header.clone() };
    let entries = grown.geometry().tables().max(u64::from(header.l1_entries));
    let mut room = TestRoom(&storage);
    let at = room.take((entries * 8).div_ceil(size)).unwrap();
    let mut l1 = vec![0; header.l1_entries as usize * 8];
    storage.read_at(&mut l1, header.l1.0).unwrap();
    storage.write_at(&l1, at.0).unwrap();
    crate::header_update::write_mapping(&storage, capacity, at, entries as u32).unwrap();
    room.give_back(header.l1, (u64::from(header.l1_entries) * 8).div_ceil(size)).unwrap();
    storage.bytes()
}

#[test]
fn a_loss_of_power_leaves_bitmaps_that_are_true_or_in_use() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), "qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "image", "4M"]);
    run(folder.path(), "qemu-img", &["bitmap", "--add", "-g", "512", "image", "one"]);
    run(folder.path(), "qemu-io", &["-f", "qcow2", "-c", "write 5000 3000", "image"]);
    let image = fs::read(folder.path().join("image")).unwrap();
    let mut random = 7_u64;
    let mut seen = [0; 2];
    for steps in 0.. {
        let inner = Arc::new(CrashStorage::new());
        inner.write_at(&image, 0).unwrap();
        inner.sync().unwrap();
        let bitmaps = open(&*inner);
        bitmaps.begin(&*inner).unwrap();
        // The first cluster of its data becomes all ones, and is not needed any more; the second one is new.
        bitmaps.mark(ByteRange { offset: 0, len: 2 << 20 });
        bitmaps.mark(ByteRange { offset: 3 << 20, len: 9 });
        let truth = runs(&bitmaps.tracked[0]);
        let storage = Stops::new(inner.clone(), steps);
        // The room does not fail, but for its syncs: what it takes may be lost.
        let done = bitmaps.store(&storage, 4 << 20, &mut StoppingRoom(&inner, &storage)).is_ok();
        for keep in 0..24 {
            let left = inner.after_power_loss(|| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                keep == 1 || (keep > 1 && random >> 60 & 1 == 1)
            });
            let report = check(&left).unwrap();
            assert_eq!((report.broken, report.short), (0, 0), "{steps} {keep}: {report:?}");
            let found = open(&left);
            seen[found.tracked.len()] += 1;
            assert!(found.tracked.iter().all(|bitmap| runs(bitmap) == truth), "{steps} {keep}");
        }
        if done {
            assert_eq!(open(&inner.after_power_loss(|| false)).tracked.len(), 1, "saved, and not durable");
            break;
        }
    }
    assert!(seen[0] > 10 && seen[1] > 0, "{seen:?}");
}

struct StoppingRoom<'a>(&'a CrashStorage, &'a Stops);

impl Room for StoppingRoom<'_> {
    fn take(&mut self, count: u64) -> Result<HostOffset> {
        TestRoom(self.0).take(count)
    }

    fn settle(&mut self) -> Result<()> {
        self.1.sync()
    }

    fn give_back(&mut self, at: HostOffset, count: u64) -> Result<()> {
        TestRoom(self.0).give_back(at, count)
    }
}

#[test]
fn what_frazil_does_not_know_is_kept_and_never_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let image = make(folder.path(), "cluster_size=64k");
    let position = |name: &str| {
        let header = Header::read(&MemStorage::from(image.clone())).unwrap();
        let directory = Directory::read(&MemStorage::from(image.clone()), &header).unwrap().unwrap();
        directory.entries.iter().find(|entry| entry.name == name).unwrap().position as usize
    };
    for (what, at, value) in
        [("type", 16, 2), ("flags", 12, 0x80), ("granularity small", 17, 8), ("granularity large", 17, 63)]
    {
        for name in ["one", "two"] {
            let mut bytes = image.clone();
            bytes[position(name) + at] = value;
            let storage = MemStorage::from(bytes.clone());
            let bitmaps = open(&storage);
            assert_eq!(bitmaps.tracked.len(), usize::from(name != "one"), "{what}");
            bitmaps.begin(&storage).unwrap();
            bitmaps.grow(&storage, 1 << 30).unwrap();
            bitmaps.grow(&storage, 4 << 20).unwrap();
            let flags = position(name) + 15;
            // It should have followed the writes: from now on it says itself that it did not.
            assert_eq!(storage.bytes()[flags], bytes[flags] | u8::from(name == "one"), "{what} {name}");
        }
    }
}
