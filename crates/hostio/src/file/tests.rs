//! Files and devices as they are opened, locked and asked.

use std::process::Command;

use super::*;

const WRITE: Open = Open { writable: true, cache: Cache::Writeback };
const READ: Open = Open { writable: false, cache: Cache::Writeback };

#[test]
fn holes_are_found_and_made() {
    let folder = tempfile::tempdir().unwrap();
    let file = HostFile::create(&folder.path().join("a"), Cache::Writeback).unwrap();
    file.set_len(1 << 20).unwrap();
    assert_eq!(file.next_data(0).unwrap(), None);
    file.write_at(&[1; 65536], 65536).unwrap();
    assert_eq!(file.next_data(0).unwrap(), ByteRange::new(65536, 65536));
    assert_eq!(file.next_data(65536 + 4096).unwrap(), ByteRange::new(65536 + 4096, 65536 - 4096));
    assert_eq!(file.next_data(0).unwrap(), ByteRange::new(65536, 65536));
    file.punch_hole(ByteRange { offset: 65536, len: 65536 }).unwrap();
    assert_eq!(file.next_data(0).unwrap(), None);
    assert_eq!(file.len().unwrap(), 1 << 20);
}

#[test]
fn one_writer_or_many_readers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let writer = HostFile::create(&path, Cache::Writeback).unwrap();
    assert_eq!(HostFile::open(&path, WRITE).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(HostFile::open(&path, READ).unwrap_err().kind(), ErrorKind::Busy);
    writer.downgrade().unwrap();
    let reader = HostFile::open(&path, READ).unwrap();
    assert_eq!(HostFile::open(&path, WRITE).unwrap_err().kind(), ErrorKind::Busy);
    drop((writer, reader));
    HostFile::open(&path, WRITE).unwrap();
}

/// A job writes to an image that the chain reads on, and other programs may read it before and after.
#[test]
fn a_reader_becomes_the_only_writer_unless_others_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    drop(HostFile::create(&path, Cache::Writeback).unwrap());
    let (ours, other) = (HostFile::open(&path, READ).unwrap(), HostFile::open(&path, READ).unwrap());
    assert_eq!(ours.reopen_for_writing().unwrap_err().kind(), ErrorKind::Busy);
    drop(other);
    assert_eq!(HostFile::open(&path, WRITE).unwrap_err().kind(), ErrorKind::Busy, "it is read as before");
    let writer = ours.reopen_for_writing().unwrap();
    writer.write_at(&[1; 512], 0).unwrap();
    for how in [READ, WRITE] {
        assert_eq!(HostFile::open(&path, how).unwrap_err().kind(), ErrorKind::Busy);
    }
    writer.downgrade().unwrap();
    HostFile::open(&path, READ).unwrap();
    drop(ours);
    assert_eq!(HostFile::open(&path, WRITE).unwrap_err().kind(), ErrorKind::Busy);
    writer.reopen_for_writing().unwrap();
}

#[test]
fn after_a_turn_at_writing_a_reader_keeps_writers_away_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    drop(HostFile::create(&path, Cache::Writeback).unwrap());
    let reader = Arc::new(HostFile::open(&path, READ).unwrap());
    let turn = Writing::begin(Arc::clone(&reader)).unwrap();
    turn.file().write_at(&[1; 512], 0).unwrap();
    assert_eq!(HostFile::open(&path, READ).unwrap_err().kind(), ErrorKind::Busy);
    drop(turn);
    assert_eq!(HostFile::open(&path, WRITE).unwrap_err().kind(), ErrorKind::Busy);
    HostFile::open(&path, READ).unwrap();
}

/// A guest may write zeroes to any sector, also of a disk on a device with blocks of 4 KiB.
#[test]
#[ignore = "needs root and loop devices"]
fn a_device_with_large_blocks_can_not_punch_a_single_sector() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let losetup = |arguments: &[&str]| Command::new("losetup").args(arguments).output();
    let path = file.path().to_str().unwrap();
    let made = losetup(&["--sector-size", "4096", "--show", "--find", path]).unwrap();
    assert!(made.status.success(), "no loop device: {made:?}");
    let device = String::from_utf8(made.stdout).unwrap();
    let opened = HostFile::open(Path::new(device.trim()), WRITE);
    let punch = |offset, len| opened.as_ref().map(|file| file.punch_hole(ByteRange { offset, len }));
    let (sector, block) = (punch(512, 512), punch(4096, 4096));
    losetup(&["--detach", device.trim()]).unwrap();
    assert_eq!(sector.unwrap().unwrap_err().kind(), ErrorKind::Unsupported);
    block.unwrap().unwrap();
}

#[test]
fn data_io_may_wait_and_notes_no_time_of_access() {
    let folder = tempfile::tempdir().unwrap();
    for cache in [Cache::Writeback, Cache::None] {
        let file = match HostFile::create(&folder.path().join(format!("{cache:?}")), cache) {
            // Temporary files may be in memory, and older kernels have no direct I/O there.
            Err(error) if cache == Cache::None && error.kind() == ErrorKind::InvalidInput => continue,
            file => file.unwrap(),
        };
        let flags = fcntl_getfl(file.fd().unwrap()).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK), "io_uring would fail with EAGAIN: {flags:?}");
        assert!(flags.contains(OFlags::NOATIME), "each read would look at the inode: {flags:?}");
        assert_eq!(flags.contains(OFlags::DIRECT), cache == Cache::None);
    }
}

#[test]
fn what_is_only_in_memory_is_known() {
    let file =
        HostFile::create(&tempfile::tempdir_in("/dev/shm").unwrap().path().join("a"), Cache::Writeback);
    assert!(file.unwrap().in_memory());
    let open = HostFile::open(Path::new("/proc/self/exe"), READ).unwrap();
    assert!(!open.in_memory());
}

#[test]
fn only_files_and_devices() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(HostFile::open(folder.path(), READ).unwrap_err().kind(), ErrorKind::InvalidInput);
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert_eq!(HostFile::open(&fifo, READ).unwrap_err().kind(), ErrorKind::InvalidInput);
    let missing = HostFile::open(&folder.path().join("b"), READ).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}
