//! Raw disks: the bytes of one storage, as they are.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};

use crate::{
    ByteRange, Disk, Error, ErrorKind, Extent, Flush, FlushStep, Result, Source, Storage, WriteGuard,
};

/// A raw image or host block device as a disk.
#[derive(Debug)]
pub struct RawDisk {
    storage: Arc<dyn Storage>,
    capacity: u64,
    read_only: AtomicBool,
    failed: Arc<AtomicBool>,
}

impl RawDisk {
    /// The disk in `storage`, as large as it is now (its odd last bytes past a sector are not shown).
    pub fn new(storage: Arc<dyn Storage>, read_only: bool) -> Result<Self> {
        let capacity = storage.len()? / crate::SECTOR * crate::SECTOR;
        Ok(Self { storage, capacity, read_only: AtomicBool::new(read_only), failed: Arc::default() })
    }

    /// Refuses writes from now on; those already resolved go on.
    pub fn seal(&self) {
        self.read_only.store(true, Ordering::Release);
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        if range.is_within(self.capacity) {
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
        check_latch(&self.failed)?;
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

fn check_latch(failed: &AtomicBool) -> Result<()> {
    if failed.load(Ordering::Acquire) {
        return Err(Error::new(ErrorKind::Latched, "an earlier sync failed; the image can not be trusted"));
    }
    Ok(())
}

impl Disk for RawDisk {
    fn capacity(&self) -> u64 {
        self.capacity
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
        Box::new(RawFlush {
            storage: Arc::clone(&self.storage),
            failed: Arc::clone(&self.failed),
            synced: false,
        })
    }
}

struct RawFlush {
    storage: Arc<dyn Storage>,
    failed: Arc<AtomicBool>,
    synced: bool,
}

impl Flush for RawFlush {
    fn step(&mut self, last: Result<()>, _waker: &Waker) -> Poll<Result<FlushStep>> {
        if let Err(error) = last {
            self.failed.store(true, Ordering::Release);
            return Poll::Ready(Err(error.context("sync of the raw image failed for good")));
        }
        Poll::Ready(check_latch(&self.failed).map(|()| {
            if std::mem::replace(&mut self.synced, true) {
                FlushStep::Done
            } else {
                FlushStep::Sync(vec![Arc::clone(&self.storage)])
            }
        }))
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
    fn a_failed_sync_is_final() {
        let (storage, disk) = disk();
        storage.fail_syncs(1);
        assert_eq!(disk.flush().run().unwrap_err().kind(), ErrorKind::Io);
        // The storage would sync again without a complaint, having dropped the pages that it could not write.
        assert_eq!(disk.flush().run().unwrap_err().kind(), ErrorKind::Latched);
        assert_eq!(write_disk(&disk, 0, &[1]).unwrap_err().kind(), ErrorKind::Latched);
    }
}
