use block::testing::MemStorage;

use super::*;
use crate::extensions::Extensions;

const CLUSTER: u64 = 65536;

/// One directory entry: table offset, table entries, flags, type, granularity bits, extra data, name.
type Raw<'a> = (u64, u32, u32, u8, u8, u32, &'a [u8]);

const GOOD: Raw<'static> = (3 * CLUSTER, 1, AUTO, 1, 16, 0, b"name");

fn encode(entries: &[Raw<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (table, table_entries, flags, kind, granularity, extra, name) in entries {
        bytes.extend(table.to_be_bytes());
        bytes.extend(table_entries.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend([*kind, *granularity]);
        bytes.extend((name.len() as u16).to_be_bytes());
        bytes.extend(extra.to_be_bytes());
        bytes.extend(vec![0; (*extra).min(1000) as usize]);
        bytes.extend(*name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

/// Reads a directory at the third cluster of an image of six.
fn read(count: u32, len: u64, at: u64, directory: &[u8]) -> Result<Option<Directory>> {
    let extension =
        [&u64::from(count).rotate_left(32).to_be_bytes()[..], &len.to_be_bytes(), &at.to_be_bytes()];
    let header = Header {
        extensions: Extensions::default().with(BITMAPS, Some(&extension.concat())),
        autoclear: AUTOCLEAR_BITMAPS,
        ..Header::new(1 << 30, 16, false)
    };
    let mut bytes = vec![0; 2 * CLUSTER as usize];
    bytes.extend(directory);
    bytes.resize(6 * CLUSTER as usize, 0);
    Directory::read(&MemStorage::from(bytes), &header)
}

fn decode(entries: &[Raw<'_>]) -> Result<Directory> {
    let bytes = encode(entries);
    read(entries.len() as u32, bytes.len() as u64, 2 * CLUSTER, &bytes).map(Option::unwrap)
}

#[test]
fn entries_of_all_lengths_are_found_where_they_are() {
    let long = [b'x'; 1023];
    let other = (4 * CLUSTER, 2, AUTO | EXTRA_DATA_COMPATIBLE, 1, 10, 13, &long[..]);
    let found = decode(&[other, GOOD]).unwrap();
    let [first, second] = &found.entries[..] else { panic!("{found:?}") };
    assert_eq!((first.name.len(), first.table_entries, first.granularity_bits), (1023, 2, 10));
    assert_eq!((second.position, second.unusable), (2 * CLUSTER + 24 + 13 + 1023 + 4, None));
    assert!(second.is_auto() && !second.is_in_use());
    assert_eq!(second.data_bytes(1 << 30), 2048);
}

#[test]
fn a_bitmap_that_is_not_known_is_kept_apart() {
    let long = [b'x'; 1024];
    for (what, entry) in [
        ("type", (3 * CLUSTER, 9, 0, 2, 16, 0, &b"a"[..])),
        ("flags", (3 * CLUSTER, 9, 8, 1, 16, 0, b"a")),
        ("extra data", (3 * CLUSTER, 9, 0, 1, 16, 8, b"a")),
        ("granularity", (3 * CLUSTER, 9, 0, 1, 63, 0, b"a")),
        ("long name", (3 * CLUSTER, 9, 0, 1, 16, 0, &long)),
        ("name", (3 * CLUSTER, 9, 0, 1, 16, 0, b"\xff")),
    ] {
        let found = decode(&[entry, (4 * CLUSTER, 1, AUTO, 1, 16, 0, b"name")]).unwrap();
        assert!(found.entries[0].unusable.is_some() && found.entries[1].unusable.is_none(), "{what}");
    }
}

#[test]
fn a_directory_that_makes_no_sense_is_refused() {
    let corrupt = |what: &str, found: Result<Directory>| match found {
        Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}"),
        Ok(found) => panic!("{what}: {found:?}"),
    };
    for (what, entry) in [
        ("no table", (0, 1, 0, 1, 16, 0, &b"a"[..])),
        ("table not aligned", (3 * CLUSTER + 512, 1, 0, 1, 16, 0, b"a")),
        ("table past the end", (6 * CLUSTER, 1, 0, 1, 16, 0, b"a")),
        ("table overflows", (u64::MAX - CLUSTER + 1, 1, 0, 1, 16, 0, b"a")),
        ("empty table", (3 * CLUSTER, 0, 0, 1, 16, 0, b"a")),
        ("table too large", (3 * CLUSTER, u32::MAX, 0, 1, 16, 0, b"a")),
        ("table of another size", (3 * CLUSTER, 2, 0, 1, 16, 0, b"a")),
        ("no name", (3 * CLUSTER, 1, 0, 1, 16, 0, b"")),
        ("extra data cut off", (3 * CLUSTER, 1, 0, 1, 16, 5000, b"a")),
        ("extra data overflows", (3 * CLUSTER, 1, 0, 1, 16, u32::MAX, b"a")),
    ] {
        corrupt(what, decode(&[entry]));
    }
    // In use it may be of any size: it is not looked at.
    decode(&[(3 * CLUSTER, 2, IN_USE, 1, 16, 0, b"a")]).unwrap();
    corrupt("the same name twice", decode(&[GOOD, GOOD]));
    let bytes = encode(&[GOOD]);
    let len = bytes.len() as u64;
    for (what, count, len, at) in [
        ("none", 0, len, 2 * CLUSTER),
        ("more than there are", 2, len, 2 * CLUSTER),
        ("too many", 65536, len, 2 * CLUSTER),
        ("empty", 1, 0, 2 * CLUSTER),
        ("cut off", 1, len - 8, 2 * CLUSTER),
        ("longer than its entries", 1, len + 8, 2 * CLUSTER),
        ("huge", 1, 1 << 40, 2 * CLUSTER),
        ("not aligned", 1, len, 2 * CLUSTER + 8),
        ("at the header", 1, len, 0),
        ("past the end", 1, len, 6 * CLUSTER),
    ] {
        corrupt(what, read(count, len, at, &bytes).map(Option::unwrap));
    }
}

#[test]
fn table_entries_come_back_from_their_words() {
    let header = Header::new(1 << 30, 16, false);
    for word in [0, 1, 2 * CLUSTER, 5 * CLUSTER] {
        assert_eq!(TableEntry::decode(&header, word, 6 * CLUSTER).unwrap().encode(), word);
    }
    for word in [2, 2 * CLUSTER + 1, 2 * CLUSTER + 512, 6 * CLUSTER, 1 << 56, 1 << 63 | CLUSTER] {
        assert!(TableEntry::decode(&header, word, 6 * CLUSTER).is_err(), "{word:#x}");
    }
}
