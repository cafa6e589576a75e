//! What the unit tests share.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::testing::CrashStorage;
use block::{ByteRange, Error, ErrorKind, Result, Storage};

/// Runs one of QEMU's programs; what it prints, and whether it succeeded.
pub(crate) fn qemu(folder: &Path, program: &str, arguments: &[&str]) -> (String, bool) {
    let output = Command::new(program).args(arguments).current_dir(folder).output().unwrap();
    (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.success())
}

/// A file whose writes and syncs fail from some step on: where power will be lost.
#[derive(Debug)]
pub(crate) struct Stops {
    pub(crate) inner: Arc<CrashStorage>,
    left: AtomicU64,
}

impl Stops {
    /// Fails after `steps`.
    pub(crate) fn new(inner: Arc<CrashStorage>, steps: u64) -> Self {
        Self { inner, left: AtomicU64::new(steps) }
    }

    /// How many steps it will still take.
    pub(crate) fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    fn step(&self) -> Result<()> {
        let step = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        step.map(|_| ()).map_err(|_| Error::new(ErrorKind::Io, "stopped"))
    }
}

impl Storage for Stops {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.step()?;
        self.inner.write_at(buf, offset)
    }

    fn sync(&self) -> Result<()> {
        self.step()?;
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
