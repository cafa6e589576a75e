//! Host files and block devices as [`Storage`].

use std::fs::{File, OpenOptions};
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use block::{ByteRange, Context, Error, ErrorKind, Result, Storage};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, fcntl_getfl, fcntl_setfl, fstatfs, seek};

use rustix::io::Errno;

use serde::{Deserialize, Serialize};

use crate::lock;
use crate::sandbox::explain;

mod forget;

/// Whether data I/O goes through the host's page cache.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Through the page cache; a flush writes it out.
    #[default]
    Writeback,
    /// Past the page cache (`O_DIRECT`).
    None,
}

/// How to open an image.
#[derive(Clone, Copy, Debug)]
pub struct Open {
    /// For writing, and then nobody else may write it.
    pub writable: bool,
    /// The way of data I/O.
    pub cache: Cache,
}

const NO_DATA: ByteRange = ByteRange { offset: 0, len: 0 };

/// An open image file or block device, locked the way QEMU locks it, so that QEMU's tools and we refuse each other
/// what would do harm.
#[derive(Debug)]
pub struct HostFile {
    path: PathBuf,
    file: File,
    /// A second descriptor with `O_DIRECT`, and the alignment that it asks for.
    direct: Option<(File, NonZeroU32)>,
    is_device: bool,
    in_memory: bool,
    /// Where the last question for data was answered. The kernel finds the end of data by walking over all of it, and who
    /// reads a file in pieces would ask for the same end at each of them.
    known_data: Mutex<ByteRange>,
    sync_failed: AtomicBool,
}

impl HostFile {
    /// Opens an existing image. Anything but a regular file or a block device is refused, at once.
    pub fn open(path: &Path, how: Open) -> Result<Self> {
        Self::open_with(path, how, OpenOptions::new().read(true).write(how.writable))
            .context(|| format!("open {}", path.display()))
    }

    /// Creates a new image file, mode 0600; fails if there is one.
    pub fn create(path: &Path, cache: Cache) -> Result<Self> {
        let how = Open { writable: true, cache };
        Self::open_with(path, how, OpenOptions::new().read(true).write(true).create_new(true).mode(0o600))
            .context(|| format!("create {}", path.display()))
    }

    /// Opens the file once more, for writing, while this handle goes on being read: for a job that changes an image which
    /// a chain reads. No other process could write it in between. [`ErrorKind::Busy`] while another one reads it.
    pub fn reopen_for_writing(&self) -> Result<Self> {
        let cache = if self.direct.is_some() { Cache::None } else { Cache::Writeback };
        let reopen = || {
            let mut options = OpenOptions::new();
            let file = open_plain(&self.path, options.read(true).write(true))?;
            let (found, expected) = (file.metadata()?, self.file.metadata()?);
            refuse_other(&found, &expected)?;
            lock::hand_over(&self.file, &file)?;
            Self::with_locked(&self.path, file, Open { writable: true, cache })
        };
        reopen().context(|| format!("open {} for writing", self.path.display()))
    }

    /// Keeps other programs from writing again, as before [`reopen_for_writing`](Self::reopen_for_writing): called before
    /// what that returned is closed, if this handle is to go on alone.
    pub fn forbid_writers(&self) {
        // It is granted, for the writer has the same lock. If it were not, other programs could write, and nothing worse.
        let _ = lock::forbid_writers(&self.file);
    }

    fn open_with(path: &Path, how: Open, options: &mut OpenOptions) -> Result<Self> {
        let file = open_plain(path, options)?;
        lock::acquire(&file, how.writable)?;
        Self::with_locked(path, file, how)
    }

    fn with_locked(path: &Path, file: File, how: Open) -> Result<Self> {
        let metadata = file.metadata()?;
        let is_device = metadata.file_type().is_block_device();
        let direct = match how.cache {
            Cache::Writeback => None,
            Cache::None => Some((open_direct(path, how.writable, &metadata)?, direct_alignment(&file)?)),
        };
        let in_memory = !is_device && direct.is_none() && is_tmpfs(&file)?;
        let known_data = Mutex::new(NO_DATA);
        let (path, sync_failed) = (path.to_owned(), AtomicBool::new(false));
        Ok(Self { path, file, direct, is_device, in_memory, known_data, sync_failed })
    }

    /// Where the open file is, all links followed, as the kernel has it now. That is not where its path leads if somebody
    /// moves files about.
    pub fn real_path(&self) -> Result<PathBuf> {
        let link = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        std::fs::read_link(link).context(|| format!("find where {} is", self.path.display()))
    }

    /// Bytes that it takes on the host: less than its length if it has holes, 0 for a device.
    pub fn allocated(&self) -> Result<u64> {
        // Counted in 512 bytes whatever the file system's block size.
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// Gives up the right to write, so that others may open it for reading with the image sealed beneath a chain.
    pub fn downgrade(&self) -> Result<()> {
        lock::downgrade(&self.file)
    }
}

/// Opens a regular file or a block device; anything else is refused, before it could block us.
fn open_plain(path: &Path, options: &mut OpenOptions) -> Result<File> {
    // Without O_NONBLOCK a FIFO would hold the open until somebody writes to it.
    let file = options
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .map_err(|error| opening(path, error))?;
    let metadata = file.metadata()?;
    if !metadata.file_type().is_block_device() && !metadata.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "neither a regular file nor a block device"));
    }
    settle_flags(&file)?;
    Ok(file)
}

/// Says what to do where the process has too many files open: a long chain has many.
fn opening(path: &Path, error: std::io::Error) -> Error {
    match Errno::from_io_error(&error) {
        Some(Errno::MFILE) => Error::from(error).context(
            "the process may open no more files; raise its limit (LimitNOFILE= of the unit, `ulimit -Hn`), or merge \
             layers",
        ),
        _ => explain(path, error),
    }
}

/// That it is the same file is checked whenever one is opened again: the path may have been replaced meanwhile.
fn refuse_other(found: &std::fs::Metadata, expected: &std::fs::Metadata) -> Result<()> {
    match (found.dev(), found.ino()) == (expected.dev(), expected.ino()) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Busy, "the file was replaced while being opened")),
    }
}

/// Opens the same file once more.
fn open_direct(path: &Path, writable: bool, expected: &std::fs::Metadata) -> Result<File> {
    let flags = (OFlags::DIRECT | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new().read(true).write(writable).custom_flags(flags).open(path).context(
        || "open past the page cache (the file system may not support O_DIRECT: use cache=writeback)",
    )?;
    refuse_other(&file.metadata()?, expected)?;
    settle_flags(&file)?;
    Ok(file)
}

/// Takes away the `O_NONBLOCK` that was for opening. With it, io_uring answers `EAGAIN` where it would hand the I/O to
/// a thread: on devices beneath that can not say whether they would wait (md, older dm).
///
/// And has the kernel note no times of access, where it lets us: it would look at the file's inode for each read, and in a
/// long chain that is one that no processor's cache has.
fn settle_flags(file: &File) -> Result<()> {
    let flags = fcntl_getfl(file).map_err(std::io::Error::from)? - OFlags::NONBLOCK;
    // Only a file's owner may ask for this.
    fcntl_setfl(file, flags | OFlags::NOATIME)
        .or_else(|_| fcntl_setfl(file, flags))
        .map_err(std::io::Error::from)?;
    Ok(())
}

fn is_tmpfs(file: &File) -> Result<bool> {
    /// `TMPFS_MAGIC`, statfs(2).
    const TMPFS: u64 = 0x0102_1994;
    Ok(fstatfs(file).map_err(std::io::Error::from)?.f_type as u64 == TMPFS)
}

/// What `O_DIRECT` asks for: the device's logical block size where it is one, else 4 KiB, which every file system
/// that takes direct I/O accepts.
fn direct_alignment(file: &File) -> Result<NonZeroU32> {
    let size = match file.metadata()?.file_type().is_block_device() {
        true => rustix::fs::ioctl_blksszget(file).map_err(std::io::Error::from)?,
        false => 4096,
    };
    NonZeroU32::new(size).ok_or_else(|| Error::new(ErrorKind::Io, "the device reports no block size"))
}

/// A turn at writing to a file that goes on being read through another handle: its only writer, as long as this lives.
#[derive(Debug)]
pub struct Writing {
    reader: Arc<HostFile>,
    writer: HostFile,
}

impl Writing {
    /// Takes the turn, as [`HostFile::reopen_for_writing`].
    pub fn begin(reader: Arc<HostFile>) -> Result<Self> {
        let writer = reader.reopen_for_writing()?;
        Ok(Self { reader, writer })
    }

    /// The file, open for writing.
    pub fn file(&self) -> &HostFile {
        &self.writer
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.reader.forbid_writers();
    }
}

impl HostFile {
    fn set_known_data(&self, known: ByteRange) {
        *self.known_data.lock().unwrap_or_else(PoisonError::into_inner) = known;
    }
}

impl Storage for HostFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset).context(|| format!("read {} at {offset}", self.path.display()))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(buf, offset).context(|| format!("write {} at {offset}", self.path.display()))
    }

    fn sync(&self) -> Result<()> {
        let failed = |_: &Error| self.sync_failed.store(true, Ordering::Release);
        self.file.sync_data().context(|| format!("sync {}", self.path.display())).inspect_err(failed)
    }

    fn len(&self) -> Result<u64> {
        match self.is_device {
            // A device has no length in its inode; the end of it is found by seeking.
            true => Ok(seek(&self.file, SeekFrom::End(0)).map_err(std::io::Error::from)?),
            false => Ok(self.file.metadata()?.len()),
        }
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if self.is_device {
            let story = format!("{} is a device of {} bytes", self.path.display(), self.len()?);
            return Err(Error::new(ErrorKind::Unsupported, story));
        }
        self.set_known_data(NO_DATA);
        self.file.set_len(len).context(|| format!("resize {} to {len}", self.path.display()))
    }

    fn punch_hole(&self, range: ByteRange) -> Result<()> {
        self.set_known_data(NO_DATA);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, range.offset, range.len)
            .map_err(|errno| match errno {
                // A device whose blocks are larger than sectors, and a range that is not made of them.
                Errno::INVAL if self.is_device => Errno::OPNOTSUPP,
                errno => errno,
            })
            .map_err(std::io::Error::from)
            .context(|| format!("punch a hole in {} at {}", self.path.display(), range.offset))
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        // Another handle may have made a hole there since: what may hold data is asked for.
        let known = *self.known_data.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(len) = known.end().checked_sub(offset).filter(|len| *len > 0 && offset >= known.offset) {
            return Ok(Some(ByteRange { offset, len }));
        }
        let len = self.len()?;
        if offset >= len {
            return Ok(None);
        }
        if self.is_device {
            return Ok(Some(ByteRange { offset, len: len - offset }));
        }
        let start = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(errno) => return Err(std::io::Error::from(errno).into()),
        };
        let end = seek(&self.file, SeekFrom::Hole(start)).map_err(std::io::Error::from)?;
        let found = ByteRange { offset: start, len: end.saturating_sub(start) };
        self.set_known_data(found);
        Ok(Some(found))
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.direct.as_ref().map_or(self.file.as_fd(), |(file, _)| file.as_fd()))
    }

    fn direct_alignment(&self) -> Option<NonZeroU32> {
        self.direct.as_ref().map(|(_, alignment)| *alignment)
    }

    fn in_memory(&self) -> bool {
        self.in_memory
    }
}

#[cfg(test)]
mod tests;
