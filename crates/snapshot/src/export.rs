//! Export: one disk of a snapshot, whole, as a new raw or qcow2 file.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{ByteRange, Context, Disk, Error, ErrorKind, Extent, Result, Source, Storage, write_disk};
use hostio::{Cache, HostFile, Open};
use qcow2::{CreateOptions, Image, Journal, Mode, Parts};

use crate::layer::MAX_PENDING;
use crate::model::ImageFormat;

/// How much is read at once; also the granularity in which progress is told.
const CHUNK: u64 = 1 << 20;

/// How much is looked up at once. A long chain is asked layer by layer, and each has a table to load, whose entries are of as
/// much and more.
const WINDOW: u64 = 16 << 20;

/// What is not written if it is all zeroes, so that the file stays as sparse as the disk.
const GRAIN: usize = 4096;

/// Told as the export goes on: bytes of the disk done, and of it in all. What it returns says whether to go on.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// Writes `disk` to the new file `out`. It appears under its name only when it is whole and on stable storage; on an
/// error, and when it is called off, nothing is left behind. An existing file is never overwritten.
pub(crate) fn export(disk: &dyn Disk, out: &Path, format: ImageFormat, progress: Progress<'_>) -> Result<()> {
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

fn write(disk: &dyn Disk, file: HostFile, format: ImageFormat, progress: Progress<'_>) -> Result<()> {
    let file = Arc::new(file);
    match format {
        ImageFormat::Raw => {
            file.set_len(disk.capacity())?;
            copy(disk, &mut |bytes, offset| file.write_at(bytes, offset), progress)?;
            file.sync()
        }
        ImageFormat::Qcow2 => {
            qcow2::create(&*file, &CreateOptions::overlay(disk.capacity(), None))?;
            let journal = Journal::nowhere()?;
            let image = Image::open(Parts::new(file, None), Mode::Writable(journal))?;
            let mut put = |bytes: &[u8], offset| {
                write_disk(&image, offset, bytes)?;
                if image.pending() > MAX_PENDING { image.flush().run() } else { Ok(()) }
            };
            copy(disk, &mut put, progress)?;
            image.flush().run()
        }
    }
}

/// Hands every run of bytes of `disk` that is not zero to `put`.
fn copy(
    disk: &dyn Disk,
    put: &mut dyn FnMut(&[u8], u64) -> Result<()>,
    progress: Progress<'_>,
) -> Result<()> {
    let capacity = disk.capacity();
    let (mut extents, mut buffer) = (Vec::new(), Vec::new());
    let (mut offset, mut told) = (0, 0);
    while offset < capacity {
        extents.clear();
        disk.resolve_read(ByteRange { offset, len: WINDOW.min(capacity - offset) }, &mut extents)?;
        for extent in &extents {
            let end = offset + extent.len;
            while offset < end {
                offset += copy_piece(extent, extent.len - (end - offset), offset, &mut buffer, put)?;
                if offset - told < CHUNK && offset < capacity {
                    continue;
                }
                told = offset;
                if progress(offset, capacity).is_break() {
                    return Err(Error::new(ErrorKind::Busy, "the export was called off"));
                }
            }
        }
    }
    Ok(())
}

/// Copies a piece of an extent, from `done` on; how long it was. `to` is where it belongs on the disk.
fn copy_piece(
    extent: &Extent,
    done: u64,
    to: u64,
    buffer: &mut Vec<u8>,
    put: &mut dyn FnMut(&[u8], u64) -> Result<()>,
) -> Result<u64> {
    let len = CHUNK.min(extent.len - done);
    match &extent.source {
        Source::Zero => return Ok(extent.len - done),
        Source::File { storage, offset } => {
            let range = ByteRange { offset: offset + done, len };
            copy_extent(&**storage, range, to, buffer, put)?;
        }
        Source::Bytes { bytes, offset } => {
            let bytes = bytes.get(offset + done as usize..).and_then(|rest| rest.get(..len as usize));
            put(bytes.unwrap_or_default(), to)?;
        }
    }
    Ok(len)
}

/// Copies the part of a file that is data, skipping its holes; `to` is where `range` belongs on the disk.
fn copy_extent(
    storage: &dyn Storage,
    range: ByteRange,
    to: u64,
    buffer: &mut Vec<u8>,
    put: &mut dyn FnMut(&[u8], u64) -> Result<()>,
) -> Result<()> {
    let mut from = range.offset;
    while from < range.end() {
        let rest = ByteRange { offset: from, len: range.end() - from };
        let Some(data) = storage.next_data(from)?.and_then(|data| data.intersect(rest)) else { break };
        // At most a chunk long, so this buffer is bounded.
        buffer.resize(data.len as usize, 0);
        storage.read_at(buffer, data.offset)?;
        put_grains(buffer, to + (data.offset - range.offset), put)?;
        from = data.end();
    }
    Ok(())
}

/// Puts the runs of `bytes` that are not all zeroes.
fn put_grains(bytes: &[u8], to: u64, put: &mut dyn FnMut(&[u8], u64) -> Result<()>) -> Result<()> {
    let is_zero = |grain: &&[u8]| grain.iter().all(|&byte| byte == 0);
    let mut grains = bytes.chunks(GRAIN).peekable();
    let mut start = 0;
    while let Some(first) = grains.next() {
        let zero = is_zero(&first);
        let mut end = start + first.len();
        while let Some(grain) = grains.next_if(|grain| is_zero(grain) == zero) {
            end += grain.len();
        }
        if !zero {
            put(&bytes[start..end], to + start as u64)?;
        }
        start = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::testing::MemStorage;
    use block::{RawDisk, read_disk};

    fn disk() -> (Vec<u8>, RawDisk) {
        let mut bytes = vec![0; 3 * CHUNK as usize + 512];
        bytes[5 * GRAIN + 7] = 1;
        bytes[CHUNK as usize - 1..CHUNK as usize + 2 * GRAIN].fill(2);
        *bytes.last_mut().unwrap() = 3;
        (bytes.clone(), RawDisk::new(Arc::new(MemStorage::from(bytes)), true).unwrap())
    }

    #[test]
    fn a_raw_export_is_the_disk_and_sparse() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.raw");
        let (bytes, disk) = disk();
        let mut told = Vec::new();
        export(&disk, &out, ImageFormat::Raw, &mut |done, total| {
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
        export(&disk, &out, ImageFormat::Qcow2, &mut |_, _| ControlFlow::Continue(())).unwrap();
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
        let error = export(&disk, &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(std::fs::read(&out).unwrap(), b"mine");

        let error = export(&disk, &folder.path().join("no/out"), ImageFormat::Raw, &mut |_, _| {
            ControlFlow::Continue(())
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "no snapshot and no disk was not found");

        let storage = block::testing::FaultStorage::new(MemStorage::from(vec![1; 4096]));
        storage.fail_reads(1);
        let failing = RawDisk::new(Arc::new(storage), true).unwrap();
        let out = folder.path().join("none.raw");
        export(&failing, &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
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
                export(&disk, &folder.path().join("out"), format, &mut go_on).unwrap_err();
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
        let error = export(&disk, &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(partial.exists());
        // The first one is killed, and leaves its file.
        drop(first);
        std::fs::write(&partial, "a rest").unwrap();
        export(&disk, &out, ImageFormat::Raw, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert!(std::fs::read(&out).unwrap() == bytes);
        assert!(!partial.exists());
    }
}
