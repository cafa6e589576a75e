//! What requests do, in each style of replies.

use super::*;
use crate::proto::request::flag;
use crate::transmit::PIECE;

/// Errors as numbers ("Error values").
const PERM: u32 = 1;
const IO: u32 = 5;
const INVAL: u32 = 22;
const NOSPC: u32 = 28;

fn write(client: &mut Client<UnixStream>, flags: u16, offset: u64, payload: &[u8]) -> u32 {
    let extra = if client.style == Style::Extended { flag::PAYLOAD_LEN } else { 0 };
    let ask = Ask { flags: flags | extra, command: command::WRITE, offset, len: payload.len() as u64 };
    client.ask_with(ask, payload).unwrap().error
}

#[test]
fn what_is_written_is_read_in_every_style() {
    for style in STYLES {
        let storage = memory();
        let rig = Rig::new(Config::default(), Arc::clone(&storage) as _);
        let mut client = rig.client(style);
        let mut expected = pattern(0, SIZE);
        // Less than a piece, more than one, and not aligned to anything.
        for (offset, len, fill) in [(0, 512, 1), (4095, 70_001, 2), (100_000, PIECE as usize * 2 + 77, 3)] {
            assert_eq!(write(&mut client, 0, offset as u64, &vec![fill; len]), 0);
            expected[offset..offset + len].fill(fill);
        }
        assert_eq!(client.error(0, command::WRITE_ZEROES, 50_000, 8192), 0);
        expected[50_000..58_192].fill(0);
        assert_eq!(client.error(flag::NO_HOLE | flag::FUA, command::WRITE_ZEROES, 1, 2), 0);
        expected[1..3].fill(0);
        assert_eq!(client.error(0, command::TRIM, 2 << 20, 4096), 0);
        expected[2 << 20..(2 << 20) + 4096].fill(0);
        assert_eq!(client.error(0, command::FLUSH, 0, 0), 0);
        assert_eq!(client.error(0, command::CACHE, 12, 1 << 20), 0);
        assert!(storage.bytes() == expected);
        for (offset, len) in [(0, SIZE), (1, 1), (4000, 100_000), (SIZE - 1, 1), (100, PIECE as usize)] {
            let df = if style == Style::Simple { 0 } else { flag::DF };
            for flags in [0, df] {
                let answer = client.ask(flags, command::READ, offset as u64, len as u64).unwrap();
                assert_eq!(answer.error, 0);
                let base = if style == Style::Simple { 0 } else { offset as u64 };
                assert!(
                    answer.bytes(base, len) == expected[offset..offset + len],
                    "{style:?} {offset} {len}"
                );
                assert!(flags == 0 || answer.content.len() == 1, "it was fragmented");
            }
        }
    }
}

#[test]
fn requests_that_make_no_sense_get_their_error_and_the_next_is_served() {
    let end = SIZE as u64;
    let asked = [
        (0, command::READ, end, 1, INVAL),
        (0, command::READ, end - 1, 2, INVAL),
        (0, command::READ, u64::MAX, 2, INVAL),
        (0, command::READ, 0, (32 << 20) + 1, INVAL),
        (0, command::READ, 0, u64::from(u32::MAX), INVAL),
        (0, command::CACHE, 0, (32 << 20) + 1, INVAL),
        (0, command::TRIM, end - 1, 2, NOSPC),
        (0, command::TRIM, u64::MAX, 1, NOSPC),
        (0, command::WRITE_ZEROES, end, 1, NOSPC),
        (0, command::BLOCK_STATUS, 0, 4096, INVAL),
        (0, 8, 0, 1, INVAL),
        (0, u16::MAX, 0, 0, INVAL),
        (1 << 4, command::WRITE_ZEROES, 0, 1, INVAL),
        (flag::NO_HOLE, command::TRIM, 0, 1, INVAL),
        (flag::DF, command::FLUSH, 0, 0, INVAL),
        (flag::REQ_ONE, command::READ, 0, 1, INVAL),
        (0xffc0, command::READ, 0, 1, INVAL),
        (flag::FUA, command::READ, 0, 1, 0),
        (flag::FUA, command::FLUSH, 0, 0, 0),
        (flag::FUA, command::CACHE, 0, 1, 0),
        (0, command::FLUSH, 77, 77, 0),
        (0, command::TRIM, 0, 0, 0),
        (0, command::READ, 0, 0, 0),
        (0, command::READ, end, 0, 0),
    ];
    for style in STYLES {
        let rig = Rig::new(Config::default(), memory());
        let mut client = rig.client(style);
        for (flags, number, offset, len, error) in asked {
            let story = format!("{style:?} {flags:#x} {number} {offset} {len}");
            assert_eq!(client.error(flags, number, offset, len), error, "{story}");
        }
        assert_eq!(write(&mut client, 0, end - 1, &[1, 2]), NOSPC);
        assert_eq!(write(&mut client, 0, u64::MAX, &[1; 1000]), NOSPC);
        assert_eq!(write(&mut client, 1 << 9, 0, &[1; PIECE as usize + 1000]), INVAL);
        assert_eq!(write(&mut client, 0, 0, &[]), 0);
    }
}

#[test]
fn what_is_read_only_is_not_written() {
    for (disk_refuses, export_refuses) in [(true, false), (false, true)] {
        let storage = memory();
        let disk = RawDisk::new(Arc::clone(&storage) as _, disk_refuses).unwrap();
        let export = Export::new("vda", Arc::new(disk));
        let rig = Rig::with(Config::default(), if export_refuses { export } else { export.writable() });
        assert!(!rig.server.exports()[0].writable);
        for style in STYLES {
            let mut client = rig.client(style);
            assert_eq!(write(&mut client, 0, 0, &[1; 512]), PERM);
            assert_eq!(client.error(0, command::TRIM, 0, 512), PERM);
            assert_eq!(client.error(0, command::WRITE_ZEROES, 0, 512), PERM);
            assert_eq!(client.error(0, command::READ, 0, 512), 0);
        }
        assert!(storage.bytes() == pattern(0, SIZE));
    }
}

#[test]
fn with_extended_headers_a_payload_is_dropped_where_none_belongs() {
    let rig = Rig::new(Config::default(), memory());
    let mut client = rig.client(Style::Extended);
    for number in [command::READ, command::BLOCK_STATUS, command::TRIM, 99] {
        let ask = Ask { flags: flag::PAYLOAD_LEN, command: number, offset: 0, len: 600_000 };
        assert_eq!(client.ask_with(ask, &vec![1; 600_000]).unwrap().error, INVAL);
    }
    // QEMU does not set the flag on writes.
    let ask = Ask { flags: 0, command: command::WRITE, offset: 0, len: 512 };
    assert_eq!(client.ask_with(ask, &[1; 512]).unwrap().error, 0);
    assert_eq!(client.error(0, command::WRITE_ZEROES, 0, u64::MAX), NOSPC);
    assert_eq!(client.error(0, command::READ, 0, 512), 0);
}

#[test]
fn a_read_that_fails_says_so_in_every_style() {
    let mut replies = Vec::new();
    for style in STYLES {
        let storage = Arc::new(FaultStorage::new(MemStorage::from(pattern(0, SIZE))));
        let rig = Rig::new(Config::default(), Arc::clone(&storage) as _);
        let mut client = rig.client(style);
        storage.fail_reads(1);
        assert_eq!(client.error(0, command::READ, 0, 4096), IO);
        assert_eq!(client.error(0, command::READ, 0, 4096), 0);
        if style != Style::Simple {
            storage.fail_reads(1);
            let answer = client.ask(flag::DF, command::READ, 0, 2 * PIECE).unwrap();
            assert_eq!(answer.error, IO);
            assert_eq!(answer.bytes(0, 2 * PIECE as usize).len(), 2 * PIECE as usize, "the chunk is whole");
        }
        // More than a piece is sent while it is read.
        storage.fail_reads(u64::MAX);
        replies.push(client.ask(0, command::READ, 0, 2 * PIECE).map(|answer| answer.error));
    }
    assert_eq!(replies, [None, Some(IO), Some(IO)], "a simple reply has begun: the server hangs up");
}

#[test]
fn errors_of_the_disk_are_told_by_their_kind() {
    for (kind, errno) in [
        (ErrorKind::NoSpace, NOSPC),
        (ErrorKind::Unsupported, 95),
        (ErrorKind::Latched, IO),
        (ErrorKind::ReadOnly, PERM),
        (ErrorKind::OutOfRange, INVAL),
    ] {
        assert_eq!(crate::proto::Errno::from(kind) as u32, errno);
    }
    let storage = Arc::new(FaultStorage::new(MemStorage::new(SIZE)));
    let rig = Rig::new(Config::default(), Arc::clone(&storage) as _);
    let mut client = rig.client(Style::Structured);
    storage.limit_len(0);
    assert_eq!(write(&mut client, 0, 0, &[1; 512]), NOSPC);
    assert_eq!(write(&mut client, 0, 0, &[1; 3 * PIECE as usize]), NOSPC, "what follows is dropped");
    storage.limit_len(u64::MAX);
    storage.fail_syncs(1);
    assert_eq!(write(&mut client, flag::FUA, 0, &[1; 512]), IO);
    assert_eq!(client.error(0, command::FLUSH, 0, 0), IO, "a failed sync is final");
}

#[test]
fn flush_and_fua_are_honoured() {
    let storage = Arc::new(CrashStorage::new());
    storage.set_len(SIZE as u64).unwrap();
    storage.sync().unwrap();
    let rig = Rig::new(Config::default(), Arc::clone(&storage) as _);
    let mut client = rig.client(Style::Structured);
    assert_eq!(write(&mut client, 0, 0, &[1; 512]), 0);
    assert!(storage.unsynced() > 0);
    assert_eq!(client.error(0, command::FLUSH, 0, 0), 0);
    assert_eq!(storage.unsynced(), 0);
    assert_eq!(write(&mut client, flag::FUA, 0, &[1; 512]), 0);
    assert_eq!(storage.unsynced(), 0);
    for number in [command::TRIM, command::WRITE_ZEROES] {
        assert_eq!(client.error(0, number, 0, 4096), 0);
        assert!(storage.unsynced() > 0);
        assert_eq!(client.error(flag::FUA, number, 0, 4096), 0);
        assert_eq!(storage.unsynced(), 0);
    }
    // Another client's flush covers what this one was told.
    assert_eq!(write(&mut client, 0, 0, &[2; 512]), 0);
    assert_eq!(rig.client(Style::Simple).error(0, command::FLUSH, 0, 0), 0);
    assert_eq!(storage.unsynced(), 0);
    let disk = Arc::new(RawDisk::new(Arc::clone(&storage) as _, false).unwrap());
    rig.server.add_export(Export::new("through", disk).writable().writethrough()).unwrap();
    let mut client = rig.greet();
    client.go(Style::Structured, "through");
    assert_eq!(write(&mut client, 0, 0, &[3; 512]), 0);
    assert_eq!(storage.unsynced(), 0);
}

#[test]
fn status_is_told_of_each_selected_context() {
    let bitmap = Arc::new(block::DirtyBitmap::new(SIZE as u64, 16).unwrap());
    bitmap.mark(ByteRange { offset: 65536, len: 10 });
    let disk = Arc::new(RawDisk::new(memory(), true).unwrap());
    let context = Arc::new(crate::BitmapContext::new("b0", bitmap));
    let export =
        Export::new("vda", Arc::clone(&disk) as Arc<dyn Disk>).layers(vec![disk], true).context(context);
    let rig = Rig::with(Config::default(), export);
    for style in [Style::Structured, Style::Extended] {
        let mut client = rig.greet();
        let code = if style == Style::Structured { 8 } else { 11 };
        assert_eq!(client.verdict(code, &[]), Some(1));
        let queries = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"];
        assert_eq!(client.verdict(10, &meta_data("vda", &queries)), Some(1));
        assert_eq!(client.verdict(7, &info_data("vda", &[])), Some(1));
        client.style = style;
        let status = client.ask(0, command::BLOCK_STATUS, 4096, 1 << 20).unwrap().status;
        let dirty = vec![(61440, 0), (65536, 1), ((1 << 20) - 126_976, 0)];
        let expected = [(0, vec![(1 << 20, 0)]), (1, vec![(1 << 20, 1)]), (2, dirty)];
        assert_eq!(status.into_iter().collect::<Vec<_>>(), expected);
        let status = client.ask(flag::REQ_ONE, command::BLOCK_STATUS, 4096, 1 << 20).unwrap().status;
        assert_eq!(status[&2], [(61440, 0)]);
        assert_eq!(client.error(0, command::BLOCK_STATUS, 0, 0), INVAL);
        assert_eq!(client.error(0, command::BLOCK_STATUS, 1, SIZE as u64), INVAL);
    }
}

#[test]
fn holes_of_a_raw_file_are_not_sent_and_not_read() {
    const DATA: u64 = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let file = hostio::HostFile::create(&folder.path().join("raw"), hostio::Cache::Writeback).unwrap();
    file.set_len(SIZE as u64).unwrap();
    file.write_at(&[7; 65536], DATA).unwrap();
    let rig = Rig::new(Config::default(), Arc::new(file));
    let mut expected = vec![0; SIZE];
    expected[DATA as usize..DATA as usize + 65536].fill(7);
    for style in STYLES {
        let mut client = rig.client(style);
        // From its beginning, and from within the data.
        for offset in [0, DATA + 4096] {
            let len = SIZE - offset as usize;
            let answer = client.ask(0, command::READ, offset, len as u64).unwrap();
            let base = if style == Style::Simple { 0 } else { offset };
            assert!(answer.bytes(base, len) == expected[offset as usize..], "{style:?}");
            let data: usize =
                answer.content.iter().filter_map(|(_, part)| Some(part.as_ref().ok()?.len())).sum();
            let least = if style == Style::Simple { len } else { (DATA + 65536 - offset.max(DATA)) as usize };
            assert_eq!(data, least, "{style:?}");
        }
    }
}
