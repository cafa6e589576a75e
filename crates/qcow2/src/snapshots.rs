//! Internal snapshots: where their tables are. Frazil takes none and shows none; it keeps off those that are there.

use std::collections::BTreeMap;

use block::{Context, Error, ErrorKind, Result, Storage};

use crate::bytes::{be16, be32, be64};
use crate::entry::HostOffset;
use crate::header::{Header, MAX_L1_BYTES};

/// QEMU's own bound (`QCOW_MAX_SNAPSHOTS_SIZE`) of the table in bytes.
const MAX_TABLE_BYTES: u64 = 1024 * 65536;
/// QEMU's own bound (`QCOW_MAX_SNAPSHOT_EXTRA_DATA`).
const MAX_EXTRA_BYTES: u64 = 1024;
/// The bytes of an entry before its variable parts.
const ENTRY_BYTES: u64 = 40;

/// The L1 table of one snapshot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct SnapshotL1 {
    pub(crate) at: HostOffset,
    pub(crate) entries: u32,
}

/// The snapshot table, checked: the L1 tables are aligned, bounded, inside the file, and off each other.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Snapshots {
    pub(crate) at: HostOffset,
    /// The table's length in bytes.
    pub(crate) len: u64,
    pub(crate) tables: Vec<SnapshotL1>,
}

impl Snapshots {
    /// Reads and checks the snapshot table that `header` names.
    pub(crate) fn read(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let file_len = storage.len()?;
        let mut found = Self { at: header.snapshots_at, len: 0, tables: Vec::new() };
        for _ in 0..header.snapshots {
            let mut entry = [0; ENTRY_BYTES as usize];
            let at = found.at.0.saturating_add(found.len);
            if at.saturating_add(ENTRY_BYTES) > file_len {
                return Err(corrupt("the snapshot table is not inside the file"));
            }
            storage.read_at(&mut entry, at).context(|| "read the snapshot table")?;
            let extra = u64::from(be32(&entry, 36));
            if extra > MAX_EXTRA_BYTES {
                return Err(corrupt("a snapshot has too much extra data"));
            }
            let names = u64::from(be16(&entry, 12)) + u64::from(be16(&entry, 14));
            found.len += (ENTRY_BYTES + extra + names).next_multiple_of(8);
            found.tables.push(SnapshotL1 { at: HostOffset(be64(&entry, 0)), entries: be32(&entry, 8) });
        }
        if found.len > MAX_TABLE_BYTES || found.at.0.saturating_add(found.len) > end_of(header, file_len) {
            return Err(corrupt("the snapshot table is too large or not inside the file"));
        }
        found.check_tables(header, file_len)?;
        Ok(found)
    }

    fn check_tables(&self, header: &Header, file_len: u64) -> Result<()> {
        let geometry = header.geometry();
        let mut taken = BTreeMap::new();
        for table in &self.tables {
            let bytes = u64::from(table.entries) * 8;
            let inside = table.at.0.checked_add(bytes).is_some_and(|end| end <= end_of(header, file_len));
            if bytes > MAX_L1_BYTES || !geometry.is_aligned(table.at.0) || !inside {
                return Err(corrupt(
                    "a snapshot's L1 table is too large, not aligned or not inside the file",
                ));
            }
            if bytes > 0 && (table.at.0 == 0 || taken.insert(table.at.0, bytes).is_some()) {
                return Err(corrupt("the L1 tables of two snapshots overlap"));
            }
        }
        let mut end = 0;
        for (at, bytes) in taken {
            if at < end {
                return Err(corrupt("the L1 tables of two snapshots overlap"));
            }
            end = at + bytes;
        }
        Ok(())
    }
}

/// The end of the file's last cluster, which may be cut short.
fn end_of(header: &Header, file_len: u64) -> u64 {
    file_len.next_multiple_of(header.geometry().cluster_size())
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

#[cfg(test)]
mod tests {
    use block::testing::MemStorage;

    use super::*;

    const CLUSTER: u64 = 65536;

    /// A file with a table of these entries at the third cluster: L1 offset, entries, name's length, extra data.
    fn read(count: u32, entries: &[(u64, u32, u16, u32)]) -> Result<Snapshots> {
        let mut table = Vec::new();
        for (l1, l1_entries, name, extra) in entries {
            let at = table.len();
            table.extend(l1.to_be_bytes());
            table.extend(l1_entries.to_be_bytes());
            table.extend([[0, 1], name.to_be_bytes()].concat());
            table.extend([0; 20]);
            table.extend(extra.to_be_bytes());
            table.resize((at + 41 + (*name as usize) + (*extra as usize).min(4096)).next_multiple_of(8), 0);
        }
        let mut bytes = vec![0; 2 * CLUSTER as usize];
        bytes.extend(table);
        bytes.resize(bytes.len().max(6 * CLUSTER as usize), 0);
        let header = Header {
            snapshots: count,
            snapshots_at: HostOffset(2 * CLUSTER),
            ..Header::new(1 << 20, 16, false)
        };
        Snapshots::read(&MemStorage::from(bytes), &header)
    }

    #[test]
    fn tables_of_variable_length_are_read() {
        let found = read(2, &[(3 * CLUSTER, 8, 5, 24), (4 * CLUSTER, 16, 300, 16)]).unwrap();
        assert_eq!(found.len, 72 + 360);
        assert_eq!(found.tables[1], SnapshotL1 { at: HostOffset(4 * CLUSTER), entries: 16 });
        assert_eq!(read(0, &[]).unwrap().len, 0);
    }

    #[test]
    fn tables_that_can_not_be_are_refused() {
        for (what, entries) in [
            ("not aligned", &[(3 * CLUSTER + 512, 8, 5, 24)][..]),
            ("at the header", &[(0, 8, 5, 24)]),
            ("past the end", &[(6 * CLUSTER, 8, 5, 24)]),
            ("overflows", &[(u64::MAX - 65535, 8, 5, 24)]),
            ("too many entries", &[(3 * CLUSTER, u32::MAX, 5, 24)]),
            ("too much extra data", &[(3 * CLUSTER, 8, 5, 1025)]),
            ("the same place", &[(3 * CLUSTER, 8, 5, 24), (3 * CLUSTER, 8, 5, 24)]),
            ("overlap", &[(3 * CLUSTER, 8193, 5, 24), (4 * CLUSTER, 8, 5, 24)]),
        ] {
            let error = read(entries.len() as u32, entries).map(|found| panic!("{what}: {found:?}"));
            assert_eq!(error.unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
        }
        // Entries of zeroes all the way to the end of the file: the count alone is no reason to believe in them.
        assert_eq!(read(65536, &[]).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
