use block::testing::{FaultStorage, MemStorage};

use super::*;
use crate::entry::HostOffset;

fn record(n: u64) -> Record {
    let entry = Entry { home: Home::own(HostOffset(n << 16)), state: State(n) };
    Record { cluster: GuestCluster(n), entry }
}

fn records(journal: &Journal) -> Vec<u64> {
    let mut all = Vec::new();
    let collect = |found: Record| {
        assert_eq!(found, record(found.cluster.0));
        all.push(found.cluster.0);
        Ok(())
    };
    journal.replay(collect).unwrap();
    all
}

fn file() -> Arc<FaultStorage> {
    Arc::new(FaultStorage::new(MemStorage::default()))
}

fn open(a: &Arc<FaultStorage>, b: &Arc<FaultStorage>) -> Journal {
    Journal::open(a.clone(), b.clone(), "one").unwrap()
}

#[test]
fn records_come_back_in_order_on_the_same_boot_only() {
    let (a, b) = (file(), file());
    let mut journal = open(&a, &b);
    journal.append([record(1), record(2)].into_iter()).unwrap();
    assert!(journal.rotate());
    journal.append([record(3)].into_iter()).unwrap();
    assert_eq!(records(&open(&a, &b)), [1, 2, 3]);
    assert_eq!(records(&Journal::open(a.clone(), b.clone(), "two").unwrap()), []);
    journal.drop_older().unwrap();
    assert_eq!(records(&open(&a, &b)), [3]);
    // Now the first file is the newer one.
    assert!(journal.rotate());
    journal.append([record(4)].into_iter()).unwrap();
    assert_eq!(records(&open(&a, &b)), [3, 4]);
    // The other boot's records go once there are new ones.
    let mut other = Journal::open(a.clone(), b.clone(), "two").unwrap();
    other.append([record(5)].into_iter()).unwrap();
    other.rotate();
    other.append([record(6)].into_iter()).unwrap();
    assert_eq!(records(&Journal::open(a.clone(), b.clone(), "two").unwrap()), [5, 6]);
    assert_eq!(records(&Journal::create(a, b, "two").unwrap()), []);
}

/// They are read in pieces.
#[test]
fn more_records_than_are_read_at_once_come_back() {
    let (a, b) = (file(), file());
    let all: Vec<u64> = (0..2 * CHUNK + 3).collect();
    let appended = all.iter().copied().map(record).collect::<Vec<_>>();
    open(&a, &b).append(appended.into_iter()).unwrap();
    assert!(records(&open(&a, &b)) == all);
}

#[test]
fn a_torn_record_ends_the_replay() {
    let (a, b) = (file(), file());
    let mut journal = open(&a, &b);
    journal.append([record(1), record(2), record(3)].into_iter()).unwrap();
    a.write_at(&[9], (HEADER_LEN + RECORD_LEN + 3) as u64).unwrap();
    assert_eq!(records(&open(&a, &b)), [1]);
    a.set_len((HEADER_LEN + RECORD_LEN - 1) as u64).unwrap();
    assert_eq!(records(&open(&a, &b)), []);
}

#[test]
fn a_header_after_which_no_other_could_come_is_nobodys() {
    for sequence in [u64::MAX, MOST_SEQUENCES] {
        let (a, b, mut header) = (file(), file(), Vec::new());
        encode_header(&open(&a, &b).boot_id, sequence, &mut header);
        a.write_at(&header, 0).unwrap();
        let mut journal = open(&a, &b);
        journal.append([record(1)].into_iter()).unwrap();
        assert_eq!(records(&open(&a, &b)), [1]);
    }
}

/// The files are never cut: behind the records of one use lie those of earlier ones.
#[test]
fn what_an_earlier_use_left_behind_is_not_read() {
    let (a, b) = (file(), file());
    let mut journal = open(&a, &b);
    for n in 0..6 {
        // Each begins with the same record.
        journal.append([record(9), record(n), record(n)].into_iter()).unwrap();
        journal.rotate();
        journal.append([record(10)].into_iter()).unwrap();
        assert_eq!(records(&open(&a, &b)), [9, n, n, 10]);
        journal.clear().unwrap();
        assert_eq!(records(&open(&a, &b)), []);
        journal.append([record(9)].into_iter()).unwrap();
        assert_eq!(records(&open(&a, &b)), [9]);
        // Also by another process, and of a journal begun anew.
        journal = match n % 2 {
            0 => open(&a, &b),
            _ => Journal::create(a.clone(), b.clone(), "one").unwrap(),
        };
        journal.clear().unwrap();
    }
}

/// Found by a fuzzer: the header after it would not have been read again, nor what was acknowledged with it.
#[test]
fn nothing_is_appended_under_a_header_that_is_not_read_again() {
    for (left, appended) in [(1, 0), (2, 0), (3, 1), (4, 2)] {
        let (a, b) = (file(), file());
        let boot_id = open(&a, &b).boot_id;
        let mut header = Vec::new();
        encode_header(&boot_id, MOST_SEQUENCES - left, &mut header);
        a.write_at(&header, 0).unwrap();
        let mut journal = open(&a, &b);
        let mut known = Vec::new();
        for n in 0..3 {
            if journal.append([record(n)].into_iter()).is_ok() {
                known.push(n);
            }
            assert_eq!(records(&open(&a, &b)), known);
            journal.rotate();
        }
        assert!(known.len() >= appended, "{left} left, {known:?}");
    }
}

#[test]
fn a_failed_append_leaves_nothing_behind_the_next_one() {
    let (a, b) = (file(), file());
    let mut journal = open(&a, &b);
    journal.append([record(1)].into_iter()).unwrap();
    // The write fails after its bytes went down, and so does wiping them out.
    let (mut bytes, mut crc) = (Vec::new(), journal.files[0].crc);
    for (n, number) in [(2, 1), (3, 2), (4, 3)] {
        crc = encode_record(record(n), number, crc, &mut bytes);
    }
    a.write_at(&bytes, journal.files[0].len).unwrap();
    a.fail_writes(2);
    journal.append([record(2), record(3), record(4)].into_iter()).unwrap_err();
    assert_eq!(records(&open(&a, &b)), [1, 2, 3, 4], "what could not be wiped out shows until there is more");
    // The same first record again: what follows it is of the failed append all the same.
    journal.append([record(2)].into_iter()).unwrap();
    assert_eq!(records(&open(&a, &b)), [1, 2]);
}

/// A write failed in the middle of its records. Nobody knows them, so no replay may, whatever happens in between:
/// a state that never was would win over those that came later.
#[test]
fn a_failed_append_is_not_left_behind_in_the_other_half() {
    for before in [0, 1] {
        let (a, b) = (file(), file());
        let mut journal = open(&a, &b);
        (0..before).for_each(|n| journal.append([record(n)].into_iter()).unwrap());
        a.fail_writes(2);
        journal.append([record(7), record(8)].into_iter()).unwrap_err();
        assert!(!journal.rotate(), "the half would never be appended to again");
        journal.append([record(9)].into_iter()).unwrap();
        assert!(journal.rotate());
        let found = records(&open(&a, &b));
        assert!(found.ends_with(&[9]) && !found.contains(&7), "{found:?}");
    }
}

#[test]
fn a_failed_append_is_wiped_out_at_once() {
    let (a, b) = (file(), file());
    let mut journal = open(&a, &b);
    journal.append([record(1)].into_iter()).unwrap();
    let mut bytes = Vec::new();
    encode_record(record(2), 1, journal.files[0].crc, &mut bytes);
    a.write_at(&bytes, journal.files[0].len).unwrap();
    a.fail_writes(1);
    journal.append([record(2)].into_iter()).unwrap_err();
    assert_eq!(records(&open(&a, &b)), [1]);
}

#[test]
fn a_failed_flush_keeps_its_records() {
    let (a, b) = (file(), file());
    let mut journal = open(&a, &b);
    journal.append([record(1)].into_iter()).unwrap();
    assert!(journal.rotate());
    journal.append([record(2)].into_iter()).unwrap();
    // The flush failed and is tried again: nothing may be dropped but what it then writes out.
    assert!(!journal.rotate());
    journal.append([record(3)].into_iter()).unwrap();
    assert_eq!(records(&open(&a, &b)), [1, 2, 3]);
    journal.drop_older().unwrap();
    assert_eq!(records(&open(&a, &b)), [2, 3]);
}

/// Both are empty, and take turns with every flush: the one that got records later is the newer one.
#[test]
fn the_half_that_was_written_later_is_the_newer_one() {
    let (a, b) = (file(), file());
    let mut journal = open(&a, &b);
    for n in 0..4 {
        (0..n).for_each(|_| assert!(journal.rotate()));
        journal.append([record(1)].into_iter()).unwrap();
        assert!(journal.rotate());
        journal.append([record(2)].into_iter()).unwrap();
        assert_eq!(records(&open(&a, &b)), [1, 2], "{n}");
        journal.clear().unwrap();
    }
}
