//! Saving bitmaps: data, then tables, then the word that they are true.

use block::{Context, DirtyBitmap, Error, ErrorKind, Result, Storage};

use super::directory::{BitmapEntry, FLAGS_AT, IN_USE, MAX_TABLE_ENTRIES};
use super::{BATCH, State, TableEntry};
use crate::entry::HostOffset;

/// Where clusters of the image file come from, and go to.
pub(crate) trait Room {
    /// `count` clusters in a row that nothing uses. They count as used from the next [`settle`](Self::settle) on.
    fn take(&mut self, count: u64) -> Result<HostOffset>;

    /// Returns once all that was written to the file, and the refcounts of what was taken, are on stable storage.
    fn settle(&mut self) -> Result<()>;

    /// Nothing on stable storage names these clusters any more.
    fn give_back(&mut self, at: HostOffset, count: u64) -> Result<()>;
}

impl State {
    /// See [`Bitmaps::store`](super::Bitmaps::store). `bitmaps` are those that are tracked, in their order.
    pub(super) fn store(
        &mut self,
        storage: &dyn Storage,
        room: &mut dyn Room,
        bitmaps: &[DirtyBitmap],
    ) -> Result<()> {
        let mut tracked = std::mem::take(&mut self.tracked);
        let size = self.header.geometry().cluster_size();
        let written = tracked.iter_mut().zip(bitmaps).try_for_each(|((index, table), bitmap)| {
            let data = self.directory.entries[*index].data_bytes(self.header.capacity);
            table.resize(data.div_ceil(size) as usize, TableEntry::Zeroes);
            write_data(storage, room, &mut self.freed, table, bitmap, size)
        });
        let saved = written.and_then(|()| {
            let own = tracked.iter().map(|(index, table)| (*index, table.clone()));
            let mut tables: Vec<(usize, Vec<TableEntry>)> = own.collect();
            tables.extend(self.outgrown_tables(storage, &tracked)?);
            self.save(storage, room, &tables)
        });
        self.tracked = tracked;
        saved
    }

    /// The tables of bitmaps that do not follow writes, as long as the disk needs them.
    fn outgrown_tables(
        &self,
        storage: &dyn Storage,
        tracked: &[(usize, Vec<TableEntry>)],
    ) -> Result<Vec<(usize, Vec<TableEntry>)>> {
        let mut tables = Vec::new();
        for &index in self.outgrown.iter().filter(|index| tracked.iter().all(|(other, _)| other != *index)) {
            let entry = &self.directory.entries[index];
            let mut table = Vec::new();
            for from in (0..entry.table_entries).step_by(BATCH as usize) {
                let to = entry.table_entries.min(from + BATCH);
                table.extend(entry.read_table(storage, &self.header, from..to)?);
            }
            let size = self.header.geometry().cluster_size();
            table.resize(entry.data_bytes(self.header.capacity).div_ceil(size) as usize, TableEntry::Zeroes);
            tables.push((index, table));
        }
        Ok(tables)
    }

    /// Names all data, and says that it is true.
    fn save(
        &mut self,
        storage: &dyn Storage,
        room: &mut dyn Room,
        tables: &[(usize, Vec<TableEntry>)],
    ) -> Result<()> {
        let size = self.header.geometry().cluster_size();
        let mut moved = Vec::new();
        for (index, table) in tables {
            let entry = &self.directory.entries[*index];
            if table.len() as u64 != u64::from(entry.table_entries) {
                if table.len() > MAX_TABLE_ENTRIES as usize {
                    return Err(Error::new(ErrorKind::Unsupported, "so large a table of a dirty bitmap"));
                }
                let at = room.take((table.len() as u64 * 8).div_ceil(size))?;
                write_table(storage, at, table, size)?;
                moved.push((*index, at));
            }
        }
        room.settle()?;
        for (index, table) in tables {
            let entry = &mut self.directory.entries[*index];
            match moved.iter().find(|(moved, _)| moved == index) {
                // The new table begins as the old one does and is longer, so the old length may stay for now.
                Some((_, at)) => {
                    storage.write_at(&at.0.to_be_bytes(), entry.position)?;
                    self.freed.push((entry.table, entry.table_bytes().div_ceil(size)));
                    entry.table = *at;
                }
                None => write_table(storage, entry.table, table, size)?,
            }
        }
        room.settle()?;
        for (index, table) in tables {
            let entry = &mut self.directory.entries[*index];
            // Length and flags are neighbours, in one sector.
            (entry.table_entries, entry.flags) = (table.len() as u32, entry.flags & !IN_USE);
            write_length_and_flags(storage, entry)?;
        }
        // Nothing on stable storage names these since the last time.
        for (at, count) in self.freed.drain(..) {
            room.give_back(at, count)?;
        }
        self.outgrown.clear();
        room.settle()
    }
}

fn write_length_and_flags(storage: &dyn Storage, entry: &BitmapEntry) -> Result<()> {
    let bytes = [entry.table_entries.to_be_bytes(), entry.flags.to_be_bytes()].concat();
    storage.write_at(&bytes, entry.position + FLAGS_AT - 4).context(|| format!("bitmap '{}'", entry.name))
}

/// Writes a table and fills up its last cluster.
fn write_table(storage: &dyn Storage, at: HostOffset, table: &[TableEntry], size: u64) -> Result<()> {
    let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.encode().to_be_bytes()).collect();
    bytes.resize(bytes.len().next_multiple_of(size as usize), 0);
    storage.write_at(&bytes, at.0)
}

/// Writes the clusters of `bitmap` that are neither all clean nor all dirty, in place where `table` has room for them.
fn write_data(
    storage: &dyn Storage,
    room: &mut dyn Room,
    freed: &mut Vec<(HostOffset, u64)>,
    table: &mut [TableEntry],
    bitmap: &DirtyBitmap,
    size: u64,
) -> Result<()> {
    let mut bytes = vec![0; size as usize];
    for (index, entry) in (0..).zip(table) {
        bitmap.read_bytes(index * size, &mut bytes);
        let plain = match &bytes {
            bytes if bytes.iter().all(|byte| *byte == 0) => Some(TableEntry::Zeroes),
            bytes if bytes.iter().all(|byte| *byte == 0xff) => Some(TableEntry::Ones),
            _ => None,
        };
        match (plain, *entry) {
            (Some(plain), before) => {
                if let TableEntry::At(at) = before {
                    freed.push((at, 1));
                }
                *entry = plain;
            }
            (None, TableEntry::At(at)) => storage.write_at(&bytes, at.0)?,
            (None, _) => {
                let at = room.take(1)?;
                *entry = TableEntry::At(at);
                storage.write_at(&bytes, at.0)?;
            }
        }
    }
    Ok(())
}
