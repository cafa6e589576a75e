use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use block::testing::{FaultStorage, MemStorage};
use block::{RawDisk, Storage, read_disk};
use qcow2::{CreateOptions, Journal, Mode, Parts};

use super::*;

const GRAIN: usize = super::GRAIN as usize;
const SIZE: usize = 9 << 20;

fn raw(bytes: &[u8]) -> (Arc<MemStorage>, Arc<dyn Disk>) {
    let storage = Arc::new(MemStorage::from(bytes.to_vec()));
    (Arc::clone(&storage), Arc::new(RawDisk::new(storage, false).unwrap()))
}

fn content(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.capacity() as usize];
    read_disk(disk, 0, &mut bytes).unwrap();
    bytes
}

/// Bytes of all kinds: runs of zeroes, single bytes, a ragged end.
fn bytes() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    bytes[5 * GRAIN + 7] = 1;
    bytes[PIECE as usize - 1..PIECE as usize + 2 * GRAIN].fill(2);
    bytes[WINDOW as usize - 5..WINDOW as usize + 5].fill(3);
    *bytes.last_mut().unwrap() = 4;
    bytes
}

fn run(copy: &mut DiskCopy) -> u64 {
    let mut copied = 0;
    while let Some(len) = copy.step(u64::MAX).unwrap() {
        copied += len;
    }
    copied
}

#[test]
fn a_whole_disk_is_copied_over_whatever_was_there() {
    let (_, source) = raw(&bytes());
    let (_, target) = raw(&[9; SIZE]);
    let mut copy = DiskCopy::new(source, Arc::clone(&target), None);
    assert_eq!(copy.total(), SIZE as u64);
    assert_eq!(run(&mut copy), SIZE as u64);
    assert!(content(&*target) == bytes());
}

/// A job that may copy less than ten bytes a second was over at once, with success and nothing in its target.
#[test]
fn a_copy_is_not_over_because_nothing_may_be_copied_at_once() {
    let (_, source) = raw(&bytes());
    let (_, target) = raw(&[9; SIZE]);
    let mut copy = DiskCopy::new(source, Arc::clone(&target), None);
    let mut copied = 0;
    while let Some(len) = copy.step(0).unwrap() {
        copied += len;
    }
    assert_eq!(copied, SIZE as u64);
    assert!(content(&*target) == bytes());
}

#[test]
fn a_target_that_reads_as_zeroes_stays_sparse() {
    let (_, source) = raw(&bytes());
    let storage = Arc::new(FaultStorage::new(MemStorage::from(Vec::new())));
    storage.set_len(SIZE as u64).unwrap();
    let target: Arc<dyn Disk> = Arc::new(RawDisk::new(Arc::clone(&storage) as _, false).unwrap());
    assert!(is_blank(&*target) == storage.next_data(0).unwrap().is_none());
    run(&mut DiskCopy::new(source, Arc::clone(&target), None));
    assert!(content(&*target) == bytes());
}

#[test]
fn a_disk_with_a_single_byte_is_not_blank() {
    assert!(!is_blank(&*raw(&bytes()).1));
}

#[test]
fn of_what_is_marked_whole_units_are_copied_and_nothing_else() {
    let (_, source) = raw(&[1; SIZE]);
    let (_, target) = raw(&[9; SIZE]);
    let marked = DirtyBitmap::new(SIZE as u64, 9).unwrap();
    for offset in [512, 3 * GRAIN as u64 + 511, WINDOW + GRAIN as u64, SIZE as u64 - 1] {
        marked.mark(ByteRange { offset, len: 1 });
    }
    let mut copy = DiskCopy::new(source, Arc::clone(&target), Some(marked));
    assert_eq!(copy.total(), 4 * GRAIN as u64);
    assert_eq!(run(&mut copy), 4 * GRAIN as u64);
    let found = content(&*target);
    let copied: Vec<_> = (0..SIZE).step_by(GRAIN).filter(|at| found[*at] == 1).map(|at| at / GRAIN).collect();
    assert_eq!(copied, [0, 3, WINDOW as usize / GRAIN + 1, SIZE / GRAIN - 1]);
    assert!((0..SIZE).all(|at| found[at] == found[at / GRAIN * GRAIN]));
}

#[test]
fn a_piece_that_failed_is_tried_again_or_left_out() {
    for skipped in [false, true] {
        let storage = FaultStorage::new(MemStorage::from(bytes()));
        storage.fail_reads(1);
        let source = Arc::new(RawDisk::new(Arc::new(storage), true).unwrap());
        let (_, target) = raw(&[9; SIZE]);
        let mut copy = DiskCopy::new(source, Arc::clone(&target), None);
        let failure = loop {
            match copy.step(u64::MAX) {
                Ok(Some(_)) => {}
                Ok(None) => panic!("nothing failed"),
                Err(failure) => break failure,
            }
        };
        assert!(matches!(failure, CopyFailure::Read(_)), "{failure:?}");
        let left_out = skipped.then(|| copy.skip().unwrap());
        run(&mut copy);
        let mut expected = bytes();
        if let Some(range) = left_out {
            expected[range.offset as usize..range.end() as usize].fill(9);
        }
        assert!(content(&*target) == expected);
    }
}

/// A compressed cluster that is none: its piece is left out, and no other.
#[test]
fn what_can_not_be_read_does_not_hold_up_the_rest() {
    let storage = Arc::new(MemStorage::default());
    qcow2::create(&*storage, &CreateOptions::new(SIZE as u64, 16, false)).unwrap();
    let mode = Mode::Writable(Journal::nowhere().unwrap());
    let image = Image::open(Parts::new(Arc::clone(&storage) as _, None), mode).unwrap();
    let expected: Vec<u8> = (0..SIZE).map(|at| (at * at / 977) as u8).collect();
    for (at, cluster) in (0..).step_by(1 << 16).zip(expected.chunks(1 << 16)) {
        image.write_compressed(at, cluster).unwrap();
    }
    image.seal();
    image.flush().run().unwrap();
    storage.write_at(&[0xff; 512], storage.len().unwrap() / 2).unwrap();
    let broken = Image::open(Parts::new(storage, None), Mode::ReadOnly).unwrap();
    let (_, target) = raw(&vec![0; SIZE]);
    let mut copy = DiskCopy::new(Arc::new(broken), Arc::clone(&target), None);
    let mut left_out = Vec::new();
    loop {
        match copy.step(u64::MAX) {
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(CopyFailure::Read(_)) => left_out.extend(copy.skip()),
            Err(failure) => panic!("{failure:?}"),
        }
        assert!(left_out.len() <= 2, "{left_out:?}");
    }
    assert!(!left_out.is_empty());
    let found = content(&*target);
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let is_left_out = left_out.iter().any(|range| (range.offset..range.end()).contains(&(at as u64)));
        assert!(found == expected || is_left_out, "byte {at}");
    }
}

/// Whatever fails, and whenever it is asked: what was told is in the target, what is left is not told.
#[test]
fn what_is_copied_and_what_is_left_is_the_whole() {
    let expected: Vec<u8> = (0..SIZE).map(|at| (at / 4096 % 5 * (at % 251)) as u8).collect();
    for (round, unit) in [(1, 12), (3, 16), (7, 16), (20, 12)] {
        let (_, source) = raw(&expected);
        let storage = Arc::new(FaultStorage::new(MemStorage::from(vec![9; SIZE])));
        let target: Arc<dyn Disk> = Arc::new(RawDisk::new(Arc::clone(&storage) as _, false).unwrap());
        let marked = DirtyBitmap::new(SIZE as u64, unit).unwrap();
        (0..SIZE as u64 >> 16)
            .filter(|at| at % 3 != 1)
            .for_each(|at| marked.mark(ByteRange { offset: at << 16, len: 1 }));
        let was_marked = |at: u64| marked.next_dirty(ByteRange { offset: at, len: 1 }).is_some();
        let mut copy = DiskCopy::new(source, target, None);
        let others = DirtyBitmap::new(SIZE as u64, unit).unwrap();
        (0..SIZE as u64)
            .step_by(1 << unit)
            .filter(|at| was_marked(*at))
            .for_each(|at| others.mark(ByteRange { offset: at, len: 1 }));
        copy.marked = Some(others);
        let (total, mut copied, mut skipped, mut steps) = (copy.total(), 0, 0, 0);
        loop {
            steps += 1;
            storage.fail_writes(if steps % 4 == 2 { round } else { 0 });
            match copy.step(if steps % 3 == 0 { 1 << 18 } else { u64::MAX }) {
                Ok(Some(len)) => copied += len,
                Ok(None) => break,
                Err(CopyFailure::Write(_)) if steps % 2 == 0 => skipped += copy.skip().unwrap().len,
                Err(failure) => assert!(matches!(failure, CopyFailure::Write(_)), "{failure:?}"),
            }
            let left = DirtyBitmap::new(SIZE as u64, 12).unwrap();
            copy.mark_left(&left);
            assert_eq!(copied + left.dirty_bytes(), total);
            let found = storage.bytes();
            for at in (0..SIZE).step_by(GRAIN).filter(|at| was_marked(*at as u64)) {
                let is_left = left.next_dirty(ByteRange { offset: at as u64, len: 1 }).is_some();
                assert!(is_left || found[at..at + GRAIN] == expected[at..at + GRAIN], "at {at}");
            }
            assert!(steps < 1000);
        }
        assert_eq!((copied + skipped, copy.is_whole()), (total, skipped == 0));
    }
}

/// One that is read by two threads at once, or not.
#[derive(Debug, Default)]
struct Meeting {
    inner: MemStorage,
    inside: AtomicUsize,
    met: AtomicBool,
}

impl Storage for Meeting {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(10);
        self.inside.fetch_add(1, Ordering::SeqCst);
        while !self.met.load(Ordering::SeqCst) && Instant::now() < until {
            self.met.fetch_or(self.inside.load(Ordering::SeqCst) > 1, Ordering::SeqCst);
            std::thread::yield_now();
        }
        self.inside.fetch_sub(1, Ordering::SeqCst);
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.inner.write_at(buf, offset)
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }

    fn punch_hole(&self, range: ByteRange) -> Result<()> {
        self.inner.punch_hole(range)
    }
}

#[test]
fn several_pieces_are_under_way_at_once_and_a_limit_is_kept() {
    let source = Arc::new(Meeting { inner: MemStorage::from(vec![1; SIZE]), ..Meeting::default() });
    let disk = Arc::new(RawDisk::new(Arc::clone(&source) as _, true).unwrap());
    let (_, target) = raw(&[9; SIZE]);
    let mut copy = DiskCopy::new(disk, Arc::clone(&target), None);
    source.met.store(true, Ordering::SeqCst);
    assert_eq!(copy.step(1).unwrap(), Some(PIECE), "a piece is the least");
    assert!(copy.step(2 * PIECE).unwrap().is_some_and(|copied| copied <= 3 * PIECE));
    source.met.store(false, Ordering::SeqCst);
    copy.step(u64::MAX).unwrap();
    assert!(source.met.load(Ordering::SeqCst), "one piece waited for the other");
    run(&mut copy);
    assert!(content(&*target) == vec![1; SIZE]);
}
