use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{ByteRange, Error, ErrorKind, Result, Storage};

/// A file in memory. Syncs do nothing: what is written is there.
#[derive(Debug, Default)]
pub struct MemStorage(Mutex<Vec<u8>>);

impl MemStorage {
    /// A file of `len` zeroes.
    pub fn new(len: usize) -> Self {
        Self::from(vec![0; len])
    }

    /// A copy of all its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<Vec<u8>> for MemStorage {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(bytes))
    }
}

fn index(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::new(ErrorKind::NoSpace, "larger than memory"))
}

impl Storage for MemStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let start = index(offset)?;
        let bytes = self.lock();
        let found = start.checked_add(buf.len()).and_then(|end| bytes.get(start..end));
        buf.copy_from_slice(found.ok_or_else(|| Error::new(ErrorKind::Io, "read past the end of the file"))?);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let start = index(offset)?;
        let end = start.checked_add(buf.len()).ok_or_else(|| Error::new(ErrorKind::NoSpace, "too large"))?;
        let mut bytes = self.lock();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(buf);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(self.lock().len() as u64)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.lock().resize(index(len)?, 0);
        Ok(())
    }

    fn punch_hole(&self, range: ByteRange) -> Result<()> {
        let mut bytes = self.lock();
        let end = index(range.end())?.min(bytes.len());
        let start = index(range.offset)?.min(end);
        bytes[start..end].fill(0);
        Ok(())
    }
}
