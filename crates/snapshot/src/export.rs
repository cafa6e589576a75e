//! Export: one disk of a snapshot, whole, as a new raw or qcow2 file.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Context, Disk, Error, ErrorKind, RawDisk, Result, Storage};
use hostio::{Cache, HostFile, Open};
use qcow2::{CreateOptions, Image, Journal, Mode, Parts};

use crate::copy::{CopyFailure, DiskCopy};
use crate::layer::MAX_PENDING;
use crate::model::ImageFormat;

/// How often progress is told, in bytes of the disk.
const CHUNK: u64 = 1 << 20;

/// Told as the export goes on: bytes of the disk done, and of it in all. What it returns says whether to go on.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// Writes `disk` to the new file `out`. It appears under its name only when it is whole and on stable storage; on an
/// error, and when it is called off, nothing is left behind. An existing file is never overwritten.
pub(crate) fn export(
    disk: Arc<dyn Disk>,
    out: &Path,
    format: ImageFormat,
    progress: Progress<'_>,
) -> Result<()> {
    refuse_existing(out)?;
    check_folder(out)?;
    let partial = partial_name(out)?;
    let file = create_partial(&partial)?;
    let written = write(disk, file, format, progress).and_then(|()| publish(&partial, out));
    written.inspect_err(|_| {
        // The error to tell is the export's; a rest that can not be removed is named like one.
        let _ = std::fs::remove_file(&partial);
    })
}

/// Creates the file that an export writes. The rest of one that was killed is replaced; one that is being written is
/// locked by whoever writes it.
fn create_partial(path: &Path) -> Result<HostFile> {
    let how = Open { writable: true, cache: Cache::Writeback };
    let stale = match HostFile::open(path, how) {
        Ok(stale) => Some(stale),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error.context("another export to the same file may be under way")),
    };
    if stale.is_some() {
        hostio::remove_file(path)?;
    }
    // The old one stays locked until here, so that two who find it do not remove each other's.
    HostFile::create(path, Cache::Writeback)
}

/// Gives a whole, synced file its name, for good.
fn publish(partial: &Path, out: &Path) -> Result<()> {
    refuse_existing(out)?;
    std::fs::rename(partial, out).context(|| format!("rename {} to its name", partial.display()))?;
    hostio::sync_dir(folder_of(out))
}

fn folder_of(out: &Path) -> &Path {
    out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Not left to the system's `NotFound`, by which clients are told that there is no such snapshot or disk.
fn check_folder(out: &Path) -> Result<()> {
    let folder = folder_of(out);
    match folder.is_dir() {
        true => Ok(()),
        false => {
            let story = format!("there is no folder {}: make it first", folder.display());
            Err(Error::new(ErrorKind::InvalidInput, story))
        }
    }
}

fn refuse_existing(out: &Path) -> Result<()> {
    if out.symlink_metadata().is_err() {
        return Ok(());
    }
    let story = format!("{} exists already: remove it, or choose another name", out.display());
    Err(Error::new(ErrorKind::Busy, story))
}

fn partial_name(out: &Path) -> Result<PathBuf> {
    let name = out.file_name().ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, format!("'{}' is not a file name", out.display()))
    })?;
    let mut partial = name.to_owned();
    partial.push(".partial");
    Ok(out.with_file_name(partial))
}

fn write(disk: Arc<dyn Disk>, file: HostFile, format: ImageFormat, progress: Progress<'_>) -> Result<()> {
    let file = Arc::new(file);
    match format {
        ImageFormat::Raw => {
            file.set_len(disk.capacity())?;
            let target = Arc::new(RawDisk::new(file, false)?);
            copy(disk, target, &|| Ok(()), progress)
        }
        ImageFormat::Qcow2 => {
            qcow2::create(&*file, &CreateOptions::overlay(disk.capacity(), None))?;
            let journal = Journal::nowhere()?;
            let image = Arc::new(Image::open(Parts::new(file, None), Mode::Writable(journal))?);
            let relieve = || if image.pending() > MAX_PENDING { image.flush().run() } else { Ok(()) };
            copy(disk, Arc::clone(&image) as _, &relieve, progress)
        }
    }
}

/// Copies all, and brings it onto stable storage. After each piece `relieve` may write out what waits in memory.
fn copy(
    disk: Arc<dyn Disk>,
    target: Arc<dyn Disk>,
    relieve: &dyn Fn() -> Result<()>,
    progress: Progress<'_>,
) -> Result<()> {
    let capacity = disk.capacity();
    let mut copy = DiskCopy::new(disk, Arc::clone(&target), None);
    let (mut done, mut told) = (0, 0);
    while let Some(copied) = copy.step(u64::MAX).map_err(CopyFailure::error)? {
        relieve()?;
        done += copied;
        if done - told < CHUNK && done < capacity {
            continue;
        }
        told = done;
        if progress(done, capacity).is_break() {
            return Err(Error::new(ErrorKind::Busy, "the export was called off"));
        }
    }
    target.flush().run()
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::read_disk;
    use block::testing::MemStorage;

    const GRAIN: usize = 4096;

    fn disk() -> (Vec<u8>, Arc<RawDisk>) {
        let mut bytes = vec![0; 3 * CHUNK as usize + 512];
        bytes[5 * GRAIN + 7] = 1;
        bytes[CHUNK as usize - 1..CHUNK as usize + 2 * GRAIN].fill(2);
        *bytes.last_mut().unwrap() = 3;
        (bytes.clone(), Arc::new(RawDisk::new(Arc::new(MemStorage::from(bytes)), true).unwrap()))
    }

    #[test]
    fn a_raw_export_is_the_disk_and_sparse() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.raw");
        let (bytes, disk) = disk();
        let mut told = Vec::new();
        export(disk.clone(), &out, ImageFormat::Raw, &mut |done, total| {
            told.push((done, total));
            ControlFlow::Continue(())
        })
        .unwrap();
        assert!(std::fs::read(&out).unwrap() == bytes);
        assert!(out.metadata().unwrap().blocks() * 512 <= 10 * GRAIN as u64);
        assert_eq!(told.last(), Some(&(disk.capacity(), disk.capacity())));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_qcow2_export_is_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.qcow2");
        let (bytes, disk) = disk();
        export(disk.clone(), &out, ImageFormat::Qcow2, &mut |_, _| ControlFlow::Continue(())).unwrap();
        let how = Open { writable: false, cache: Cache::Writeback };
        let image =
            Image::open(Parts::new(Arc::new(HostFile::open(&out, how).unwrap()), None), Mode::ReadOnly)
                .unwrap();
        let mut found = vec![0; bytes.len()];
        read_disk(&image, 0, &mut found).unwrap();
        assert!(found == bytes);
    }

    #[test]
    fn what_exists_is_not_overwritten_and_a_failure_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.raw");
        std::fs::write(&out, "mine").unwrap();
        let (_, disk) = disk();
        let error =
            export(disk.clone(), &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(std::fs::read(&out).unwrap(), b"mine");

        let error = export(disk.clone(), &folder.path().join("no/out"), ImageFormat::Raw, &mut |_, _| {
            ControlFlow::Continue(())
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "no snapshot and no disk was not found");

        let storage = block::testing::FaultStorage::new(MemStorage::from(vec![1; 4096]));
        storage.fail_reads(1);
        let failing = RawDisk::new(Arc::new(storage), true).unwrap();
        let out = folder.path().join("none.raw");
        export(Arc::new(failing), &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    /// Even at its last piece.
    #[test]
    fn an_export_that_is_called_off_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (_, disk) = disk();
        for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
            for last in [0, disk.capacity()] {
                let mut go_on = |done, _| match done > last || done == disk.capacity() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                };
                export(disk.clone(), &folder.path().join("out"), format, &mut go_on).unwrap_err();
                assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
            }
        }
    }

    #[test]
    fn two_exports_to_one_file_do_not_spoil_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let (out, partial) = (folder.path().join("out.raw"), folder.path().join("out.raw.partial"));
        let (bytes, disk) = disk();
        let first = create_partial(&partial).unwrap();
        let error =
            export(disk.clone(), &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(partial.exists());
        // The first one is killed, and leaves its file.
        drop(first);
        std::fs::write(&partial, "a rest").unwrap();
        export(disk.clone(), &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert!(std::fs::read(&out).unwrap() == bytes);
        assert!(!partial.exists());
    }
}
