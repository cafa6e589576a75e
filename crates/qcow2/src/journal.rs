//! The journal: what has been published since the last flush, for the next process if this one is killed.
//!
//! It is never synced. What a killed process wrote is in the kernel's page cache and there for its successor; what a
//! power loss left of it is worthless, and the boot id in its header tells the two apart. Two files take turns: while
//! a flush writes out what one holds, new records go to the other.
//!
//! ```text
//! header   0  "FRAZILJ1"        record   0  guest cluster, u64
//! 80 bytes 8  boot id, padded   32 bytes 8  host cluster's offset, u64 (0: none)
//!             with zeroes               16  state as in an extended L2 entry, u64
//!         72  crc32 of 0..72            24  crc32 of the header's crc32 and 0..24
//!         76  zero                      28  zero                    (all numbers big-endian)
//! ```

use std::sync::Arc;

use block::{Context, Error, ErrorKind, Result, Storage};

use crate::bytes::{be32, be64};
use crate::entry::{GuestCluster, HostOffset, State};

const MAGIC: &[u8; 8] = b"FRAZILJ1";
const BOOT_ID_LEN: usize = 64;
const HEADER_LEN: usize = 80;
const HEADER_CRC: usize = 72;
const RECORD_LEN: usize = 32;
const RECORD_CRC: usize = 24;
/// Records read at a time.
const CHUNK: u64 = 4096;

/// A published change: all that is known of a cluster after it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Record {
    pub(crate) cluster: GuestCluster,
    pub(crate) host: HostOffset,
    pub(crate) state: State,
}

/// The journal of one image: two files that are its own, and the host's boot id.
///
/// It belongs to that image as it was when the records were written: after a kill nobody else may write the image
/// until Frazil has opened it with its journal.
#[derive(Debug)]
pub struct Journal {
    header: [u8; HEADER_LEN],
    files: [File; 2],
    /// Which of the files takes new records.
    current: usize,
}

#[derive(Debug)]
struct File {
    storage: Arc<dyn Storage>,
    /// Bytes that count; what lies behind them is of a failed append, or of another boot.
    len: u64,
    /// Whether there may be bytes behind `len`.
    torn: bool,
}

impl Journal {
    /// The journal in two files as a previous process left it, or new if they are empty. What another boot of the
    /// host has left is ignored: only synced tables count after that.
    ///
    /// `boot_id` is at most 64 bytes.
    pub fn open(a: Arc<dyn Storage>, b: Arc<dyn Storage>, boot_id: &str) -> Result<Self> {
        let header = encode_header(boot_id)?;
        let files = [File::open(a, &header)?, File::open(b, &header)?];
        // A file with records waits to be written out with the image; new records go to an empty one if there is one.
        let current = usize::from(files[0].len != 0);
        Ok(Self { header, files, current })
    }

    /// A new journal, for a new image: whatever the files held is dropped.
    pub fn create(a: Arc<dyn Storage>, b: Arc<dyn Storage>, boot_id: &str) -> Result<Self> {
        a.set_len(0)?;
        b.set_len(0)?;
        Self::open(a, b, boot_id)
    }

    /// Calls `found` with each record. A record is followed by no other if the process was killed while writing it.
    pub(crate) fn replay(&self, mut found: impl FnMut(Record) -> Result<()>) -> Result<()> {
        for file in &self.files {
            file.replay(&self.header, &mut found).context(|| "read the journal")?;
        }
        Ok(())
    }

    /// Adds records: once it returns they survive the death of the process. On an error none of them does.
    pub(crate) fn append(&mut self, records: &[Record]) -> Result<()> {
        let Self { header, files, current } = self;
        let Some(file) = files.get_mut(*current).filter(|_| !records.is_empty()) else { return Ok(()) };
        let mut bytes = if file.len == 0 { header.to_vec() } else { Vec::new() };
        records.iter().for_each(|record| encode_record(*record, header, &mut bytes));
        file.append(&bytes).context(|| "write the journal")
    }

    /// A flush takes what was published so far: later records go to the other file. If that one still holds what an
    /// earlier flush failed to write out, the current one goes on. So it does if there may be records of a failed append
    /// in it: the next append takes them away, lest a replay joins them with what was published after them.
    pub(crate) fn rotate(&mut self) {
        let other = 1 - self.current;
        let torn = self.files.get(self.current).is_some_and(|file| file.torn);
        if !torn && self.files.get(other).is_some_and(|file| file.len == 0) {
            self.current = other;
        }
    }

    /// What was published before the last [`rotate`](Self::rotate) is in the image's tables, durably.
    pub(crate) fn drop_older(&mut self) -> Result<()> {
        self.files.get_mut(1 - self.current).map_or(Ok(()), File::clear)
    }

    /// All that was published is in the image's tables, durably.
    pub(crate) fn clear(&mut self) -> Result<()> {
        self.files.iter_mut().try_for_each(File::clear)
    }
}

impl File {
    fn open(storage: Arc<dyn Storage>, header: &[u8; HEADER_LEN]) -> Result<Self> {
        let len = storage.len()?;
        let mut found = [0; HEADER_LEN];
        if len >= HEADER_LEN as u64 {
            storage.read_at(&mut found, 0)?;
        }
        let ours = &found == header;
        Ok(Self { storage, len: if ours { len } else { 0 }, torn: !ours && len != 0 })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if self.torn {
            // Records of a failed append must not be taken for good behind the new ones.
            self.storage.set_len(self.len)?;
        }
        self.torn = true;
        let written = self.storage.write_at(bytes, self.len);
        match written {
            Ok(()) => (self.len, self.torn) = (self.len + bytes.len() as u64, false),
            // At once, for there may be no next append before the process is killed.
            Err(_) => self.torn = self.storage.set_len(self.len).is_err(),
        }
        written
    }

    fn clear(&mut self) -> Result<()> {
        if self.len != 0 || self.torn {
            self.storage.set_len(0)?;
            (self.len, self.torn) = (0, false);
        }
        Ok(())
    }

    fn replay(&self, header: &[u8; HEADER_LEN], found: &mut impl FnMut(Record) -> Result<()>) -> Result<()> {
        let mut offset = HEADER_LEN as u64;
        let mut buffer = Vec::new();
        loop {
            let records = (self.len.saturating_sub(offset) / RECORD_LEN as u64).min(CHUNK);
            if records == 0 {
                return Ok(());
            }
            buffer.resize(records as usize * RECORD_LEN, 0);
            self.storage.read_at(&mut buffer, offset)?;
            for bytes in buffer.chunks_exact(RECORD_LEN) {
                match decode_record(bytes, header) {
                    Some(record) => found(record)?,
                    None => return Ok(()),
                }
            }
            offset += buffer.len() as u64;
        }
    }
}

fn encode_header(boot_id: &str) -> Result<[u8; HEADER_LEN]> {
    let mut header = [0; HEADER_LEN];
    let (magic, rest) = header.split_at_mut(MAGIC.len());
    magic.copy_from_slice(MAGIC);
    let place = rest.get_mut(..boot_id.len()).filter(|_| (1..=BOOT_ID_LEN).contains(&boot_id.len()));
    let place = place.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a boot id has 1 to 64 bytes"))?;
    place.copy_from_slice(boot_id.as_bytes());
    let crc = crc32fast::hash(&header[..HEADER_CRC]);
    header[HEADER_CRC..HEADER_CRC + 4].copy_from_slice(&crc.to_be_bytes());
    Ok(header)
}

fn record_crc(body: &[u8], header: &[u8; HEADER_LEN]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[HEADER_CRC..HEADER_CRC + 4]);
    hasher.update(body);
    hasher.finalize()
}

fn encode_record(record: Record, header: &[u8; HEADER_LEN], out: &mut Vec<u8>) {
    let start = out.len();
    for word in [record.cluster.0, record.host.0, record.state.0] {
        out.extend(word.to_be_bytes());
    }
    let crc = record_crc(&out[start..], header);
    out.extend(crc.to_be_bytes());
    out.extend([0; 4]);
}

fn decode_record(bytes: &[u8], header: &[u8; HEADER_LEN]) -> Option<Record> {
    let body = bytes.get(..RECORD_CRC)?;
    (be32(bytes, RECORD_CRC) == record_crc(body, header)).then(|| Record {
        cluster: GuestCluster(be64(body, 0)),
        host: HostOffset(be64(body, 8)),
        state: State(be64(body, 16)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::testing::{FaultStorage, MemStorage};

    fn record(n: u64) -> Record {
        Record { cluster: GuestCluster(n), host: HostOffset(n << 16), state: State(n) }
    }

    fn records(journal: &Journal) -> Vec<u64> {
        let mut all = Vec::new();
        let collect = |record: Record| {
            all.push(record.cluster.0);
            Ok(())
        };
        journal.replay(collect).unwrap();
        all
    }

    fn file() -> Arc<FaultStorage> {
        Arc::new(FaultStorage::new(MemStorage::default()))
    }

    #[test]
    fn records_come_back_on_the_same_boot_only() {
        let (a, b) = (file(), file());
        let mut journal = Journal::open(a.clone(), b.clone(), "one").unwrap();
        journal.append(&[record(1), record(2)]).unwrap();
        journal.rotate();
        journal.append(&[record(3)]).unwrap();
        assert_eq!(records(&Journal::open(a.clone(), b.clone(), "one").unwrap()), [1, 2, 3]);
        assert_eq!(records(&Journal::open(a.clone(), b.clone(), "two").unwrap()), []);
        journal.drop_older().unwrap();
        assert_eq!(records(&Journal::open(a.clone(), b.clone(), "one").unwrap()), [3]);
        // The other boot's records go once there are new ones.
        let mut other = Journal::open(a.clone(), b.clone(), "two").unwrap();
        other.append(&[record(4)]).unwrap();
        other.rotate();
        other.append(&[record(5)]).unwrap();
        assert_eq!(records(&Journal::open(a, b, "two").unwrap()), [4, 5]);
    }

    #[test]
    fn a_torn_record_ends_the_replay() {
        let (a, b) = (file(), file());
        let mut journal = Journal::open(a.clone(), b.clone(), "one").unwrap();
        journal.append(&[record(1), record(2), record(3)]).unwrap();
        a.write_at(&[9], (HEADER_LEN + RECORD_LEN + 3) as u64).unwrap();
        assert_eq!(records(&Journal::open(a.clone(), b.clone(), "one").unwrap()), [1]);
        a.set_len((HEADER_LEN + RECORD_LEN - 1) as u64).unwrap();
        assert_eq!(records(&Journal::open(a, b, "one").unwrap()), []);
    }

    #[test]
    fn a_failed_append_leaves_nothing_behind_the_next_one() {
        let (a, b) = (file(), file());
        let mut journal = Journal::open(a.clone(), b.clone(), "one").unwrap();
        journal.append(&[record(1)]).unwrap();
        // The write fails after its bytes went down.
        let mut bytes = Vec::new();
        [2, 3].into_iter().for_each(|n| encode_record(record(n), &journal.header, &mut bytes));
        a.write_at(&bytes, journal.files[0].len).unwrap();
        a.fail_writes(1);
        journal.append(&[record(2), record(3)]).unwrap_err();
        assert_eq!(records(&Journal::open(a.clone(), b.clone(), "one").unwrap()), [1]);
        journal.append(&[record(4)]).unwrap();
        assert_eq!(records(&Journal::open(a, b, "one").unwrap()), [1, 4]);
    }

    /// A write failed in the middle of its records. Nobody knows them, so no replay may, whatever happens in between:
    /// a state that never was would win over those that came later.
    #[test]
    fn a_failed_append_is_not_left_behind_in_the_other_half() {
        for before in [0, 1] {
            let (a, b) = (file(), file());
            let mut journal = Journal::open(a.clone(), b.clone(), "one").unwrap();
            (0..before).for_each(|n| journal.append(&[record(n)]).unwrap());
            let mut bytes = if before == 0 { journal.header.to_vec() } else { Vec::new() };
            encode_record(record(7), &journal.header, &mut bytes);
            a.write_at(&bytes, journal.files[0].len).unwrap();
            // Cutting it off fails as well.
            a.limit_len(0);
            journal.append(&[record(7), record(8)]).unwrap_err();
            a.limit_len(u64::MAX);
            journal.rotate();
            journal.append(&[record(9)]).unwrap();
            let found = records(&Journal::open(a, b, "one").unwrap());
            assert!(found.contains(&9) && !found.contains(&7), "{found:?}");
        }
    }

    #[test]
    fn a_failed_flush_keeps_its_records() {
        let (a, b) = (file(), file());
        let mut journal = Journal::open(a.clone(), b.clone(), "one").unwrap();
        journal.append(&[record(1)]).unwrap();
        journal.rotate();
        journal.append(&[record(2)]).unwrap();
        // The flush failed and is tried again: nothing may be dropped but what it then writes out.
        journal.rotate();
        journal.append(&[record(3)]).unwrap();
        assert_eq!(records(&Journal::open(a.clone(), b.clone(), "one").unwrap()), [1, 2, 3]);
        journal.drop_older().unwrap();
        assert_eq!(records(&Journal::open(a, b, "one").unwrap()), [2, 3]);
    }
}
