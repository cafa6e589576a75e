//! XFS against xfsprogs.
//!
//! Records are appended to the log that mkfs made, with transactions as Linux writes them; xfs_logprint has to find
//! the same head, tail and content.

use snapshot::probe::{FsKind, FsVerdict, Verdict};

use crate::disk::Image;
use crate::expect;
use crate::tools::{ask, run};

const BLOCK: usize = 512;
const START: u8 = 1;
const COMMIT: u8 = 2;
const UNMOUNT: u8 = 0x20;

pub(crate) fn make(options: &[&str]) -> Image {
    let image = Image::new(300 << 20);
    run("mkfs.xfs", &[&["-q", "-L", "data"], options, &[image.path()]].concat());
    image
}

/// Writes records at the end of the log of an image that mkfs has just made.
pub(crate) struct LogWriter<'a> {
    image: &'a Image,
    /// The log's first byte and its number of blocks.
    start: u64,
    blocks: u64,
    cycle: u32,
    head: u64,
    uuid: Vec<u8>,
}

impl<'a> LogWriter<'a> {
    pub(crate) fn new(image: &'a Image) -> Self {
        let block = image.read(0, 512);
        let be32 = |at: usize| u64::from(u32::from_be_bytes(block[at..at + 4].try_into().unwrap()));
        let start = u64::from_be_bytes(block[48..56].try_into().unwrap());
        let (group, within) = (start >> block[124], start & ((1 << block[124]) - 1));
        let start = (group * be32(84) + within) * be32(4);
        // mkfs leaves one unmount record, and zeroes.
        Self {
            image,
            start,
            blocks: be32(96) * be32(4) / 512,
            cycle: 1,
            head: 2,
            uuid: block[32..48].to_vec(),
        }
    }

    /// Writes zeroes, with their cycle, up to where only `left` blocks are left before the ring's end.
    pub(crate) fn skip_to_end(&mut self, left: u64) {
        let (from, to) = (self.head, self.blocks - left);
        let mut bytes = vec![0; (to - from) as usize * BLOCK];
        bytes.chunks_exact_mut(BLOCK).for_each(|block| block[..4].copy_from_slice(&self.cycle.to_be_bytes()));
        self.image.write(self.start + from * BLOCK as u64, &bytes);
        self.head = to;
    }

    /// Appends a record that holds `operations` (flags and data); the place it begins at, as the log counts.
    pub(crate) fn record(&mut self, tail: u64, operations: &[(u8, Vec<u8>)]) -> u64 {
        let mut data = Vec::new();
        for (flags, bytes) in operations {
            data.extend(0x1234_5678_u32.to_be_bytes());
            data.extend((bytes.len() as u32).to_be_bytes());
            // The client: a transaction, or the log itself.
            data.extend([if *flags == UNMOUNT { 0xaa } else { 0x69 }, *flags, 0, 0]);
            data.extend(bytes);
        }
        data.resize(data.len().next_multiple_of(BLOCK), 0);
        let lsn = u64::from(self.cycle) << 32 | self.head;
        let mut header = vec![0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &0xfeed_babe_u32.to_be_bytes());
        put(4, &self.cycle.to_be_bytes());
        put(8, &2_u32.to_be_bytes());
        put(12, &(data.len() as u32).to_be_bytes());
        put(16, &lsn.to_be_bytes());
        put(24, &tail.to_be_bytes());
        put(40, &(operations.len() as u32).to_be_bytes());
        put(300, &1_u32.to_be_bytes());
        put(304, &self.uuid);
        put(320, &(32_u32 << 10).to_be_bytes());
        for (index, block) in data.chunks_exact(BLOCK).enumerate() {
            put(44 + 4 * index, &block[..4]);
        }
        self.block(&header, true);
        data.chunks_exact(BLOCK).for_each(|block| self.block(block, false));
        lsn
    }

    fn block(&mut self, bytes: &[u8], is_header: bool) {
        let mut bytes = bytes.to_vec();
        let cycle_at = if is_header { 4 } else { 0 };
        // In a record that goes on at the ring's start the cycle of the blocks there is the next one.
        bytes[cycle_at..cycle_at + 4].copy_from_slice(&self.cycle.to_be_bytes());
        self.image.write(self.start + self.head * BLOCK as u64, &bytes);
        self.head += 1;
        if self.head == self.blocks {
            (self.head, self.cycle) = (0, self.cycle + 1);
        }
    }
}

/// A transaction that logs 128 bytes of the buffer at a disk address.
pub(crate) fn transaction(address: u64) -> Vec<(u8, Vec<u8>)> {
    let mut header = 0x5452_414e_u32.to_le_bytes().to_vec();
    header.extend([40_u32, 1, 2].iter().flat_map(|word| word.to_le_bytes()));
    let mut format =
        [0x123c_u16, 2, 0x9000, 1].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    format.extend(address.to_le_bytes());
    format.extend([1_u32, 1].iter().flat_map(|word| word.to_le_bytes()));
    let mut logged = b"XFSB".to_vec();
    logged.resize(128, 0);
    vec![(START, vec![]), (0, header), (0, format), (0, logged), (COMMIT, vec![])]
}

fn unmount_record() -> Vec<(u8, Vec<u8>)> {
    vec![(UNMOUNT, [0x556e_u16.to_le_bytes().to_vec(), vec![0; 6]].concat())]
}

fn logprint(image: &Image) -> String {
    run("xfs_logprint", &["-t", image.path()]).text
}

fn expect_both(image: &Image, verdict: Verdict, state: &str) -> (FsVerdict, String) {
    let said = logprint(image);
    assert!(said.contains(state), "{said}");
    (expect(image, FsKind::Xfs, verdict), said)
}

#[test]
fn new_ones_of_all_layouts_are_clean_and_xfs_repair_agrees() {
    let layouts: [&[&str]; 5] = [
        &[],
        &["-m", "crc=0"],
        &["-m", "crc=0", "-l", "version=1"],
        &["-s", "size=4096"],
        &["-l", "su=256k"],
    ];
    for options in layouts {
        let image = make(options);
        let (found, _) = expect_both(&image, Verdict::Clean, "<CLEAN>");
        assert_eq!(found.label.as_deref(), Some("data"));
        assert!(found.detail.contains("unmount record"), "{options:?}: {}", found.detail);
        assert_eq!(ask("xfs_repair", &["-n", image.path()]).status, 0);
    }
}

#[test]
fn transactions_between_tail_and_head_need_replay() {
    let image = make(&[]);
    let mut log = LogWriter::new(&image);
    let tail = 1 << 32 | 2;
    log.record(tail, &transaction(0));
    log.record(tail, &transaction(8));
    let (_, said) = expect_both(&image, Verdict::Replay, "<DIRTY>");
    assert!(said.contains("log tail: 2 head: 6"), "{said}");
    assert_ne!(ask("xfs_repair", &["-n", image.path()]).status, 0);
}

#[test]
fn a_log_covered_by_the_super_block_is_clean_though_the_tools_call_it_dirty() {
    let image = make(&[]);
    let mut log = LogWriter::new(&image);
    let tail = log.record(1 << 32 | 2, &transaction(8));
    let tail = log.record(tail, &transaction(0));
    log.record(tail, &transaction(0));
    let (found, said) = expect_both(&image, Verdict::Clean, "<DIRTY>");
    assert!(found.detail.contains("covered"), "{}", found.detail);
    assert_eq!(said.matches("SUPER Block Buffer").count(), 2);
}

#[test]
fn an_old_kernels_freeze_is_an_unmount_record_and_the_super_block() {
    let image = make(&[]);
    let mut log = LogWriter::new(&image);
    let tail = log.record(1 << 32 | 2, &transaction(8));
    let tail = log.record(tail, &unmount_record());
    expect_both(&image, Verdict::Clean, "<CLEAN>");
    log.record(tail, &transaction(0));
    let (found, _) = expect_both(&image, Verdict::Clean, "<DIRTY>");
    assert!(found.detail.contains("covered"), "{}", found.detail);
}

#[test]
fn records_around_the_end_of_the_ring_are_followed() {
    for left in 1..=5 {
        let image = make(&[]);
        let mut log = LogWriter::new(&image);
        log.skip_to_end(left);
        let tail = log.record(1 << 32 | 2, &transaction(0));
        log.record(tail, &transaction(0));
        expect_both(&image, Verdict::Clean, "<DIRTY>");
        log.record(tail, &transaction(8));
        expect_both(&image, Verdict::Replay, "<DIRTY>");
        let tail = log.record(tail, &transaction(0));
        log.record(tail, &unmount_record());
        expect_both(&image, Verdict::Clean, "<CLEAN>");
    }
}

#[test]
fn a_record_whose_last_block_is_not_written_needs_replay() {
    let image = make(&[]);
    let mut log = LogWriter::new(&image);
    let tail = log.record(1 << 32 | 2, &transaction(0));
    log.record(tail, &transaction(0));
    let end = log.start + (log.head - 1) * BLOCK as u64;
    image.write(end, &[0; BLOCK]);
    let found = expect(&image, FsKind::Xfs, Verdict::Replay);
    assert!(found.detail.contains("within a write"), "{}", found.detail);
}

#[test]
fn a_log_elsewhere_is_not_guessed_at() {
    let (image, log) = (Image::new(300 << 20), Image::new(70 << 20));
    run("mkfs.xfs", &["-q", "-l", &format!("logdev={},size=64m", log.path()), image.path()]);
    expect(&image, FsKind::Xfs, Verdict::Unknown);
}

#[test]
fn a_damaged_super_block_is_dirty() {
    let image = make(&[]);
    image.write(108, b"other");
    assert_ne!(ask("xfs_repair", &["-n", image.path()]).status, 0);
    expect(&image, FsKind::Xfs, Verdict::Dirty);
}
