//! The host's disks through time: every write to every file, every sync, and what the world promised meanwhile.
//!
//! A life is lived once and recorded. Then the power may be lost at any place of the record, and of what was written
//! but not synced by then any sectors may be on the disks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::testing::{MemStorage, Random};
use block::{ByteRange, Result, SECTOR, Storage};

use crate::world::Mark;

/// What happened.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write {
        file: u32,
        offset: usize,
        bytes: Vec<u8>,
    },
    SetLen {
        file: u32,
        len: usize,
    },
    Sync {
        file: u32,
    },
    /// What is promised from here on.
    Mark(Mark),
}

/// A sync to leave out: the `nth` of each operation of that kind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Forget {
    pub(crate) operation: &'static str,
    pub(crate) nth: usize,
}

/// All that happened, in order.
#[derive(Debug, Default)]
pub(crate) struct Timeline(Mutex<Record>);

#[derive(Debug, Default)]
struct Record {
    events: Vec<Event>,
    forget: Option<Forget>,
    operation: &'static str,
    syncs: usize,
}

impl Timeline {
    pub(crate) fn new(forget: Option<Forget>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Record { forget, ..Record::default() })))
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An operation of this kind begins.
    pub(crate) fn begin(&self, operation: &'static str) {
        let mut record = self.record();
        (record.operation, record.syncs) = (operation, 0);
    }

    pub(crate) fn mark(&self, mark: Mark) {
        self.record().events.push(Event::Mark(mark));
    }

    /// How many syncs the operation made so far.
    pub(crate) fn events(&self) -> Vec<Event> {
        self.record().events.clone()
    }

    fn sync(&self, file: u32) {
        let mut record = self.record();
        let this = Forget { operation: record.operation, nth: record.syncs };
        record.syncs += 1;
        if record.forget != Some(this) {
            record.events.push(Event::Sync { file });
        }
    }
}

/// A file whose history is recorded.
#[derive(Debug)]
pub(crate) struct Recorded {
    file: u32,
    now: MemStorage,
    timeline: Arc<Timeline>,
}

impl Recorded {
    pub(crate) fn new(file: u32, timeline: &Arc<Timeline>) -> Arc<Self> {
        Arc::new(Self { file, now: MemStorage::default(), timeline: Arc::clone(timeline) })
    }
}

impl Storage for Recorded {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.now.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut record = self.timeline.record();
        self.now.write_at(buf, offset)?;
        let offset = offset as usize;
        record.events.push(Event::Write { file: self.file, offset, bytes: buf.to_vec() });
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.timeline.sync(self.file);
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        self.now.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut record = self.timeline.record();
        self.now.set_len(len)?;
        record.events.push(Event::SetLen { file: self.file, len: len as usize });
        Ok(())
    }

    fn punch_hole(&self, range: ByteRange) -> Result<()> {
        let len = self.now.len()?.min(range.end()).saturating_sub(range.offset);
        let mut record = self.timeline.record();
        self.now.punch_hole(range)?;
        let offset = range.offset as usize;
        record.events.push(Event::Write { file: self.file, offset, bytes: vec![0; len as usize] });
        Ok(())
    }
}

/// The disks at a moment: what is durable, and what is not yet.
#[derive(Default)]
pub(crate) struct Disks {
    files: BTreeMap<u32, Halves>,
}

#[derive(Default)]
struct Halves {
    durable: Vec<u8>,
    unsynced: Vec<Event>,
}

impl Disks {
    /// Goes one event on.
    pub(crate) fn advance(&mut self, event: &Event) {
        match event {
            Event::Write { file, .. } | Event::SetLen { file, .. } => {
                self.files.entry(*file).or_default().unsynced.push(event.clone());
            }
            Event::Sync { file } => {
                let halves = self.files.entry(*file).or_default();
                for change in std::mem::take(&mut halves.unsynced) {
                    apply(&mut halves.durable, &change, &mut || true);
                }
            }
            Event::Mark(_) => {}
        }
    }

    /// Whether something is not durable.
    pub(crate) fn is_at_risk(&self) -> bool {
        self.files.values().any(|halves| !halves.unsynced.is_empty())
    }

    /// What a file holds if the power is lost now; each unsynced sector is on the disk with a chance of `percent`.
    pub(crate) fn left(&self, file: u32, percent: u64, random: &mut Random) -> MemStorage {
        let Some(halves) = self.files.get(&file) else { return MemStorage::default() };
        let mut bytes = halves.durable.clone();
        for change in &halves.unsynced {
            apply(&mut bytes, change, &mut || random.below(100) < percent);
        }
        MemStorage::from(bytes)
    }
}

/// Does those sectors of a change that `keep` keeps.
fn apply(bytes: &mut Vec<u8>, change: &Event, keep: &mut impl FnMut() -> bool) {
    match change {
        Event::SetLen { len, .. } if keep() => bytes.resize(*len, 0),
        Event::Write { offset, bytes: written, .. } => {
            let mut done = 0;
            while done < written.len() {
                let at = offset + done;
                let sector = SECTOR as usize;
                let len = (sector - at % sector).min(written.len() - done);
                if keep() {
                    if bytes.len() < at + len {
                        bytes.resize(at + len, 0);
                    }
                    bytes[at..at + len].copy_from_slice(&written[done..done + len]);
                }
                done += len;
            }
        }
        _ => {}
    }
}
