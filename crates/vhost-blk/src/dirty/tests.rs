use super::*;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, Permissions};

use crate::guest::{Memory, Segment};

const PAGES: u64 = 64;

fn file(bytes: u64) -> OwnedFd {
    let file = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, bytes).unwrap();
    file
}

/// A log of as many pages, and its bits.
fn log() -> (Dirty, Arc<Log>) {
    let log = Arc::new(Log::map(file(PAGES / 8), 0, PAGES / 8).unwrap());
    let dirty = Dirty::new(1);
    dirty.set_log(Arc::clone(&log));
    (dirty, log)
}

fn marked(log: &Log) -> Vec<u64> {
    let bits =
        |page: u64| log.0.as_volatile_slice().read_obj::<u8>((page / 8) as usize).unwrap() >> (page % 8) & 1;
    (0..PAGES).filter(|page| bits(*page) == 1).collect()
}

#[test]
fn the_pages_that_were_written_to_are_marked_and_no_others() {
    let (dirty, log) = log();
    let begin = [(0x1000, 1), (0x5fff, 2), (0x9000, 0x1000), (0xb001, 0x1fff), (0x20000, 0)];
    for (addr, len) in begin {
        log.mark(GuestAddress(addr), len);
    }
    assert_eq!(marked(&log), [1, 5, 6, 9, 11, 12]);
    // What there is no bit for.
    log.mark(GuestAddress(PAGES * PAGE - 1), 2 * PAGE);
    log.mark(GuestAddress(u64::MAX), 2);
    assert_eq!(marked(&log), [1, 5, 6, 9, 11, 12, 63]);
    assert!(!dirty.is_on() && dirty.marks(0, 16).is_none(), "LOG_ALL is not negotiated");
    dirty.set_all(true);
    assert!(dirty.is_on());
}

#[test]
fn a_used_ring_is_marked_where_it_is_written_to_if_it_is_to_be() {
    let (dirty, log) = log();
    dirty.set_all(true);
    dirty.marks(0, 1024).unwrap().entry(1);
    assert!(marked(&log).is_empty(), "the front-end did not say where");
    // 1024 entries: header in page 2, entries up to page 4, where the word for kicks is.
    dirty.set_used(0, Some(0x2000));
    dirty.set_used(7, Some(0));
    let marks = dirty.marks(0, 1024).unwrap();
    marks.entry(1);
    assert_eq!(marked(&log), [2]);
    // Entry 1023 ends in the page behind.
    marks.entry(0);
    assert_eq!(marked(&log), [2, 3, 4]);
    drop(marks);
    dirty.set_used(0, Some(0x12000));
    dirty.marks(0, 1024).unwrap().notification();
    assert_eq!(marked(&log), [2, 3, 4, 18, 20]);
}

/// A piece that was moved in part begins later than the request did, and the request crosses from one region into the next.
#[test]
fn all_of_a_request_that_was_read_is_marked_and_nothing_of_one_that_was_written() {
    let (dirty, log) = log();
    dirty.set_all(true);
    let memory = Memory::from_ranges(&[(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)]).unwrap();
    let hold = Arc::new(Arc::new(memory));
    let range = block::ByteRange { offset: 0, len: 0x4000 };
    for (op, expected) in [(Op::Write(range), vec![1]), (Op::Read(range), vec![1, 6, 7, 8, 9])] {
        let mut slot = Slot { op: Some(op), status_at: Some(GuestAddress(0x1234)), ..Slot::default() };
        let segments = [Segment { addr: GuestAddress(0x6000), len: 0x4000 }];
        assert!(slot.buffer.map(&hold, &segments, Permissions::Write));
        assert_eq!(slot.buffer.advance(slot.buffer.whole(), 0x1800), 0..2);
        assert_eq!(slot.buffer.advance(slot.buffer.whole(), 0x400), 0..2);
        dirty.marks(0, 16).unwrap().request(&slot);
        assert_eq!(marked(&log), expected);
    }
}

#[test]
fn a_log_that_its_file_does_not_have_is_refused() {
    assert!(Log::map(file(4096), 0, 4096).is_ok());
    for (offset, size) in [(0, 0), (0, 4097), (4096, 1), (1, 4095), (u64::MAX, 4096), (0, u64::MAX)] {
        let refused = Log::map(file(4096), offset, size).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{size} from {offset} on");
    }
}
