//! Images in temporary files, and a storage that counts and patches.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use block::{ByteRange, Error, ErrorKind, RawDisk, Result, Storage};
use snapshot::probe::{FsVerdict, probe};
use tempfile::NamedTempFile;

/// A sparse image file that goes away with the test.
#[derive(Debug)]
pub(crate) struct Image(NamedTempFile);

impl Image {
    pub(crate) fn new(len: u64) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        Self(file)
    }

    pub(crate) fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    /// By its name: tools may have replaced the file.
    fn file(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.0.path()).unwrap()
    }

    pub(crate) fn len(&self) -> u64 {
        self.file().metadata().unwrap().len()
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.file().write_all_at(bytes, at).unwrap();
    }

    /// Copies all of `other` to `at`.
    pub(crate) fn place(&self, at: u64, other: &Self) {
        self.write(at, &other.read(0, other.len() as usize));
    }

    pub(crate) fn probe(&self) -> Vec<FsVerdict> {
        probe(&RawDisk::new(self.storage(), true).unwrap()).unwrap()
    }

    pub(crate) fn storage(&self) -> Arc<Patched> {
        Arc::new(Patched { file: File::open(self.0.path()).unwrap(), inner: Mutex::default() })
    }
}

/// A copy of a mounted image's bytes as they are now, holes kept.
pub(crate) fn copy(from: &Path) -> Image {
    let image = Image::new(0);
    let status = std::process::Command::new("cp").arg("--sparse=always").arg(from).arg(image.path()).status();
    assert!(status.unwrap().success());
    image
}

/// A read-only storage whose bytes can be patched in memory, and that notes what is read.
#[derive(Debug)]
pub(crate) struct Patched {
    file: File,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    patches: HashMap<u64, u8>,
    reads: Vec<ByteRange>,
}

impl Patched {
    pub(crate) fn patch(&self, patches: impl IntoIterator<Item = (u64, u8)>) {
        self.inner.lock().unwrap().patches = patches.into_iter().collect();
    }

    /// The reads since the last call.
    pub(crate) fn take_reads(&self) -> Vec<ByteRange> {
        std::mem::take(&mut self.inner.lock().unwrap().reads)
    }
}

impl Storage for Patched {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset)?;
        let mut inner = self.inner.lock().unwrap();
        inner.reads.push(ByteRange { offset, len: buf.len() as u64 });
        for (at, byte) in &inner.patches {
            if let Some(place) = at.checked_sub(offset).and_then(|at| buf.get_mut(at as usize)) {
                *place = *byte;
            }
        }
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        panic!("a probe does not write")
    }

    fn sync(&self) -> Result<()> {
        panic!("a probe does not sync")
    }

    fn len(&self) -> Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, _: u64) -> Result<()> {
        panic!("a probe does not resize")
    }

    fn punch_hole(&self, _: ByteRange) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "a probe punches no holes"))
    }
}
