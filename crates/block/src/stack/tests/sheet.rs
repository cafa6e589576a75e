//! Layers made of runs, and files whose bytes follow from where they are.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::super::*;
use crate::{Place, Run, Storage};

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Absent,
    Zero,
    Data,
    Packed,
}

/// A file without end, each of whose bytes follows from where it is.
#[derive(Debug)]
pub(super) struct Pattern(pub(super) u64);

impl Pattern {
    pub(super) fn byte(&self, offset: u64) -> u8 {
        // Never zero, so that zeroes are not found by mistake.
        ((offset ^ self.0).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1
    }
}

impl Storage for Pattern {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        (offset..).zip(buf).for_each(|(at, byte)| *byte = self.byte(at));
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        panic!("a frozen layer is written")
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(u64::MAX)
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        panic!("a frozen layer is resized")
    }

    fn punch_hole(&self, _range: ByteRange) -> Result<()> {
        panic!("a frozen layer is written")
    }
}

/// A layer made of runs, which counts how often it is asked.
#[derive(Debug)]
pub(super) struct Sheet {
    /// Where each run ends, and what it is; in order.
    pub(super) runs: Vec<(u64, Place)>,
    pub(super) data: Arc<Pattern>,
    pub(super) packed: Pattern,
    asked: AtomicUsize,
    /// How often it was told to forget what it keeps.
    pub(super) forgotten: AtomicUsize,
    /// Where it can not be asked.
    pub(super) failing: Mutex<Option<ByteRange>>,
    /// Its runs are empty.
    pub(super) stuck: AtomicBool,
    /// What it would read through, were it asked to; only so that it is held.
    pub(super) _beneath: Option<Stack>,
}

impl Sheet {
    pub(super) fn new(seed: u64, runs: Vec<(u64, Place)>) -> Arc<Self> {
        Arc::new(Self {
            runs,
            data: Arc::new(Pattern(seed)),
            packed: Pattern(!seed),
            asked: AtomicUsize::new(0),
            forgotten: AtomicUsize::new(0),
            failing: Mutex::default(),
            stuck: AtomicBool::new(false),
            _beneath: None,
        })
    }

    /// One run of the same kind, `len` bytes long.
    pub(super) fn plain(seed: u64, len: u64, place: Place) -> Arc<Self> {
        Self::new(seed, vec![(len, place)])
    }

    /// Each run takes a number of bytes, and lies a number of bytes behind the one before it in the file.
    pub(super) fn spread(seed: u64, pieces: &[(u64, Kind, u64)]) -> Arc<Self> {
        let (mut end, mut file) = (0, 0);
        let run = |&(len, kind, gap): &(u64, Kind, u64)| {
            end += len;
            let place = match kind {
                Kind::Absent => Place::Absent,
                Kind::Zero => Place::Zero,
                Kind::Packed => Place::Packed,
                Kind::Data => Place::Data(file + gap),
            };
            if let Place::Data(offset) = place {
                file = offset + len;
            }
            (end, place)
        };
        Self::new(seed, pieces.iter().map(run).collect())
    }

    pub(super) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// The run with the byte at `offset`: where it begins, where it ends, what it is.
    pub(super) fn find(&self, offset: u64) -> (u64, u64, Place) {
        let index = self.runs.partition_point(|(end, _)| *end <= offset);
        let start = index.checked_sub(1).map_or(0, |before| self.runs[before].0);
        (start, self.runs[index].0, self.runs[index].1)
    }
}

impl Layer for Sheet {
    fn run_at(&self, range: ByteRange) -> Result<Run> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.failing.lock().unwrap().is_some_and(|failing| failing.intersect(range).is_some()) {
            return Err(Error::new(ErrorKind::Io, "the table can not be read"));
        }
        assert!(range.len > 0 && range.is_within(self.capacity()));
        if self.stuck.load(Ordering::SeqCst) {
            return Ok(Run { range: ByteRange { len: 0, ..range }, place: Place::Absent });
        }
        let (start, end, place) = self.find(range.offset);
        let place = match place {
            Place::Data(offset) => Place::Data(offset + (range.offset - start)),
            other => other,
        };
        Ok(Run { range: ByteRange { len: end.min(range.end()) - range.offset, ..range }, place })
    }

    fn data(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.data) as _
    }

    fn forget(&self) {
        self.forgotten.fetch_add(1, Ordering::SeqCst);
    }
}

impl Disk for Sheet {
    fn capacity(&self) -> u64 {
        self.runs.last().map_or(0, |(end, _)| *end)
    }

    fn read_only(&self) -> bool {
        true
    }

    fn discard_granularity(&self) -> u32 {
        512
    }

    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        let mut offset = range.offset;
        while offset < range.end() {
            let (_, end, place) = self.find(offset);
            assert_eq!(place, Place::Packed, "a layer is read through");
            let end = end.min(range.end());
            let bytes: Arc<[u8]> = (offset..end).map(|at| self.packed.byte(at)).collect();
            out.push(Extent { len: end - offset, source: Source::Bytes { bytes, offset: 0 } });
            offset = end;
        }
        Ok(())
    }

    fn resolve_write(&self, _: ByteRange, _: &Waker, _: &mut Vec<Extent>) -> Poll<Result<WriteGuard>> {
        panic!("a frozen layer is written")
    }

    fn discard(&self, _: ByteRange, _: &Waker) -> Poll<Result<()>> {
        panic!("a frozen layer is written")
    }

    fn write_zeroes(&self, _: ByteRange, _: bool, _: &Waker) -> Poll<Result<()>> {
        panic!("a frozen layer is written")
    }

    fn flush(&self) -> Box<dyn Flush> {
        Box::new(Nothing)
    }
}
