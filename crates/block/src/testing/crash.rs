use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{ByteRange, Error, ErrorKind, Result, Storage};

use super::MemStorage;

/// Bytes that a disk writes as one: a loss of power leaves a sector old or new.
const SECTOR: usize = crate::SECTOR as usize;

/// A file in memory with a volatile and a durable half: what was written shows at once, and survives a loss of power
/// for sure only once it was synced. Until then any sectors of it may.
#[derive(Debug, Default)]
pub struct CrashStorage {
    volatile: MemStorage,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    durable: Vec<u8>,
    /// What was done since the last sync, in order.
    unsynced: Vec<Change>,
    /// Syncs still to be swallowed.
    swallow: u64,
    /// Syncs still to fail.
    fail: u64,
}

#[derive(Clone, Debug)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    SetLen(usize),
}

impl CrashStorage {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next `count` syncs report success and do nothing: what a flush that forgets one would look like.
    pub fn swallow_syncs(&self, count: u64) {
        self.lock().swallow = count;
    }

    /// The next `count` syncs fail. What they should have brought to the disk shows, and no later sync brings it there, as a
    /// kernel has it (fsync(2), "ERRORS").
    pub fn fail_syncs(&self, count: u64) {
        self.lock().fail = count;
    }

    /// What a loss of power now leaves. `keep` is asked for each unsynced sector, in the order of the writes, whether
    /// it made it to the disk; changes of the length are asked for as well.
    pub fn after_power_loss(&self, mut keep: impl FnMut() -> bool) -> MemStorage {
        let state = self.lock();
        let mut bytes = state.durable.clone();
        state.unsynced.iter().for_each(|change| change.apply(&mut bytes, &mut keep));
        MemStorage::from(bytes)
    }

    /// Changes not yet synced.
    pub fn unsynced(&self) -> usize {
        self.lock().unsynced.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Change {
    /// Does what of it `keep` keeps.
    fn apply(&self, bytes: &mut Vec<u8>, keep: &mut impl FnMut() -> bool) {
        match self {
            Self::SetLen(len) if keep() => bytes.resize(*len, 0),
            Self::SetLen(_) => {}
            Self::Write { offset, bytes: written } => write_some(bytes, *offset, written, keep),
        }
    }
}

/// Writes those sectors of `written` that `keep` keeps.
fn write_some(bytes: &mut Vec<u8>, offset: usize, written: &[u8], keep: &mut impl FnMut() -> bool) {
    let mut done = 0;
    while done < written.len() {
        let at = offset + done;
        let len = (SECTOR - at % SECTOR).min(written.len() - done);
        if keep() {
            if bytes.len() < at + len {
                bytes.resize(at + len, 0);
            }
            bytes[at..at + len].copy_from_slice(&written[done..done + len]);
        }
        done += len;
    }
}

impl Storage for CrashStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.volatile.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut state = self.lock();
        self.volatile.write_at(buf, offset)?;
        state.unsynced.push(Change::Write { offset: offset as usize, bytes: buf.to_vec() });
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let mut state = self.lock();
        if let Some(left) = state.swallow.checked_sub(1) {
            state.swallow = left;
            return Ok(());
        }
        let changes = std::mem::take(&mut state.unsynced);
        if let Some(left) = state.fail.checked_sub(1) {
            state.fail = left;
            return Err(Error::new(ErrorKind::Io, "injected: a sync failed"));
        }
        changes.iter().for_each(|change| change.apply(&mut state.durable, &mut || true));
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        self.volatile.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut state = self.lock();
        self.volatile.set_len(len)?;
        state.unsynced.push(Change::SetLen(len as usize));
        Ok(())
    }

    fn punch_hole(&self, range: ByteRange) -> Result<()> {
        let mut state = self.lock();
        self.volatile.punch_hole(range)?;
        let len = self.volatile.len()?.min(range.end()).saturating_sub(range.offset);
        state.unsynced.push(Change::Write { offset: range.offset as usize, bytes: vec![0; len as usize] });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_synced_bytes_are_sure() {
        let storage = CrashStorage::new();
        storage.write_at(&[1; 1024], 0).unwrap();
        storage.sync().unwrap();
        storage.write_at(&[2; 1024], 256).unwrap();
        assert_eq!(storage.after_power_loss(|| false).bytes(), [1; 1024]);
        assert_eq!(storage.after_power_loss(|| true).bytes()[256..], [2; 1024]);
        let mut turn = 0;
        let torn = storage.after_power_loss(|| {
            turn += 1;
            turn == 2
        });
        assert_eq!(torn.bytes(), [[1; 512], [2; 512]].concat());
        storage.swallow_syncs(1);
        storage.sync().unwrap();
        assert_eq!(storage.after_power_loss(|| false).bytes(), [1; 1024]);
    }
}
