//! Chains as no driver of good will makes them.

use super::*;
use crate::chain::Table;
use virtio_queue::desc::RawDescriptor as Raw;
use virtio_queue::desc::split::Descriptor;
use vm_memory::Permissions;

type Desc = (u64, u32, u16, u16);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const TABLE: u64 = 0x1000;
/// Where tests put headers and data.
const DATA: u64 = 0x10000;
/// A second table, for indirect descriptors.
const OTHER: u64 = 0x8000;
const SIZE: u16 = 16;

fn memory() -> Memory {
    // Two regions that touch at 0x18000.
    Memory::from_ranges(&[(GuestAddress(0), 0x18000), (GuestAddress(0x18000), 0x8000)]).unwrap()
}

fn put(memory: &Memory, table: u64, descriptors: &[Desc]) {
    for (index, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
        let raw = Raw::from(Descriptor::new(addr, len, flags, next));
        memory.write_obj(raw, GuestAddress(table + 16 * index as u64)).unwrap();
    }
}

fn header(memory: &Memory, addr: u64, kind: u32, sector: u64) {
    memory.write_obj(kind, GuestAddress(addr)).unwrap();
    memory.write_obj(0_u32, GuestAddress(addr + 4)).unwrap();
    memory.write_obj(sector, GuestAddress(addr + 8)).unwrap();
}

/// Reads the chain that starts at descriptor 0.
fn read(memory: &Memory) -> (Request, Segments) {
    let chain = Chain::new(memory, Table { addr: GuestAddress(TABLE), size: SIZE }, 0);
    let mut segments = Segments::default();
    (segments.read(memory, chain), segments)
}

fn ask(kind: u32, sector: u64, descriptors: &[Desc]) -> Request {
    let memory = memory();
    header(&memory, DATA, kind, sector);
    put(&memory, TABLE, descriptors);
    read(&memory).0
}

fn refused(status: Status) -> Op {
    Op::Refuse(status)
}

#[test]
fn a_plain_read_and_a_plain_write() {
    let read = [(DATA, 16, NEXT, 1), (DATA + 0x1000, 4096, NEXT | WRITE, 2), (DATA + 16, 1, WRITE, 0)];
    let range = ByteRange { offset: 5 * 512, len: 4096 };
    let status = Some(GuestAddress(DATA + 16));
    assert_eq!(ask(VIRTIO_BLK_T_IN, 5, &read), Request { op: Op::Read(range), status });
    let write = [(DATA, 16, NEXT, 1), (DATA + 0x1000, 4096, NEXT, 2), (DATA + 16, 1, WRITE, 0)];
    assert_eq!(ask(VIRTIO_BLK_T_OUT, 5, &write), Request { op: Op::Write(range), status });
}

#[test]
fn chains_without_an_end_are_not_answered() {
    let head = (DATA, 16, NEXT, 1);
    let tables: &[(&str, &[Desc])] = &[
        ("a loop onto itself", &[(DATA, 16, NEXT, 0)]),
        ("a loop of two", &[head, (DATA + 16, 1, WRITE | NEXT, 0)]),
        ("a writable loop", &[head, (DATA + 0x100, 512, WRITE | NEXT, 1)]),
        ("a next past the table", &[head, (DATA + 16, 1, WRITE | NEXT, SIZE)]),
        ("a next far past the table", &[(DATA, 16, NEXT, u16::MAX)]),
        ("readable after writable", &[head, (DATA + 16, 1, WRITE | NEXT, 2), (DATA, 16, 0, 0)]),
        ("an indirect table of odd length", &[(OTHER, 17, INDIRECT, 0)]),
        ("an indirect table of length 0", &[(OTHER, 0, INDIRECT, 0)]),
        ("an indirect table out of memory", &[(0x4000_0000, 48, INDIRECT, 0)]),
        ("an indirect table that wraps", &[(u64::MAX - 15, 48, INDIRECT, 0)]),
        ("an indirect table that is too long", &[(OTHER, 0x10_0000, INDIRECT, 0)]),
        ("more than 4 GiB in all", &[(DATA, u32::MAX, NEXT, 1), (DATA, u32::MAX, WRITE, 0)]),
    ];
    for (story, table) in tables {
        let expected = Request { op: refused(Status::IoError), status: None };
        assert_eq!(ask(VIRTIO_BLK_T_IN, 0, table), expected, "{story}");
    }
}

#[test]
fn an_indirect_table_in_another_is_not_answered() {
    let memory = memory();
    header(&memory, DATA, VIRTIO_BLK_T_FLUSH, 0);
    put(&memory, TABLE, &[(OTHER, 48, INDIRECT, 0)]);
    put(&memory, OTHER, &[(DATA, 16, NEXT, 1), (OTHER, 48, INDIRECT, 0)]);
    assert_eq!(read(&memory).0.status, None);
}

#[test]
fn a_huge_indirect_loop_ends() {
    let memory = memory();
    header(&memory, DATA, VIRTIO_BLK_T_FLUSH, 0);
    put(&memory, TABLE, &[(OTHER, 16 * 0xfff, INDIRECT, 0)]);
    put(&memory, OTHER, &[(DATA, 16, NEXT, 0)]);
    assert_eq!(read(&memory).0.status, None);
}

#[test]
fn an_indirect_request_is_read_like_a_direct_one() {
    let memory = memory();
    header(&memory, DATA, VIRTIO_BLK_T_IN, 1);
    put(&memory, TABLE, &[(DATA, 7, NEXT, 1), (OTHER, 64, INDIRECT, 0)]);
    let rest =
        [(DATA + 7, 9, NEXT, 1), (DATA + 0x1000, 512, WRITE | NEXT, 2), (DATA + 0x5000, 513, WRITE, 0)];
    put(&memory, OTHER, &rest);
    let (request, segments) = read(&memory);
    assert_eq!(request.op, Op::Read(ByteRange { offset: 512, len: 1024 }));
    assert_eq!(request.status, Some(GuestAddress(DATA + 0x5000 + 512)));
    assert_eq!(segments.data(&request.op).len(), 2);
}

#[test]
fn headers_may_be_cut_anywhere_and_the_status_may_be_part_of_the_data() {
    for cut in 0..=16 {
        let chain = [
            (DATA, cut, NEXT, 1),
            (DATA + u64::from(cut), 16 - cut + 512, NEXT, 2),
            (DATA + 0x2000, 0, NEXT, 3),
            (DATA + 0x3000, 1, WRITE, 0),
        ];
        let range = ByteRange { offset: 9 * 512, len: 512 };
        let expected = Request { op: Op::Write(range), status: Some(GuestAddress(DATA + 0x3000)) };
        assert_eq!(ask(VIRTIO_BLK_T_OUT, 9, &chain), expected, "cut after {cut}");
    }
    let merged = [(DATA, 16, NEXT, 1), (DATA + 0x1000, 1025, WRITE, 0)];
    assert_eq!(ask(VIRTIO_BLK_T_IN, 0, &merged).op, Op::Read(ByteRange { offset: 0, len: 1024 }));
    let empty_end = [(DATA, 16, NEXT, 1), (DATA + 0x1000, 513, WRITE | NEXT, 2), (DATA, 0, WRITE, 0)];
    assert_eq!(ask(VIRTIO_BLK_T_IN, 0, &empty_end).op, Op::Read(ByteRange { offset: 0, len: 512 }));
}

#[test]
fn a_header_across_two_regions_is_read() {
    let memory = memory();
    header(&memory, 0x17ff8, VIRTIO_BLK_T_FLUSH, 0);
    put(&memory, TABLE, &[(0x17ff8, 16, NEXT, 1), (DATA, 1, WRITE, 0)]);
    assert_eq!(read(&memory).0.op, Op::Flush);
}

#[test]
fn requests_that_make_no_sense_are_answered_with_an_error() {
    let status = (DATA + 0x800, 1, WRITE, 0);
    let data = (DATA + 0x1000, 512, WRITE | NEXT, 2);
    let tables: &[(&str, u32, u64, &[Desc])] = &[
        ("no data", VIRTIO_BLK_T_IN, 0, &[(DATA, 16, NEXT, 1), status]),
        ("a short header", VIRTIO_BLK_T_IN, 0, &[(DATA, 15, NEXT, 1), data, status]),
        ("no header", VIRTIO_BLK_T_IN, 0, &[(DATA, 512, WRITE | NEXT, 1), status]),
        ("a header out of memory", VIRTIO_BLK_T_IN, 0, &[(0x4000_0000, 16, NEXT, 1), data, status]),
        ("a header that wraps", VIRTIO_BLK_T_IN, 0, &[(u64::MAX - 3, 16, NEXT, 1), data, status]),
        (
            "part of a sector",
            VIRTIO_BLK_T_IN,
            0,
            &[(DATA, 16, NEXT, 1), (DATA, 511, WRITE | NEXT, 2), status],
        ),
        ("a write into guest memory", VIRTIO_BLK_T_OUT, 0, &[(DATA, 16, NEXT, 1), data, status]),
        ("a read from guest memory", VIRTIO_BLK_T_IN, 0, &[(DATA, 528, NEXT, 1), status]),
        (
            "a sector past all offsets",
            VIRTIO_BLK_T_IN,
            u64::MAX / 512 + 1,
            &[(DATA, 16, NEXT, 1), data, status],
        ),
        ("an end past all offsets", VIRTIO_BLK_T_IN, u64::MAX / 512, &[(DATA, 16, NEXT, 1), data, status]),
        ("too much", VIRTIO_BLK_T_IN, 0, &[(DATA, 16, NEXT, 1), (DATA, 1 << 28, WRITE | NEXT, 2), status]),
        ("no discard range", VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, NEXT, 1), status]),
        ("two discard ranges", VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 48, NEXT, 1), status]),
    ];
    for (story, kind, sector, table) in tables {
        let request = ask(*kind, *sector, table);
        assert_eq!(request.op, refused(Status::IoError), "{story}");
        assert_eq!(request.status, Some(GuestAddress(DATA + 0x800)), "{story}");
    }
    for (kind, supported) in [(VIRTIO_BLK_T_FLUSH, true), (2, false), (14, false), (u32::MAX, false)] {
        let request = ask(kind, 0, &[(DATA, 16, NEXT, 1), status]);
        assert_eq!(request.op == refused(Status::Unsupported), !supported, "type {kind}");
    }
    assert_eq!(ask(VIRTIO_BLK_T_FLUSH, 0, &[(DATA, 16, 0, 0)]).status, None);
}

#[test]
fn discards_and_write_zeroes_say_their_range_and_flags() {
    let zero = |kind, sectors: u32, flags: u32| {
        let memory = memory();
        header(&memory, DATA, kind, 0);
        memory.write_obj(8_u64, GuestAddress(DATA + 16)).unwrap();
        memory.write_obj(sectors, GuestAddress(DATA + 24)).unwrap();
        memory.write_obj(flags, GuestAddress(DATA + 28)).unwrap();
        put(&memory, TABLE, &[(DATA, 20, NEXT, 1), (DATA + 20, 12, NEXT, 2), (DATA + 0x800, 1, WRITE, 0)]);
        read(&memory).0.op
    };
    let range = ByteRange { offset: 4096, len: 4096 };
    assert_eq!(zero(VIRTIO_BLK_T_DISCARD, 8, 0), Op::Discard(range));
    assert_eq!(zero(VIRTIO_BLK_T_DISCARD, 8, 1), refused(Status::Unsupported));
    assert_eq!(zero(VIRTIO_BLK_T_WRITE_ZEROES, 8, 1), Op::WriteZeroes { range, unmap: true });
    assert_eq!(zero(VIRTIO_BLK_T_WRITE_ZEROES, 8, 0), Op::WriteZeroes { range, unmap: false });
    assert_eq!(zero(VIRTIO_BLK_T_WRITE_ZEROES, 8, 2), refused(Status::Unsupported));
    assert_eq!(zero(VIRTIO_BLK_T_WRITE_ZEROES, 0, 0), refused(Status::IoError));
    assert_eq!(zero(VIRTIO_BLK_T_WRITE_ZEROES, MAX_ZERO_SECTORS + 1, 0), refused(Status::IoError));
}

/// Random tables: whatever is in them, reading ends, and what is accepted keeps its promises.
#[test]
fn random_chains_never_harm() {
    let memory = memory();
    let hold = std::sync::Arc::new(std::sync::Arc::new(memory.clone()));
    let mut buffer = crate::guest::GuestBuffer::default();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut accepted = 0;
    for _ in 0..20_000 {
        let kind = [0, 1, 4, 8, 11, 13, 99][(random() % 7) as usize];
        header(&memory, DATA, kind, random() >> (random() % 64));
        for table in [TABLE, OTHER] {
            // A sound request, but for a field in four.
            let mut descriptors =
                [(DATA, 16, NEXT, 1), (DATA + 0x1000, 512, NEXT, 2), (DATA + 0x800, 1, WRITE, 3)];
            if kind == VIRTIO_BLK_T_IN {
                descriptors[1].2 |= WRITE;
            }
            for (addr, len, flags, next) in &mut descriptors {
                match random() % 16 {
                    0 => {
                        *addr = [DATA + random() % 0x8000, 0x17fff, OTHER, random()][(random() % 4) as usize]
                    }
                    1 => *len = [0, 1, 17, 48, 1024, random() as u32][(random() % 6) as usize],
                    2 => *flags = [NEXT, NEXT | WRITE, WRITE, 0, INDIRECT][(random() % 5) as usize],
                    3 => *next = [0, 1, 2, SIZE, random() as u16][(random() % 5) as usize],
                    _ => {}
                }
            }
            put(&memory, table, &descriptors);
        }
        let (request, segments) = read(&memory);
        if let Op::Read(range) | Op::Write(range) = request.op {
            accepted += 1;
            assert!(range.len > 0 && range.len.is_multiple_of(SECTOR) && range.offset.is_multiple_of(SECTOR));
            let data = segments.data(&request.op);
            assert_eq!(total(data), range.len);
            if buffer.map(&hold, data, Permissions::Write) {
                assert!(buffer.cut(0, range.len) <= MAX_IOVECS);
            }
        }
    }
    assert!(accepted > 50, "only {accepted} chains were sound: the test tests nothing");
}
