//! The journal's two files, of any content.

use std::sync::Arc;

use block::Storage;
use block::testing::{Input, MemStorage};

use crate::entry::{Entry, GuestCluster, Home, State};
use crate::journal::{Journal, Record};

const BOOT: &str = "this boot";
const HEADER: usize = 88;
const RECORD: usize = 32;

/// A record as three numbers: the cluster, its home, its state.
type Numbers = [u64; 3];

/// A journal of any content is read as a plain reading of its format has it; and what is appended to it then comes back
/// with it, however often the files take turns or are emptied.
pub fn journal(data: &[u8]) {
    let mut input = Input(data);
    let (mode, len, acts) = (input.byte(), input.number(2) as usize, usize::from(input.byte() % 16));
    let mut acts = Input(input.bytes(acts * 2));
    let mut files = [input.bytes(len).to_vec(), input.0.to_vec()];
    for (index, file) in files.iter_mut().enumerate().filter(|(index, _)| mode >> index & 1 == 1) {
        seal(file, mode >> (2 + index) & 1 == 1);
    }
    let plain = files.each_ref().map(|file| read(file));
    let storages = files.map(|file| Arc::new(MemStorage::from(file)));
    let open = || {
        let [a, b] = storages.each_ref().map(|file| Arc::clone(file) as Arc<dyn Storage>);
        Journal::open(a, b, BOOT).unwrap()
    };
    let is_used_up = plain.iter().any(|(sequence, _)| *sequence > u64::MAX / 2 - 64);
    let mut known: Vec<Numbers> = match plain {
        [(a, first), (b, second)] if a <= b => [first, second].concat(),
        [(_, first), (_, second)] => [second, first].concat(),
    };
    assert_eq!(replayed(&open()), known);
    let mut journal = open();
    // Both files may have been in use: then there is none to append to until one is emptied.
    if let Err(error) = journal.clear() {
        return assert!(is_used_up, "{error}");
    }
    known.clear();
    assert_eq!(replayed(&open()), known);
    let mut older = 0;
    while !acts.is_empty() {
        let (act, number) = (acts.byte(), u64::from(acts.byte()));
        match act % 4 {
            0 | 1 => {
                let records = (0..number % 5).map(|n| [number, number << 16, n]);
                match journal.append(records.clone().map(record).collect::<Vec<_>>().into_iter()) {
                    Ok(()) => known.extend(records),
                    Err(error) => assert!(is_used_up, "{error}"),
                }
            }
            2 => {
                if journal.rotate() {
                    older = known.len();
                }
            }
            _ => match journal.drop_older() {
                Ok(()) => drop(known.drain(..std::mem::take(&mut older))),
                Err(error) => assert!(is_used_up, "{error}"),
            },
        }
        assert_eq!(replayed(&open()), known);
    }
}

fn record([cluster, home, state]: Numbers) -> Record {
    Record { cluster: GuestCluster(cluster), entry: Entry { home: Home(home), state: State(state) } }
}

fn replayed(journal: &Journal) -> Vec<Numbers> {
    let mut all = Vec::new();
    let found = journal.replay(|Record { cluster, entry }| {
        all.push([cluster.0, entry.home.0, entry.state.0]);
        Ok(())
    });
    found.unwrap();
    all
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The sequence and the records of one file.
fn read(file: &[u8]) -> (u64, Vec<Numbers>) {
    let boot = [BOOT.as_bytes(), &[0; 64][BOOT.len()..]].concat();
    let Some((header, records)) = file.split_at_checked(HEADER) else { return (0, Vec::new()) };
    let mut crc = crc32fast::hash(&header[..80]);
    // Higher ones would leave none for the next.
    let counts = long(header, 72) >> 63 == 0;
    let sum = [&crc.to_be_bytes()[..], &[0; 4]].concat();
    if !counts || !header.starts_with(b"FRAZILJ2") || header[8..72] != boot || header[80..] != sum {
        return (0, Vec::new());
    }
    let mut found = Vec::new();
    for record in records.chunks_exact(RECORD) {
        let mut hasher = crc32fast::Hasher::new_with_initial(crc);
        hasher.update(&record[..28]);
        crc = hasher.finalize();
        if record[28..] != crc.to_be_bytes() {
            break;
        }
        found.push([0, 8, 16].map(|at| long(record, at)));
    }
    (long(header, 72), found)
}

/// Makes a header right, and the checksums of all records but, with `torn`, the last: else none would ever be read.
fn seal(file: &mut Vec<u8>, torn: bool) {
    file.resize(file.len().max(HEADER), 0);
    file[..72].fill(0);
    file[..8].copy_from_slice(b"FRAZILJ2");
    file[8..8 + BOOT.len()].copy_from_slice(BOOT.as_bytes());
    let mut crc = crc32fast::hash(&file[..80]);
    file[80..84].copy_from_slice(&crc.to_be_bytes());
    file[84..88].fill(0);
    let count = ((file.len() - HEADER) / RECORD).saturating_sub(usize::from(torn));
    for record in file[HEADER..].chunks_exact_mut(RECORD).take(count) {
        let mut hasher = crc32fast::Hasher::new_with_initial(crc);
        hasher.update(&record[..28]);
        crc = hasher.finalize();
        record[28..].copy_from_slice(&crc.to_be_bytes());
    }
}
