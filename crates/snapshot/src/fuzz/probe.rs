//! A disk of any content, probed.

use std::sync::{Arc, Mutex};

use block::testing::Input;
use block::{ByteRange, Error, ErrorKind, RawDisk, Result, Storage};

use crate::probe::{FsKind, FsVerdict, Verdict};

/// The most one disk may cost: 128 partitions, each with every signature's place looked at.
const MOST_READS: usize = 16_000;
const MOST_BYTES: u64 = 64 << 20;
/// Pieces that are put on a disk of zeroes.
const MAX_PIECES: usize = 64;

/// Zeroes, but for some pieces; it notes what is read.
#[derive(Debug)]
struct Sparse {
    len: u64,
    pieces: Vec<(u64, Vec<u8>)>,
    reads: Mutex<Vec<u64>>,
}

impl Sparse {
    fn new(mut input: Input<'_>) -> Self {
        let len = (1_u64 << (12 + input.byte() % 29)) + u64::from(input.byte()) * 512;
        let mut disk = Self { len, pieces: Vec::new(), reads: Mutex::default() };
        while !input.is_empty() && disk.pieces.len() < MAX_PIECES {
            let (at, count) = (input.number(4) * 16, input.number(2) as usize);
            match count & 0x7fff {
                0 => disk.seal_table(at),
                // The highest bit: counted from the end.
                len if count >> 15 == 1 => {
                    disk.pieces.push((disk.len.wrapping_sub(at), input.bytes(len).to_vec()));
                }
                len => disk.pieces.push((at, input.bytes(len).to_vec())),
            }
        }
        disk
    }

    /// Puts the right checksums into the GPT header at `at`: else none would ever be looked into.
    fn seal_table(&mut self, at: u64) {
        let mut header = [0; 512];
        if self.read_at(&mut header, at).is_err() {
            return;
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let entries_at = u64::from_le_bytes(header[72..80].try_into().unwrap()).wrapping_mul(512);
        let len = u64::from(word(80)) * u64::from(word(84));
        let mut entries = vec![0; len.min(65536) as usize];
        if self.read_at(&mut entries, entries_at).is_ok() {
            header[88..92].copy_from_slice(&crc32fast::hash(&entries).to_le_bytes());
        }
        header[16..20].fill(0);
        let size = u32::from_le_bytes(header[12..16].try_into().unwrap()).min(512) as usize;
        let crc = crc32fast::hash(&header[..size]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        self.pieces.push((at, header.to_vec()));
    }
}

impl Storage for Sparse {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len);
        let end = end.ok_or_else(|| Error::new(ErrorKind::OutOfRange, "a read past the end"))?;
        self.reads.lock().unwrap().push(buf.len() as u64);
        buf.fill(0);
        for (at, bytes) in &self.pieces {
            let (from, to) = ((*at).max(offset), at.saturating_add(bytes.len() as u64).min(end));
            if from < to {
                let part = &bytes[(from - at) as usize..(to - at) as usize];
                buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
            }
        }
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        panic!("a probe does not write")
    }

    fn sync(&self) -> Result<()> {
        panic!("a probe does not sync")
    }

    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn set_len(&self, _: u64) -> Result<()> {
        panic!("a probe does not resize")
    }

    fn punch_hole(&self, _: ByteRange) -> Result<()> {
        panic!("a probe does not discard")
    }
}

/// No content makes a probe fail, or read without end or outside of the disk; it says the same each time; and it calls
/// nothing clean of which the super-block itself says that it is not.
pub fn probe(data: &[u8]) {
    let storage = Arc::new(Sparse::new(Input(data)));
    let disk = RawDisk::new(Arc::clone(&storage) as Arc<dyn Storage>, true).unwrap();
    storage.reads.lock().unwrap().clear();
    let verdicts = crate::probe::probe(&disk).unwrap();
    let reads = std::mem::take(&mut *storage.reads.lock().unwrap());
    assert!(reads.len() <= MOST_READS && reads.iter().sum::<u64>() <= MOST_BYTES, "{} reads", reads.len());
    assert!(reads.iter().all(|len| *len <= 64 << 10));
    assert!((1..=129).contains(&verdicts.len()));
    assert_eq!(crate::probe::probe(&disk).unwrap(), verdicts);
    for verdict in &verdicts {
        let texts = [verdict.label.as_deref(), verdict.name.as_deref(), Some(&verdict.detail)];
        assert!(texts.into_iter().flatten().all(|text| !text.chars().any(char::is_control)), "{verdict:?}");
        if verdict.verdict == Verdict::Clean {
            check_clean(&storage, verdict);
        }
    }
}

/// The fields that say so, by a plain look at them.
fn check_clean(disk: &Sparse, verdict: &FsVerdict) {
    let number = |at: u64, len: usize| {
        let mut bytes = [0; 8];
        disk.read_at(&mut bytes[..len], verdict.offset + at).unwrap();
        u64::from_le_bytes(bytes)
    };
    let end = verdict.offset.checked_add(verdict.size);
    assert!(end.is_some_and(|end| end <= disk.len), "clean, and not on the disk: {verdict:?}");
    match verdict.kind {
        FsKind::Ext2 | FsKind::Ext3 | FsKind::Ext4 => {
            let (magic, state, incompatible) = (number(0x438, 2), number(0x43a, 2), number(0x460, 4));
            assert!(magic == 0xef53 && state & 3 == 1 && incompatible & 4 == 0, "{verdict:?}");
        }
        FsKind::Btrfs => {
            let (magic, log) = (number(0x10040, 8), number(0x10060, 8));
            assert!(magic == u64::from_le_bytes(*b"_BHRfS_M") && log == 0, "{verdict:?}");
        }
        FsKind::Xfs => assert_eq!(number(0, 4), u64::from(u32::from_le_bytes(*b"XFSB"))),
        FsKind::Vfat => assert_eq!(number(510, 2), 0xaa55),
        FsKind::Ntfs => assert_eq!(number(3, 8), u64::from_le_bytes(*b"NTFS    ")),
        FsKind::Ufs1 | FsKind::Ufs2 => {}
        _ => panic!("it has nothing that could be clean: {verdict:?}"),
    }
}
