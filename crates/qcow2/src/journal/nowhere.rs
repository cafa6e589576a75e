//! The journal of an image that is made again, and never recovered, if its writer dies: a copy, a throw-away overlay.

use std::sync::Arc;

use block::{ByteRange, Error, ErrorKind, Result, Storage};

use super::Journal;

impl Journal {
    /// One that keeps nothing. After a kill the image is worthless.
    pub fn nowhere() -> Result<Self> {
        Self::create(Arc::new(Nowhere), Arc::new(Nowhere), "none")
    }
}

#[derive(Debug)]
struct Nowhere;

impl Storage for Nowhere {
    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Io, "nothing is kept here"))
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(0)
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Ok(())
    }

    fn punch_hole(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }
}
