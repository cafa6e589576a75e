#![allow(unsafe_code, reason = "a mapped writer is the point of this module")]

use std::fs::File;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync};

use crate::Result;
use crate::record::SIZE;

/// A file's pages, mapped and shared; never unmapped, as the writer runs until it is killed.
pub(crate) struct Mapping {
    start: *mut u8,
    pages: usize,
}

impl Mapping {
    /// Maps the first `pages` pages of a file that is at least as long.
    pub(crate) fn new(file: &File, pages: usize) -> Result<Self> {
        if file.metadata()?.len() < (pages * SIZE) as u64 {
            return Err("the file is too short to be mapped".into());
        }
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                pages * SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        Ok(Self { start: start.cast(), pages })
    }

    /// Stores `value` into the first word of a page. It waits while the file system is frozen and the page clean.
    pub(crate) fn stamp(&self, page: usize, value: u64) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        // SAFETY: the page lies within the mapping.
        let word = unsafe { self.start.add(page * SIZE) }.cast::<AtomicU64>();
        // SAFETY: it is mapped until the program ends, aligned as a page is, and nothing here reads or writes it
        // otherwise.
        let word = unsafe { &*word };
        word.store(value, Ordering::Release);
    }

    /// Writes the mapped pages out and waits for them.
    pub(crate) fn sync(&self) -> Result<()> {
        // SAFETY: the range is the mapping's own.
        unsafe { msync(self.start.cast(), self.pages * SIZE, MsyncFlags::SYNC)? };
        Ok(())
    }
}
