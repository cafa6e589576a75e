//! Files of which a sync has failed: the page cache may show what never came to the disk.
//!
//! After an error the kernel marks the pages that it could not write as clean. They are read as if all was well until memory
//! is needed, then the disk's old bytes are back; and the next sync succeeds, for nothing is dirty. So what a process
//! before this one could not sync has to leave the page cache before anybody may rely on what is read, or on a sync.
#![allow(unsafe_code, reason = "mincore(2) has no safe wrapper")]

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use block::{Context, Error, ErrorKind, Result, Storage};
use memmap2::MmapOptions;
use rustix::fs::{Advice, fadvise};

use super::{HostFile, is_tmpfs};

/// Pages are looked for in so many bytes at once.
const WINDOW: u64 = 1 << 30;

/// In bytes. Larger ones only make for fewer.
const SMALLEST_PAGE: usize = 4096;

/// Somebody who just reads or writes a page keeps it: it is tried so often, [`PAUSE`] apart.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

impl HostFile {
    /// Whether a [`sync`](Storage::sync) of this handle has failed.
    pub fn sync_has_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }

    /// Syncs the file and has the page cache forget it: what is read from here on is what the disk has. To be called before
    /// anything of the file is relied on.
    ///
    /// Errors: what the sync says; [`ErrorKind::Busy`] if pages stay in memory, as those do that another process has mapped.
    pub fn forget_cached(&self) -> Result<()> {
        // A device is named in a tmpfs too.
        if !self.is_device && is_tmpfs(&self.file)? {
            // There is nothing but memory.
            return Ok(());
        }
        self.sync()?;
        for _ in 0..TRIES {
            fadvise(&self.file, 0, None, Advice::DontNeed).map_err(std::io::Error::from)?;
            if !self.is_cached()? {
                return Ok(());
            }
            thread::sleep(PAUSE);
        }
        let story = format!(
            "a sync of {} has failed, and the page cache, which does not show what is on the disk, can not be emptied: end \
             who else uses the file, or restart the host",
            self.path.display()
        );
        Err(Error::new(ErrorKind::Busy, story))
    }

    /// Whether any page of it is in memory.
    fn is_cached(&self) -> Result<bool> {
        let len = self.len()?;
        for offset in (0..len).step_by(WINDOW as usize) {
            if self.is_window_cached(offset, WINDOW.min(len - offset) as usize)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn is_window_cached(&self, offset: u64, len: usize) -> Result<bool> {
        let map = MmapOptions::new().offset(offset).len(len).map_raw_read_only(&self.file)?;
        let mut pages = vec![0_u8; len.div_ceil(SMALLEST_PAGE)];
        // SAFETY: the mapping is `len` bytes long, and `pages` has a byte at least for each of its pages. None of them is touched.
        let status = unsafe { libc::mincore(map.as_mut_ptr().cast(), map.len(), pages.as_mut_ptr()) };
        if status != 0 {
            return Err(std::io::Error::last_os_error()).context(|| "look for pages in memory");
        }
        // The other bits mean nothing.
        Ok(pages.iter().any(|page| page & 1 != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cache;

    #[test]
    fn what_is_forgotten_is_read_from_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let file = HostFile::create(&folder.path().join("a"), Cache::Writeback).unwrap();
        let has_a_disk = !is_tmpfs(&file.file).unwrap();
        file.write_at(&[1; 1 << 20], 0).unwrap();
        assert!(file.is_cached().unwrap());
        file.forget_cached().unwrap();
        assert_eq!(file.is_cached().unwrap(), !has_a_disk);
        let mut byte = [0];
        file.read_at(&mut byte, 4096).unwrap();
        assert_eq!(byte, [1]);
        assert!(file.is_cached().unwrap());
    }
}
