//! Images that change while a guest writes them: larger disks, other backing files.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::testing::{CrashStorage, FaultStorage, MemStorage, Random};
use block::{Disk, ErrorKind, RawDisk, Storage, read_disk, write_disk};
use qcow2::{CreateOptions, Header, Image, Mode, Parts};
use support::{Files, Hook, Hooked, Verdict, assert_same, check, contents, memory, options};

fn base(len: u64) -> (Vec<u8>, Arc<dyn Disk>) {
    let bytes: Vec<u8> =
        (0..len).map(|at| if at >> 15 & 3 == 3 { 0 } else { (at / 512 + 1) as u8 }).collect();
    let disk = RawDisk::new(Arc::new(MemStorage::from(bytes.clone())), true).unwrap();
    (bytes, Arc::new(disk))
}

fn read_only(files: &Files, backing: Option<Arc<dyn Disk>>) -> Image {
    Image::open(Parts::new(files.image.clone(), backing), Mode::ReadOnly).unwrap()
}

/// What is past the old end must not show, neither of the layer beneath nor of the last cluster.
#[test]
fn a_larger_disk_reads_zeroes_where_it_is_new() {
    for (capacity, extended) in [(300_000 / 512 * 512, true), (300_001, false), (65536, true), (100, false)] {
        let (mut expected, base) = base(600 << 10);
        expected.truncate(capacity as usize);
        let storage = memory();
        let files = Files::new(storage.clone(), &options(capacity, 16, extended));
        let image = files.open(Some(base.clone())).unwrap();
        write_disk(&image, capacity - 50, &[0xaa; 50]).unwrap();
        expected[capacity as usize - 50..].fill(0xaa);
        for larger in [capacity, capacity + 7, 500_000, 2 << 20] {
            image.grow(larger).unwrap();
            expected.resize(larger as usize, 0);
            assert_same(&contents(&image), &expected, &format!("{capacity} to {larger}"));
            let reopened = read_only(&files, Some(base.clone()));
            assert_same(&contents(&reopened), &expected, "from the file");
        }
        write_disk(&image, (2 << 20) - 10, &[3; 10]).unwrap();
        assert_eq!(image.grow(1 << 20).unwrap_err().kind(), ErrorKind::InvalidInput);
        image.flush().run().unwrap();
        assert_eq!(check(&storage.bytes()), Verdict::default());
    }
}

/// However much is beneath: the changes that hide it never are in memory, or in the journal, all at once.
#[test]
fn what_is_beneath_a_larger_disk_is_hidden_piece_by_piece() {
    let (_, base) = base(16 << 20);
    let storage = memory();
    let files = Files::new(storage.clone(), &options(512, 9, false));
    let image = files.open(Some(base.clone())).unwrap();
    image.grow(16 << 20).unwrap();
    let mut expected = vec![0; 16 << 20];
    expected[..512].fill(1);
    assert_same(&contents(&image), &expected, "grown");
    assert_same(&contents(&read_only(&files, Some(base))), &expected, "from the file");
    let longest = files.journal.iter().map(|half| half.len().unwrap()).max().unwrap();
    assert!(longest <= 5000 * 32, "{longest} bytes of journal for 32768 clusters");
    image.flush().run().unwrap();
    assert_eq!(check(&storage.bytes()), Verdict::default());
}

#[test]
fn the_l1_table_moves_when_it_is_too_short() {
    let storage = memory();
    let files = Files::new(storage.clone(), &options(1 << 20, 16, false));
    let image = files.open(None).unwrap();
    write_disk(&image, 5000, &[1; 5000]).unwrap();
    // An L2 table maps 512 MiB, a cluster has room for 8192 of them.
    let capacity = 5 << 40;
    image.grow(capacity).unwrap();
    write_disk(&image, capacity - 4096, &[2; 4096]).unwrap();
    image.flush().run().unwrap();
    drop(image);
    let image = files.open(None).unwrap();
    assert_eq!(image.capacity(), capacity);
    for (offset, value) in [(5000, 1), (1 << 20, 0), (capacity - 4096, 2)] {
        let mut found = [9; 4096];
        read_disk(&image, offset, &mut found).unwrap();
        assert_eq!(found, [value; 4096]);
    }
    assert_eq!(check(&storage.bytes()), Verdict::default());
}

/// The image's length is in the same sector as the place of the tables that map it.
#[test]
fn power_lost_while_growing_leaves_the_old_size_or_the_new_one() {
    let mut sizes = [0; 2];
    for seed in 0..40 {
        let (_, base) = base(3 << 20);
        let storage = Arc::new(CrashStorage::new());
        let files = Files::new(storage.clone(), &CreateOptions { ..options(1 << 20, 16, seed % 2 == 0) });
        let image = files.open(Some(base.clone())).unwrap();
        write_disk(&image, 0, &[7; 4096]).unwrap();
        image.flush().run().unwrap();
        // The power goes after so many syncs.
        let left = (seed / 2 % 10).into();
        let stop = Hook(StopsSyncing { inner: storage.clone(), left, lies: false.into() });
        let parts = Parts::new(Arc::new(stop), Some(base.clone()));
        let image = files.open_parts(parts).unwrap();
        let grown = image.grow(9 << 40);
        let mut random = Random(seed);
        let left = Arc::new(storage.after_power_loss(|| random.below(2) == 0));
        assert_eq!(check(&left.bytes()).errors, Vec::<String>::new());
        let image = Image::open(Parts::new(left, Some(base)), Mode::ReadOnly).unwrap();
        let larger = image.capacity() == 9 << 40;
        assert!(larger || image.capacity() == 1 << 20);
        assert!(larger || grown.is_err());
        sizes[usize::from(larger)] += 1;
        let mut found = [1; 8192];
        read_disk(&image, 0, &mut found).unwrap();
        assert_eq!((found[0], found[4096]), (7, 9));
        if larger {
            read_disk(&image, 2 << 20, &mut found).unwrap();
            assert_eq!(found, [0; 8192]);
        }
    }
    assert!(sizes.iter().all(|count| *count > 3), "{sizes:?}");
}

/// The header may name the longer L1 table then, and what is flushed later goes to the old one.
#[test]
fn a_disk_that_could_not_grow_keeps_what_is_written_later() {
    let storage = Arc::new(CrashStorage::new());
    let files = Files::new(storage.clone(), &options(1 << 20, 16, false));
    let lies = Hook(StopsSyncing { inner: storage.clone(), left: u64::MAX.into(), lies: true.into() });
    let image = files.open_parts(Parts::new(Arc::new(lies), None)).unwrap();
    assert_eq!(image.grow(5 << 40).unwrap_err().kind(), ErrorKind::Io);
    write_disk(&image, 0, &[7; 4096]).unwrap();
    image.flush().run().unwrap();
    let left = Arc::new(storage.after_power_loss(|| true));
    let image = Image::open(Parts::new(left, None), Mode::ReadOnly).unwrap();
    assert_eq!(image.capacity(), 1 << 20);
    let mut found = [0; 4096];
    read_disk(&image, 0, &mut found).unwrap();
    assert_eq!(found, [7; 4096]);
}

#[derive(Debug)]
struct StopsSyncing {
    inner: Arc<CrashStorage>,
    left: std::sync::atomic::AtomicU64,
    /// Whether the next write of the disk's size says that it failed, though it did not.
    lies: std::sync::atomic::AtomicBool,
}

impl Hooked for StopsSyncing {
    fn inner(&self) -> &dyn Storage {
        &*self.inner
    }

    fn write(&self, buf: &[u8], offset: u64) -> block::Result<()> {
        self.inner.write_at(buf, offset)?;
        match offset == 24 && self.lies.swap(false, Ordering::SeqCst) {
            true => Err(block::Error::new(ErrorKind::Io, "injected: written, and said not to be")),
            false => Ok(()),
        }
    }

    fn sync(&self) -> block::Result<()> {
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        left.map_err(|_| block::Error::new(ErrorKind::Io, "injected: no power"))?;
        self.inner.sync()
    }
}

#[test]
fn another_backing_file_is_named_while_the_image_is_written() {
    let storage: Arc<FaultStorage> = memory();
    let files = Files::new(storage.clone(), &options(1 << 20, 16, true));
    let image = files.open(None).unwrap();
    write_disk(&image, 0, &[7; 4096]).unwrap();
    image.set_backing(Some(("elsewhere", "raw"))).unwrap();
    image.flush().run().unwrap();
    let header = Header::read(&*storage).unwrap();
    assert_eq!(header.backing_file.as_deref(), Some("elsewhere"));
    image.set_backing(None).unwrap();
    assert_eq!(Header::read(&*storage).unwrap().backing_file, None);
    assert_eq!(check(&storage.bytes()), Verdict::default());
    image.seal();
    assert_eq!(image.set_backing(None).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(image.grow(2 << 20).unwrap_err().kind(), ErrorKind::ReadOnly);
}
