use std::sync::atomic::{AtomicU64, Ordering};

use crate::{ByteRange, Error, ErrorKind, Result, Storage};

use super::MemStorage;

/// A file in memory whose operations fail when told to, a given number of times.
#[derive(Debug)]
pub struct FaultStorage {
    inner: MemStorage,
    reads: AtomicU64,
    writes: AtomicU64,
    syncs: AtomicU64,
    full: AtomicU64,
}

impl FaultStorage {
    /// A storage that fails nothing yet, and has unlimited room.
    pub fn new(inner: MemStorage) -> Self {
        let none = || AtomicU64::new(0);
        Self { inner, reads: none(), writes: none(), syncs: none(), full: AtomicU64::new(u64::MAX) }
    }

    /// The next `count` reads fail with an I/O error.
    pub fn fail_reads(&self, count: u64) {
        self.reads.store(count, Ordering::SeqCst);
    }

    /// The next `count` writes fail with an I/O error.
    pub fn fail_writes(&self, count: u64) {
        self.writes.store(count, Ordering::SeqCst);
    }

    /// The next `count` syncs fail with an I/O error.
    pub fn fail_syncs(&self, count: u64) {
        self.syncs.store(count, Ordering::SeqCst);
    }

    /// From now on, growing past `len` bytes fails for want of room.
    pub fn limit_len(&self, len: u64) {
        self.full.store(len, Ordering::SeqCst);
    }

    /// A copy of all its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.inner.bytes()
    }

    fn check_room(&self, end: u64) -> Result<()> {
        if end > self.full.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::NoSpace, "injected: no space left"));
        }
        Ok(())
    }
}

fn fail(countdown: &AtomicU64) -> Result<()> {
    match countdown.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
        Ok(_) => Err(Error::new(ErrorKind::Io, "injected: input/output error")),
        Err(_) => Ok(()),
    }
}

impl Storage for FaultStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        fail(&self.reads)?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        fail(&self.writes)?;
        self.check_room(offset + buf.len() as u64)?;
        self.inner.write_at(buf, offset)
    }

    fn sync(&self) -> Result<()> {
        fail(&self.syncs)?;
        self.inner.sync()
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.check_room(len)?;
        self.inner.set_len(len)
    }

    fn punch_hole(&self, range: ByteRange) -> Result<()> {
        fail(&self.writes)?;
        self.inner.punch_hole(range)
    }
}
