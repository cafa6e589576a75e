//! Raw disks: the bytes of one storage, as they are.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use crate::{
    ByteRange, Disk, Error, ErrorKind, Extent, Flush, FlushStep, Layer, Place, Result, Run, Source, Storage,
    WriteGuard,
};

/// A raw image or host block device as a disk.
#[derive(Debug)]
pub struct RawDisk {
    storage: Arc<dyn Storage>,
    capacity: AtomicU64,
    read_only: AtomicBool,
    syncs: Arc<Syncs>,
}

/// The syncs of a storage: one at a time.
///
/// The kernel tells of a lost page once for each open file. Of two syncs at once, either might be told, and the other one
/// would acknowledge what was lost.
#[derive(Debug, Default)]
struct Syncs {
    /// One has failed: the latch.
    failed: AtomicBool,
    turn: Mutex<Turn>,
}

#[derive(Debug, Default)]
struct Turn {
    taken: bool,
    /// How many syncs have begun.
    begun: u64,
    /// The number of the last one that succeeded.
    succeeded: u64,
    waiting: Vec<Waker>,
}

impl Syncs {
    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_latch(&self) -> Result<()> {
        if self.failed.load(Ordering::Acquire) {
            let story = "an earlier sync failed; the image can not be trusted";
            return Err(Error::new(ErrorKind::Latched, story));
        }
        Ok(())
    }
}

impl RawDisk {
    /// The disk in `storage`, as large as it is now (its odd last bytes past a sector are not shown).
    pub fn new(storage: Arc<dyn Storage>, read_only: bool) -> Result<Self> {
        let capacity = storage.len()? / crate::SECTOR * crate::SECTOR;
        let capacity = AtomicU64::new(capacity);
        Ok(Self { storage, capacity, read_only: AtomicBool::new(read_only), syncs: Arc::default() })
    }

    /// Refuses writes from now on; those already resolved go on.
    pub fn seal(&self) {
        self.read_only.store(true, Ordering::Release);
    }

    /// Whether a sync of it has failed, which is final.
    pub fn has_failed(&self) -> bool {
        self.syncs.failed.load(Ordering::Acquire)
    }

    /// Makes the disk larger, by zeroes; durable when it returns. `capacity` is in bytes, made of whole sectors, and not
    /// less than it is. A storage that is long enough already, as a device that has grown, stays as it is.
    pub fn grow(&self, capacity: u64) -> Result<()> {
        self.check_writable(ByteRange { offset: 0, len: 0 })?;
        if capacity < self.capacity() || !capacity.is_multiple_of(crate::SECTOR) {
            let story = format!("a disk of {} bytes can not grow to {capacity}", self.capacity());
            return Err(Error::new(ErrorKind::InvalidInput, story));
        }
        if self.storage.len()? < capacity {
            self.storage.set_len(capacity)?;
        }
        self.flush().run()?;
        self.capacity.store(capacity, Ordering::Release);
        Ok(())
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        if range.is_within(self.capacity()) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutOfRange,
            format!("bytes {}..{} are past the end", range.offset, range.end()),
        ))
    }

    fn check_writable(&self, range: ByteRange) -> Result<()> {
        if self.read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "the disk is read-only"));
        }
        self.syncs.check_latch()?;
        self.check(range)
    }

    fn extent(&self, range: ByteRange) -> Extent {
        let storage = Arc::clone(&self.storage);
        Extent { len: range.len, source: Source::File { storage, offset: range.offset } }
    }

    fn zero(&self, range: ByteRange, unmap: bool) -> Result<()> {
        self.check_writable(range)?;
        if unmap {
            match self.storage.punch_hole(range) {
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                done => return done,
            }
        }
        crate::storage::write_zeroes(&*self.storage, range)
    }
}

impl Layer for RawDisk {
    fn run_at(&self, range: ByteRange) -> Result<Run> {
        self.check(range)?;
        match range.len {
            0 => Err(Error::new(ErrorKind::InvalidInput, "an empty range has no runs")),
            _ => Ok(Run { range, place: Place::Data(range.offset) }),
        }
    }

    fn data(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.storage)
    }
}

impl Disk for RawDisk {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    fn discard_granularity(&self) -> u32 {
        4096
    }

    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        self.check(range)?;
        out.push(self.extent(range));
        Ok(())
    }

    fn resolve_write(
        &self,
        range: ByteRange,
        _waker: &Waker,
        out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>> {
        Poll::Ready(self.check_writable(range).map(|()| {
            out.push(self.extent(range));
            WriteGuard::in_place()
        }))
    }

    fn discard(&self, range: ByteRange, _waker: &Waker) -> Poll<Result<()>> {
        let punched = self.check_writable(range).and_then(|()| self.storage.punch_hole(range));
        Poll::Ready(match punched {
            // A discard is advice: a host that can not take it has followed it as well as it could.
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            done => done,
        })
    }

    fn write_zeroes(&self, range: ByteRange, unmap: bool, _waker: &Waker) -> Poll<Result<()>> {
        Poll::Ready(self.zero(range, unmap))
    }

    fn flush(&self) -> Box<dyn Flush> {
        let before = self.syncs.turn().begun;
        let (storage, syncs) = (Arc::clone(&self.storage), Arc::clone(&self.syncs));
        Box::new(RawFlush { storage, syncs, before, number: None })
    }
}

struct RawFlush {
    storage: Arc<dyn Storage>,
    syncs: Arc<Syncs>,
    /// Syncs begun before this flush was asked for. One that began later does for it as well.
    before: u64,
    /// Of its own sync, while that is under way.
    number: Option<u64>,
}

impl RawFlush {
    /// Its own sync, if there is one, has ended.
    fn end(&mut self, succeeded: bool) {
        let Some(number) = self.number.take() else { return };
        let waiting = {
            let mut turn = self.syncs.turn();
            turn.taken = false;
            if succeeded {
                turn.succeeded = number;
            }
            std::mem::take(&mut turn.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// What to do, as long as nothing has failed.
    fn next(&mut self, waker: &Waker) -> Poll<FlushStep> {
        let mut turn = self.syncs.turn();
        if turn.succeeded > self.before {
            return Poll::Ready(FlushStep::Done);
        }
        if turn.taken {
            if !turn.waiting.iter().any(|waiting| waiting.will_wake(waker)) {
                turn.waiting.push(waker.clone());
            }
            return Poll::Pending;
        }
        turn.taken = true;
        turn.begun += 1;
        self.number = Some(turn.begun);
        Poll::Ready(FlushStep::Sync(vec![Arc::clone(&self.storage)]))
    }
}

impl Flush for RawFlush {
    fn step(&mut self, last: Result<()>, waker: &Waker) -> Poll<Result<FlushStep>> {
        if last.is_err() {
            // Before the next one gets its turn.
            self.syncs.failed.store(true, Ordering::Release);
        }
        self.end(last.is_ok());
        if let Err(error) = last {
            return Poll::Ready(Err(error.context("sync of the raw image failed for good")));
        }
        match self.syncs.check_latch() {
            Ok(()) => self.next(waker).map(Ok),
            Err(latched) => Poll::Ready(Err(latched)),
        }
    }
}

impl Drop for RawFlush {
    fn drop(&mut self) {
        self.end(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FaultStorage, MemStorage};
    use crate::{blocking, read_disk, write_disk};

    fn disk() -> (Arc<FaultStorage>, RawDisk) {
        let storage = Arc::new(FaultStorage::new(MemStorage::new(8192)));
        let disk = RawDisk::new(Arc::clone(&storage) as Arc<dyn Storage>, false).unwrap();
        (storage, disk)
    }

    #[test]
    fn bytes_come_back_and_zeroes_too() {
        let (_, disk) = disk();
        write_disk(&disk, 1000, &[7; 3000]).unwrap();
        blocking(|waker| disk.write_zeroes(ByteRange { offset: 1024, len: 512 }, true, waker)).unwrap();
        let mut bytes = [0; 3000];
        read_disk(&disk, 1000, &mut bytes).unwrap();
        assert_eq!(bytes[..24], [7; 24]);
        assert_eq!(bytes[24..536], [0; 512]);
        assert_eq!(bytes[536..], [7; 2464]);
    }

    #[test]
    fn past_the_end_and_read_only_are_errors() {
        let (storage, disk) = disk();
        assert_eq!(read_disk(&disk, 8191, &mut [0; 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(write_disk(&disk, u64::MAX, &[0; 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
        let sealed = RawDisk::new(storage, true).unwrap();
        assert_eq!(write_disk(&sealed, 0, &[0; 2]).unwrap_err().kind(), ErrorKind::ReadOnly);
    }

    #[test]
    fn it_grows_by_zeroes_and_never_shrinks() {
        let (storage, disk) = disk();
        write_disk(&disk, 8000, &[7; 192]).unwrap();
        for wrong in [0, 7680, 8193, u64::MAX] {
            assert_eq!(disk.grow(wrong).unwrap_err().kind(), ErrorKind::InvalidInput, "{wrong}");
        }
        storage.limit_len(8192);
        assert_eq!(disk.grow(16384).unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(read_disk(&disk, 8192, &mut [0]).unwrap_err().kind(), ErrorKind::OutOfRange);
        storage.limit_len(u64::MAX);
        disk.grow(16384).unwrap();
        let mut bytes = [9; 8384];
        read_disk(&disk, 8000, &mut bytes).unwrap();
        assert_eq!((&bytes[..192], &bytes[192..]), (&[7; 192][..], &[0; 8192][..]));
        write_disk(&disk, 16383, &[1]).unwrap();
        storage.fail_syncs(1);
        disk.grow(32768).unwrap_err();
        assert_eq!(disk.capacity(), 16384, "a size that a loss of power may take back was shown");
        disk.seal();
        assert_eq!(disk.grow(32768).unwrap_err().kind(), ErrorKind::ReadOnly);
    }

    fn is_sync(step: Poll<Result<FlushStep>>) -> bool {
        matches!(step, Poll::Ready(Ok(FlushStep::Sync(_))))
    }

    /// The kernel reports the lost page to the first flush, and would tell the second one that all is well.
    #[test]
    fn a_flush_at_the_same_time_as_one_that_fails_does_not_succeed() {
        let (_, disk) = disk();
        let (mut first, mut second) = (disk.flush(), disk.flush());
        assert!(is_sync(first.step(Ok(()), Waker::noop())));
        assert!(second.step(Ok(()), Waker::noop()).is_pending());
        let lost = Err(Error::new(ErrorKind::Io, "a page was lost"));
        assert!(matches!(first.step(lost, Waker::noop()), Poll::Ready(Err(_))));
        let Poll::Ready(Err(error)) = second.step(Ok(()), Waker::noop()) else { panic!("it succeeded") };
        assert_eq!(error.kind(), ErrorKind::Latched);
    }

    #[test]
    fn flushes_that_wait_share_the_next_sync_and_not_the_one_under_way() {
        let (_, disk) = disk();
        let mut first = disk.flush();
        assert!(is_sync(first.step(Ok(()), Waker::noop())));
        // Asked for after the first one's sync began: what was written in between may not be in that one.
        let (mut second, mut third) = (disk.flush(), disk.flush());
        assert!(second.step(Ok(()), Waker::noop()).is_pending());
        assert!(matches!(first.step(Ok(()), Waker::noop()), Poll::Ready(Ok(FlushStep::Done))));
        assert!(is_sync(second.step(Ok(()), Waker::noop())));
        assert!(third.step(Ok(()), Waker::noop()).is_pending());
        assert!(matches!(second.step(Ok(()), Waker::noop()), Poll::Ready(Ok(FlushStep::Done))));
        assert!(matches!(third.step(Ok(()), Waker::noop()), Poll::Ready(Ok(FlushStep::Done))));
    }

    #[test]
    fn a_flush_that_is_given_up_gives_its_turn_to_the_next() {
        let (_, disk) = disk();
        let (mut first, mut second) = (disk.flush(), disk.flush());
        assert!(is_sync(first.step(Ok(()), Waker::noop())));
        assert!(second.step(Ok(()), Waker::noop()).is_pending());
        drop(first);
        assert!(is_sync(second.step(Ok(()), Waker::noop())));
    }

    #[test]
    fn a_failed_sync_is_final() {
        let (storage, disk) = disk();
        storage.fail_syncs(1);
        assert_eq!(disk.flush().run().unwrap_err().kind(), ErrorKind::Io);
        // The storage would sync again without a complaint, having dropped the pages that it could not write.
        assert_eq!(disk.flush().run().unwrap_err().kind(), ErrorKind::Latched);
        assert_eq!(write_disk(&disk, 0, &[1]).unwrap_err().kind(), ErrorKind::Latched);
    }
}
