//! A manager over one disk in a folder of its own, for tests of what can only be seen from inside.

#![allow(clippy::unwrap_used, reason = "a failed step of a test ends it")]

use std::fs::File;
use std::path::PathBuf;

use block::{WriteErrors, write_disk};
use hostio::Cache;
use tempfile::TempDir;

use crate::backing::AllowedFolders;
use crate::manager::{DiskConfig, FreezeDefaults, Manager};
use crate::model::{CreateRequest, FreezePolicy, ImageFormat};

/// Bytes of the disk `vda`.
pub(crate) const SIZE: u64 = 8 << 20;

pub(crate) struct Bench {
    folder: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join("base.raw")).unwrap().set_len(SIZE).unwrap();
        Self { folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn open(&self) -> Manager {
        self.open_with(None)
    }

    pub(crate) fn open_with(&self, max_overlays: Option<u32>) -> Manager {
        let disk = DiskConfig {
            id: "vda".to_owned(),
            path: self.path("base.raw"),
            format: ImageFormat::Raw,
            read_only: false,
            cache: Cache::Writeback,
            metadata_cache: crate::DEFAULT_METADATA_CACHE,
            write_errors: WriteErrors::default(),
            max_overlays,
        };
        let (state, folders) = (self.path("state"), AllowedFolders::default());
        Manager::open(&state, &[disk], folders, FreezeDefaults::default(), None).unwrap()
    }
}

pub(crate) fn snapshot(manager: &Manager, name: &str) {
    let freeze = Some(FreezePolicy::Never);
    manager.create(CreateRequest { name: name.to_owned(), disks: None, freeze }).unwrap();
}

/// Writes 4 KiB.
pub(crate) fn stamp(manager: &Manager, offset: u64, byte: u8) {
    write_disk(&**manager.chain("vda").unwrap(), offset, &[byte; 4096]).unwrap();
}
