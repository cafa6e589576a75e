use super::*;

use block::testing::MemStorage;
use vm_memory::Bytes;

/// Two regions that touch at 0x2000, and a hole from 0x4000 on.
fn hold() -> Hold {
    let ranges = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x2000)];
    Arc::new(Arc::new(Memory::from_ranges(&ranges).unwrap()))
}

fn segment(addr: u64, len: u32) -> Segment {
    Segment { addr: GuestAddress(addr), len }
}

#[test]
fn a_segment_across_two_regions_is_one_piece_of_data() {
    let hold = hold();
    let mut buffer = GuestBuffer::default();
    assert!(buffer.map(&hold, &[segment(0x1e00, 0x400)], Permissions::Write));
    assert_eq!(buffer.iovecs.len(), 2);
    assert_eq!(buffer.copy_from(buffer.whole(), &[9; 0x400]), 0x400);
    let mut found = [0; 0x402];
    hold.read_slice(&mut found, GuestAddress(0x1dff)).unwrap();
    assert_eq!((found[0], found[1], found[0x400], found[0x401]), (0, 9, 9, 0));
    buffer.fill_zero(1..2);
    hold.read_slice(&mut found, GuestAddress(0x1dff)).unwrap();
    assert_eq!((found[0x200], found[0x201]), (9, 0));
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let (hold, mut buffer) = (hold(), GuestBuffer::default());
    for (addr, len) in [(0, 1), (0xfff, 2), (0x3fff, 2), (0x4000, 1), (u64::MAX, 1), (u64::MAX - 1, u32::MAX)]
    {
        assert!(!buffer.map(&hold, &[segment(addr, len)], Permissions::Read), "{addr:#x}+{len:#x}");
    }
    let many = vec![segment(0x1000, 1); MAX_IOVECS + 1];
    assert!(!buffer.map(&hold, &many, Permissions::Read));
    assert!(buffer.map(&hold, &many[1..], Permissions::Read));
}

#[test]
fn cutting_and_advancing_lose_no_byte() {
    let (hold, mut buffer) = (hold(), GuestBuffer::default());
    assert!(buffer.map(&hold, &[segment(0x1000, 1000), segment(0x2000, 24)], Permissions::Read));
    let first = buffer.cut(0, 512);
    let second = buffer.cut(first, 512);
    assert_eq!((first, second), (1, 3));
    let lens: Vec<_> = buffer.iovecs.iter().map(|found| found.iov_len).collect();
    assert_eq!(lens, [512, 488, 24]);
    assert_eq!(buffer.advance(1..3, 500), 2..3);
    assert_eq!(buffer.iovecs[2].iov_len, 12);
    assert_eq!(buffer.advance(2..3, 12), 3..3);
    assert_eq!(buffer.iovecs[0].iov_len, 512);
}

#[test]
fn a_buffer_that_was_moved_in_part_is_moved_whole_the_next_time() {
    let (hold, mut buffer) = (hold(), GuestBuffer::default());
    assert!(buffer.map(&hold, &[segment(0x1000, 100), segment(0x2000, 50)], Permissions::Write));
    let pieces = |buffer: &GuestBuffer| -> Vec<_> {
        buffer.iovecs.iter().map(|found| (found.iov_base.addr(), found.iov_len)).collect()
    };
    let whole = pieces(&buffer);
    let rest = [30, 30, 60].into_iter().fold(buffer.whole(), |rest, done| buffer.advance(rest, done));
    assert_eq!((rest, buffer.iovecs[1].iov_len), (1..2, 30));
    buffer.rewind();
    assert_eq!(pieces(&buffer), whole);
    assert_eq!(buffer.copy_from(buffer.whole(), &[1; 200]), 150);
}

#[test]
fn a_bounce_buffer_smaller_than_the_data_is_used_again() {
    let (hold, mut buffer) = (hold(), GuestBuffer::default());
    let storage = MemStorage::from((0..=255).cycle().take(4096).collect::<Vec<u8>>());
    assert!(buffer.map(&hold, &[segment(0x1f00, 0x300)], Permissions::Write));
    buffer.read_bounced(0..2, &storage, 10, &mut [0; 100]).unwrap();
    let mut found = [0; 0x300];
    hold.read_slice(&mut found, GuestAddress(0x1f00)).unwrap();
    assert!(found.iter().enumerate().all(|(i, &byte)| byte == ((i + 10) % 256) as u8));
    buffer.write_bounced(0..2, &storage, 2000, &mut [0; 77]).unwrap();
    assert_eq!(storage.bytes()[2000..2768], found);
}

#[test]
fn the_hold_keeps_the_memory_when_the_map_is_gone() {
    let mut buffer = GuestBuffer::default();
    assert!(buffer.map(&hold(), &[segment(0x1000, 16)], Permissions::Write));
    assert_eq!(buffer.copy_from(buffer.whole(), &[5; 32]), 16);
    buffer.clear();
    assert!(buffer.memory().is_none());
}
