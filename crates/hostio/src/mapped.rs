//! A file that is written by copying to memory: for what is appended in small pieces and need not be synced.
//!
//! ```text
//!   write_at ──memcpy──▶ shared mapping ═══ page cache ──(kernel, sync)──▶ disk
//!                             └─ survives the death of the process
//! ```
//!
//! # Lifecycle
//! Opening reserves the first [`STEP`] on the host, each write past the end reserves more first. The file never shrinks
//! while it is open. What was reserved and not written reads as zeroes, and so does the rest of it for the next process.
//!
//! # Invariants
//! - A write to the mapping needs no room of the host: a store that found none would end the process (SIGBUS), where a
//!   write call fails. So a file is mapped only where reserved room is written in place: ext4, xfs, tmpfs. Btrfs writes
//!   a copy each time, other file systems may, and network ones lose their server: there it goes through write calls.
//! - Reads go through the file, for the kernel can tell of an error then. They see what was copied: both are the page cache.
//! - Nobody else changes the file's length, or shares its blocks (a copy with `cp --reflink` while it is open): it lies in
//!   a folder of our own, and is locked.
#![allow(unsafe_code, reason = "one copy into mapped memory")]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use block::{ByteRange, Context, Error, ErrorKind, Result, Storage};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, fallocate, fstatfs};
use rustix::io::Errno;

use crate::lock;

/// Room is reserved in pieces of so many bytes.
const STEP: u64 = 1 << 20;

/// A file whose writes are copies to memory where the file system allows it. The module says what that asks.
///
/// Its [`len`](Storage::len) is what is reserved, a multiple of 1 MiB. It can not shrink, and has no holes.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    room: Mutex<Room>,
}

#[derive(Debug)]
struct Room {
    /// What is reserved.
    len: u64,
    /// All of it; `None` where the file is not to be mapped.
    map: Option<MmapRaw>,
    /// Whether the file system is one of those to map on.
    mappable: bool,
}

impl MappedFile {
    /// Opens the file, or creates it with mode 0600, and reserves its first 1 MiB: [`ErrorKind::NoSpace`] if the host has
    /// not that much. [`ErrorKind::Busy`] if another process has it open.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_in(path).context(|| format!("open {}", path.display()))
    }

    fn open_in(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Error::new(ErrorKind::InvalidInput, "not a regular file"));
        }
        lock::acquire(&file, true)?;
        let room = Room { len: metadata.len(), map: None, mappable: writes_in_place(&file)? };
        let mapped = Self { path: path.to_owned(), file, room: Mutex::new(room) };
        // Also of a file that is long enough: it may have been copied here with holes.
        mapped.reserve(&mut mapped.room(), metadata.len().max(1))?;
        Ok(mapped)
    }

    /// Makes the file at least `len` bytes long, with room for all of them. On an error it is as it was.
    fn reserve(&self, room: &mut Room, len: u64) -> Result<()> {
        let reserved = len.checked_next_multiple_of(STEP);
        let len = reserved.ok_or_else(|| Error::new(ErrorKind::NoSpace, "a file ends before 2^64"))?;
        match fallocate(&self.file, FallocateFlags::empty(), 0, len) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) => {
                room.mappable = false;
                self.file.set_len(len)?;
            }
            Err(errno) => {
                let error = Error::from(std::io::Error::from(errno));
                return Err(error.context(format!("reserve {len} bytes")));
            }
        }
        if room.mappable {
            let map = MmapOptions::new().map_raw(&self.file)?;
            // Pages that stay in memory need not be read again for a write to a part of them, which the kernel might fail
            // to do. A limit on locked memory may forbid it; that only makes the unlikely less so.
            let _ = map.lock();
            room.map = Some(map);
        } else {
            room.map = None;
        }
        room.len = len;
        Ok(())
    }

    fn room(&self) -> MutexGuard<'_, Room> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the file system writes reserved room in place, so that a store to a mapping of it can not fail for want of
/// room.
fn writes_in_place(file: &File) -> Result<bool> {
    /// `EXT4_SUPER_MAGIC`, `TMPFS_MAGIC`, statfs(2), and `XFS_SUPER_MAGIC`, linux/magic.h.
    const IN_PLACE: [u64; 3] = [0xef53, 0x0102_1994, 0x5846_5342];
    let found = fstatfs(file).map_err(std::io::Error::from)?.f_type as u64;
    Ok(IN_PLACE.contains(&found))
}

impl Storage for MappedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset).context(|| format!("read {} at {offset}", self.path.display()))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let story = || format!("write {} at {offset}", self.path.display());
        let mut room = self.room();
        let end = offset.saturating_add(buf.len() as u64);
        if end > room.len {
            self.reserve(&mut room, end).context(story)?;
        }
        let to = room.map.as_ref().and_then(|map| Some((map, usize::try_from(offset).ok()?)));
        match to {
            None => self.file.write_all_at(buf, offset).context(story),
            Some((map, offset)) => {
                debug_assert!(map.len() as u64 >= end, "all that is reserved is mapped");
                // SAFETY: the mapping is `room.len` bytes long, within which `end` is, and it is not replaced while `room`
                // is locked. Nothing in Rust refers to it, so `buf` does not overlap. A page of it is backed: the file is
                // as long (nobody cuts it), and its room is reserved.
                unsafe {
                    ptr::copy_nonoverlapping(buf.as_ptr(), map.as_mut_ptr().wrapping_add(offset), buf.len())
                };
                Ok(())
            }
        }
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_data().context(|| format!("sync {}", self.path.display()))
    }

    fn len(&self) -> Result<u64> {
        Ok(self.room().len)
    }

    /// Grows, in steps of 1 MiB. It can not shrink under its mapping: [`ErrorKind::Unsupported`].
    fn set_len(&self, len: u64) -> Result<()> {
        let story = || format!("resize {} to {len}", self.path.display());
        let mut room = self.room();
        match len.cmp(&room.len) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.reserve(&mut room, len).context(story),
            std::cmp::Ordering::Less => {
                Err(Error::new(ErrorKind::Unsupported, "a mapped file can not shrink")).context(story)
            }
        }
    }

    /// Its room stays reserved: always [`ErrorKind::Unsupported`].
    fn punch_hole(&self, _range: ByteRange) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "a mapped file has no holes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::Command;

    fn is_mapped(file: &MappedFile) -> bool {
        file.room().map.is_some()
    }

    /// On a file system that is mapped, and on one that is not: both must read the same.
    fn folders() -> [tempfile::TempDir; 2] {
        [tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap()]
    }

    #[test]
    fn what_was_written_is_there_for_the_next_process_and_the_rest_is_zero() {
        for folder in folders() {
            let path = folder.path().join("journal");
            let file = MappedFile::open(&path).unwrap();
            assert_eq!(file.len().unwrap(), STEP);
            file.write_at(&[1; 100], 4090).unwrap();
            // Across the end of what is reserved.
            file.write_at(&[2; 100], STEP - 50).unwrap();
            assert_eq!(file.len().unwrap(), 2 * STEP);
            // Nothing is told to the kernel at the end, as when the process is killed.
            let copy = std::fs::read(&path).unwrap();
            assert_eq!((copy[4089], copy[4090], copy[4189], copy[4190]), (0, 1, 1, 0));
            drop(file);
            let file = MappedFile::open(&path).unwrap();
            let mut found = [9; 102];
            file.read_at(&mut found, STEP - 51).unwrap();
            assert_eq!((found[0], found[1], found[100], found[101]), (0, 2, 2, 0));
        }
    }

    #[test]
    fn memory_is_mapped_and_cut_by_nobody() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = MappedFile::open(&folder.path().join("journal")).unwrap();
        assert!(is_mapped(&file));
        assert_eq!(file.set_len(1).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(file.len().unwrap(), STEP);
        file.set_len(STEP + 1).unwrap();
        file.write_at(&[1], 2 * STEP - 1).unwrap();
        assert_eq!(file.write_at(&[1], u64::MAX).unwrap_err().kind(), ErrorKind::NoSpace);
        let again = MappedFile::open(&folder.path().join("journal")).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Busy);
    }

    /// A file system of its own; unmounted when this is dropped.
    struct Mount(tempfile::TempDir);

    impl Mount {
        fn tmpfs() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut mount = Command::new("mount");
            mount.args(["-t", "tmpfs", "-o", "size=4M", "tmpfs"]).arg(folder.path());
            assert!(mount.status().unwrap().success());
            Self(folder)
        }

        /// `make` makes the file system in the image file that it gets as its last argument.
        fn of(make: &[&str]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let image = tempfile::NamedTempFile::new().unwrap();
            image.as_file().set_len(400 << 20).unwrap();
            let made = Command::new(make[0]).args(&make[1..]).arg(image.path()).output().unwrap();
            assert!(made.status.success(), "{made:?}");
            let mounted = Command::new("mount").arg("-oloop").arg(image.path()).arg(folder.path()).output();
            assert!(mounted.as_ref().unwrap().status.success(), "{mounted:?}");
            Self(folder)
        }

        fn fill(&self) {
            let mut file = File::create(self.0.path().join("filler")).unwrap();
            while file.write_all(&[1; 1 << 16]).is_ok() {}
            while file.write_all(&[1; 512]).is_ok() {}
            let _ = file.sync_all();
        }
    }

    impl Drop for Mount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
        }
    }

    /// A store to a page that the host has no room for ends the process: nothing would be left to fail this test.
    fn on_a_full_host(mount: &Mount, mapped: bool) {
        let path = mount.0.path().join("journal");
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(is_mapped(&file), mapped);
        mount.fill();
        for round in 0..3_u8 {
            let written: Vec<bool> =
                (0..STEP / 4096).map(|page| file.write_at(&[round; 64], page * 4096).is_ok()).collect();
            assert!(!mapped || written.iter().all(|written| *written), "what is reserved needs no room");
            let _ = file.sync();
        }
        let full = file.write_at(&[1; 64], STEP).unwrap_err();
        assert_eq!(full.kind(), ErrorKind::NoSpace);
        assert!(full.to_string().contains("reserve 2097152 bytes"), "{full}");
        assert_eq!(file.len().unwrap(), STEP);
        let fresh = MappedFile::open(&mount.0.path().join("fresh")).unwrap_err();
        assert_eq!(fresh.kind(), ErrorKind::NoSpace);
        std::fs::remove_file(mount.0.path().join("filler")).unwrap();
        file.sync().unwrap();
        file.write_at(&[1; 64], STEP).unwrap();
    }

    #[test]
    #[ignore = "needs root and loop devices"]
    fn a_full_host_is_an_error_and_not_the_end() {
        on_a_full_host(&Mount::tmpfs(), true);
        on_a_full_host(&Mount::of(&["mkfs.ext4", "-q"]), true);
        on_a_full_host(&Mount::of(&["mkfs.xfs", "-q"]), true);
        on_a_full_host(&Mount::of(&["mkfs.btrfs", "-q"]), false);
    }
}
