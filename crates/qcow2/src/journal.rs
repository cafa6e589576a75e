//! The journal: what has been published since the last flush, for the next process if this one is killed.
//!
//! It is never synced. What a killed process wrote is in the kernel's page cache and there for its successor; what a
//! power loss left of it is worthless, and the boot id in its header tells the two apart. Two files take turns: while
//! a flush writes out what one holds, new records go to the other. Files are written over, never cut.
//!
//! ```text
//! header   0  "FRAZILJ2"        record   0  guest cluster, u64
//! 88 bytes 8  boot id, padded   32 bytes 8  first word of its L2 entry, u64 (0: no host cluster)
//!             with zeroes               16  state as in an extended L2 entry, u64
//!         72  sequence, u64             24  the record's number in this half, u32
//!         80  crc32 of 0..80            28  crc32 of 0..28, continuing that of the record before, or the header's
//!         84  zero                                                (all numbers big-endian)
//! ```
//!
//! A record says all of a cluster's entry, so the last one counts. The half with the lower sequence is the older one. A half
//! is emptied by a header with a new sequence. Each record's checksum continues that of the one before, and no number is
//! given twice: so what is left behind by an earlier use of the file, or by an append that failed, does not fit on what
//! was written since.

mod nowhere;

use std::sync::Arc;

use block::{Context, Error, ErrorKind, Result, Storage};

use crate::bytes::{be32, be64};
use crate::entry::{Entry, GuestCluster, Home, State};

const MAGIC: &[u8; 8] = b"FRAZILJ2";
const BOOT_ID_LEN: usize = 64;
const HEADER_LEN: usize = 88;
const SEQUENCE: usize = 72;
const HEADER_CRC: usize = 80;
const RECORD_LEN: usize = 32;
const RECORD_NUMBER: usize = 24;
const RECORD_CRC: usize = 28;
/// No header has this sequence or a higher one, so the next one is a number too. No use of a journal gets there.
const MOST_SEQUENCES: u64 = 1 << 63;
/// Records read at a time.
const CHUNK: u64 = 4096;

/// A published change: all that is known of a cluster after it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Record {
    pub(crate) cluster: GuestCluster,
    pub(crate) entry: Entry,
}

/// The journal of one image: two files that are its own, and the host's boot id.
///
/// It belongs to that image as it was when the records were written: after a kill nobody else may write the image
/// until Frazil has opened it with its journal.
#[derive(Debug)]
pub struct Journal {
    boot_id: [u8; BOOT_ID_LEN],
    files: [File; 2],
    /// Which of the files takes new records.
    current: usize,
    /// The highest ever used.
    sequence: u64,
    /// What is to be written, kept for its room.
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct File {
    storage: Arc<dyn Storage>,
    /// Bytes that count, zero if there is not even a header; what lies behind them is of an earlier use. Of a file that has
    /// records when it is opened, only the first is known: it is emptied before anything is appended.
    len: u64,
    /// The sequence in its header.
    sequence: u64,
    /// The checksum that the next record's continues.
    crc: u32,
    /// The next record's number.
    number: u32,
    /// Whether there may be records of a failed append behind `len`.
    torn: bool,
}

impl Journal {
    /// The journal in two files as a previous process left it, or new if they hold none. What another boot of the
    /// host has left is ignored: only synced tables count after that. Nothing is written yet.
    ///
    /// `boot_id` is at most 64 bytes.
    pub fn open(a: Arc<dyn Storage>, b: Arc<dyn Storage>, boot_id: &str) -> Result<Self> {
        let mut padded = [0; BOOT_ID_LEN];
        let place = padded.get_mut(..boot_id.len()).filter(|place| !place.is_empty());
        let place =
            place.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a boot id has 1 to 64 bytes"))?;
        place.copy_from_slice(boot_id.as_bytes());
        let files = [File::open(a, &padded)?, File::open(b, &padded)?];
        // A file with records waits to be written out with the image; new records go to an empty one if there is one.
        let current = match &files {
            [a, _] if a.is_empty() => 0,
            [a, b] => usize::from(b.is_empty() || a.sequence < b.sequence),
        };
        // One more than was found, for a header may have been torn that had it.
        let sequence = files[0].sequence.max(files[1].sequence) + 1;
        Ok(Self { boot_id: padded, files, current, sequence, buffer: Vec::new() })
    }

    /// A new journal, for a new image: whatever the files held is dropped.
    pub fn create(a: Arc<dyn Storage>, b: Arc<dyn Storage>, boot_id: &str) -> Result<Self> {
        let mut journal = Self::open(a, b, boot_id)?;
        journal.clear().map(|()| journal)
    }

    /// Calls `found` with each record, in the order in which they were published. A record is followed by no other if
    /// the process was killed while writing it.
    pub(crate) fn replay(&self, mut found: impl FnMut(Record) -> Result<()>) -> Result<()> {
        let [a, b] = &self.files;
        let ordered = if a.sequence <= b.sequence { [a, b] } else { [b, a] };
        ordered.iter().try_for_each(|file| file.replay(&mut found)).context(|| "read the journal")
    }

    /// Adds records: once it returns they survive the death of the process. On an error none of them does.
    pub(crate) fn append(&mut self, records: impl ExactSizeIterator<Item = Record>) -> Result<()> {
        let Self { boot_id, files, current, sequence, buffer } = self;
        let Some(file) = files.get_mut(*current).filter(|_| records.len() > 0) else { return Ok(()) };
        buffer.clear();
        if file.is_empty() {
            file.begin(boot_id, next(sequence)?, buffer);
            file.len = 0;
        }
        file.append(records, buffer).context(|| "write the journal")
    }

    /// A flush takes what was published so far: later records go to the other file, and `true` is returned. If that one
    /// still holds what an earlier flush failed to write out, the current one goes on. So it does if there may be records of a
    /// failed append in it: the next append takes them away, lest a replay takes them for good.
    pub(crate) fn rotate(&mut self) -> bool {
        let other = 1 - self.current;
        let torn = self.files.get(self.current).is_some_and(|file| file.torn);
        let turns = !torn && self.files.get(other).is_some_and(File::is_empty);
        if turns {
            self.current = other;
        }
        turns
    }

    /// What was published before the last [`rotate`](Self::rotate) is in the image's tables, durably.
    pub(crate) fn drop_older(&mut self) -> Result<()> {
        self.empty(1 - self.current)
    }

    /// All that was published is in the image's tables, durably. The older half goes first: on its own it would bring
    /// back what the newer one says is no more.
    pub(crate) fn clear(&mut self) -> Result<()> {
        self.drop_older()?;
        self.empty(self.current)
    }

    fn empty(&mut self, index: usize) -> Result<()> {
        let Self { boot_id, files, sequence, buffer, .. } = self;
        match files.get_mut(index) {
            Some(file) if !file.is_empty() || file.torn => {
                buffer.clear();
                file.begin(boot_id, next(sequence)?, buffer);
                file.empty(buffer).context(|| "empty the journal")
            }
            _ => Ok(()),
        }
    }
}

impl File {
    fn open(storage: Arc<dyn Storage>, boot_id: &[u8; BOOT_ID_LEN]) -> Result<Self> {
        let mut found = [0; HEADER_LEN];
        if storage.len()? >= HEADER_LEN as u64 {
            storage.read_at(&mut found, 0)?;
        }
        let (sequence, crc) = (be64(&found, SEQUENCE), be32(&found, HEADER_CRC));
        let mut ours = Vec::new();
        encode_header(boot_id, sequence, &mut ours);
        let mut file = Self { storage, len: 0, sequence: 0, crc: 0, number: 0, torn: false };
        if ours == found && sequence < MOST_SEQUENCES {
            (file.sequence, file.crc, file.len) = (sequence, crc, HEADER_LEN as u64);
            let mut first = [0; RECORD_LEN];
            if file.storage.len()? >= (HEADER_LEN + RECORD_LEN) as u64 {
                file.storage.read_at(&mut first, HEADER_LEN as u64)?;
            }
            if decode_record(&first, crc).is_some() {
                file.len += RECORD_LEN as u64;
            }
        }
        Ok(file)
    }

    fn is_empty(&self) -> bool {
        self.len <= HEADER_LEN as u64
    }

    /// What is written next, from the file's start on, begins with a new header: appends it to `buffer`.
    fn begin(&mut self, boot_id: &[u8; BOOT_ID_LEN], sequence: u64, buffer: &mut Vec<u8>) {
        encode_header(boot_id, sequence, buffer);
        (self.sequence, self.crc, self.number) = (sequence, be32(buffer, HEADER_CRC), 0);
    }

    /// Writes `buffer`, which has what comes before the records, and them.
    fn append(&mut self, records: impl Iterator<Item = Record>, buffer: &mut Vec<u8>) -> Result<()> {
        let mut crc = self.crc;
        for record in records {
            crc = encode_record(record, self.number, crc, buffer);
            self.number = self.number.wrapping_add(1);
        }
        let written = self.storage.write_at(buffer, self.len);
        match written {
            Ok(()) => {
                (self.len, self.crc, self.torn) = (self.len + buffer.len() as u64, crc, false);
            }
            // At once, for there may be no next append before the process is killed.
            Err(_) => {
                let records = self.len.max(HEADER_LEN as u64);
                self.torn = self.storage.write_at(&[0; RECORD_LEN], records).is_err();
            }
        }
        written
    }

    /// Writes only the new header that is in `buffer`.
    fn empty(&mut self, buffer: &[u8]) -> Result<()> {
        // Until it is written nobody knows which header there is.
        self.torn = true;
        self.storage.write_at(buffer, 0)?;
        (self.len, self.torn) = (buffer.len() as u64, false);
        Ok(())
    }

    fn replay(&self, found: &mut impl FnMut(Record) -> Result<()>) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let (end, mut offset, mut crc) = (self.storage.len()?, HEADER_LEN as u64, self.crc);
        let mut buffer = Vec::new();
        loop {
            let records = (end.saturating_sub(offset) / RECORD_LEN as u64).min(CHUNK);
            if records == 0 {
                return Ok(());
            }
            buffer.resize(records as usize * RECORD_LEN, 0);
            self.storage.read_at(&mut buffer, offset)?;
            for bytes in buffer.chunks_exact(RECORD_LEN) {
                match decode_record(bytes, crc) {
                    Some(record) => found(record)?,
                    None => return Ok(()),
                }
                crc = be32(bytes, RECORD_CRC);
            }
            offset += buffer.len() as u64;
        }
    }
}

/// A new sequence; an error rather than one whose header would not be read again.
fn next(sequence: &mut u64) -> Result<u64> {
    let next = *sequence + 1;
    if next >= MOST_SEQUENCES {
        let story = "the journal's numbers are used up, so it is not Frazil that has written it";
        return Err(Error::new(ErrorKind::Corrupt, story));
    }
    *sequence = next;
    Ok(next)
}

fn encode_header(boot_id: &[u8; BOOT_ID_LEN], sequence: u64, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend(MAGIC);
    out.extend(boot_id);
    out.extend(sequence.to_be_bytes());
    let crc = crc32fast::hash(out.get(start..).unwrap_or(&[]));
    out.extend(crc.to_be_bytes());
    out.extend([0; 4]);
}

/// The checksum of a record's bytes before it, continuing that of the one before.
fn record_crc(body: &[u8], before: u32) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(before);
    hasher.update(body);
    hasher.finalize()
}

fn encode_record(record: Record, number: u32, before: u32, out: &mut Vec<u8>) -> u32 {
    let mut body = [0; RECORD_CRC];
    body[..8].copy_from_slice(&record.cluster.0.to_be_bytes());
    body[8..16].copy_from_slice(&record.entry.home.0.to_be_bytes());
    body[16..RECORD_NUMBER].copy_from_slice(&record.entry.state.0.to_be_bytes());
    body[RECORD_NUMBER..].copy_from_slice(&number.to_be_bytes());
    let crc = record_crc(&body, before);
    out.extend(body);
    out.extend(crc.to_be_bytes());
    crc
}

fn decode_record(bytes: &[u8], before: u32) -> Option<Record> {
    let body = bytes.get(..RECORD_CRC)?;
    let entry = Entry { home: Home(be64(body, 8)), state: State(be64(body, 16)) };
    (be32(bytes, RECORD_CRC) == record_crc(body, before))
        .then(|| Record { cluster: GuestCluster(be64(body, 0)), entry })
}

#[cfg(test)]
mod tests;
