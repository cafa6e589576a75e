use block::testing::{CrashStorage, MemStorage};

use super::*;
use crate::header::AUTOCLEAR_BITMAPS;

/// An image's header, as it is if it were written by somebody else: `unknown` bytes of an extension nobody knows.
fn image(bits: u32, version: u32, backing: Option<(&str, &str)>, unknown: usize) -> CrashStorage {
    let mut header = Header::new(1 << 20, bits, false);
    (header.version, header.l1_entries, header.refcount_table_clusters) = (version, 64, 1);
    (header.refcount_table, header.l1) = (HostOffset(1 << bits), HostOffset(2 << bits));
    header.autoclear = if version == 3 { 1 << 40 | AUTOCLEAR_BITMAPS } else { 0 };
    let mut extensions = Extensions::default();
    if let Some((name, format)) = backing {
        header.backing_file = Some(name.to_owned());
        extensions = extensions.with(BACKING_FORMAT, Some(format.as_bytes()));
    }
    extensions =
        extensions.with(FEATURE_NAMES, Some(&[0x33; 384]).filter(|_| bits > 9).map(|names| &names[..]));
    header.extensions = extensions.with(0x1234, Some(&vec![0x55; unknown]));
    let storage = CrashStorage::new();
    storage.set_len(4 << bits).unwrap();
    storage.write_at(&header.encode(), 0).unwrap();
    storage.sync().unwrap();
    storage
}

fn names(storage: &dyn Storage) -> Option<(String, String)> {
    let header = Header::read(storage).unwrap();
    header.backing_file.zip(header.backing_format)
}

/// Stops before each of its steps, and shows every mixture of sectors that a loss of power could leave.
#[derive(Debug)]
struct Stop<'a> {
    inner: &'a CrashStorage,
    expected: [Option<(String, String)>; 2],
    unknown: usize,
}

impl Stop<'_> {
    fn look(&self) {
        for keep in [0_u64, !0, 0x5555, 0xaaaa, 0x1, 0x2, 0x3, 0x6, 0xfffe, 0xfffd] {
            let mut turn = 0;
            let left = self.inner.after_power_loss(|| {
                turn += 1;
                keep >> (turn % 64) & 1 == 1
            });
            let found = names(&left);
            assert!(self.expected.contains(&found), "{keep:#x}: {found:?}");
            let header = Header::read(&left).unwrap();
            assert_eq!(header.extensions.get(0x1234), Some(&vec![0x55; self.unknown][..]), "{keep:#x}");
        }
    }
}

impl Storage for Stop<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.inner.write_at(buf, offset)?;
        self.look();
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.look();
        self.inner.sync()
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }

    fn punch_hole(&self, range: block::ByteRange) -> Result<()> {
        self.inner.punch_hole(range)
    }
}

#[test]
fn a_loss_of_power_leaves_the_old_names_or_the_new_ones() {
    let long = "n".repeat(1023);
    let choices = [None, Some(("base", "raw")), Some(("elsewhere/base", "qcow2")), Some((&*long, "raw"))];
    let mut changes = 0;
    for (bits, version) in [(9, 3), (9, 2), (16, 2), (16, 3)] {
        for unknown in [0, 8, 9, 100, 2000] {
            for (before, after) in choices.iter().flat_map(|a| choices.iter().map(move |b| (*a, *b))) {
                let name_len = |names: Option<(&str, &str)>| names.map_or(0, |(name, _)| name.len());
                if (1 << bits) < 104 + 24 + unknown + 32 + name_len(before).max(name_len(after)) {
                    continue;
                }
                let storage = image(bits, version, before, unknown);
                let owned = |names: Option<(&str, &str)>| names.map(|(a, b)| (a.to_owned(), b.to_owned()));
                let expected = [owned(before), owned(after)];
                let stop = Stop { inner: &storage, expected: expected.clone(), unknown };
                match set_backing(&stop, after) {
                    Ok(()) => changes += 1,
                    Err(error) => {
                        // Only where the format's extension would have to move others across sectors.
                        assert_eq!(error.kind(), ErrorKind::Unsupported, "{before:?} {after:?} {unknown}");
                        assert!(unknown > 8 && bits > 9, "{before:?} {after:?} {unknown} {bits}");
                        continue;
                    }
                }
                assert_eq!(names(&storage.after_power_loss(|| false)), expected[1]);
                let header = Header::read(&storage).unwrap();
                assert_eq!(header.autoclear, if version == 3 { AUTOCLEAR_BITMAPS } else { 0 });
            }
        }
    }
    assert!(changes > 150, "{changes}");
}

/// The second attempt found the bytes behind the first sector as they should be, and left them out.
#[test]
fn what_an_attempt_could_not_sync_is_written_again() {
    let storage = image(16, 3, None, 0);
    let name = "b".repeat(700);
    storage.fail_syncs(1);
    set_backing(&storage, Some((&name, "raw"))).unwrap_err();
    set_backing(&storage, Some((&name, "raw"))).unwrap();
    assert_eq!(names(&storage.after_power_loss(|| false)), Some((name, "raw".to_owned())));
}

#[test]
fn fields_change_and_nothing_else_does() {
    let storage =
        MemStorage::from(image(16, 3, Some(("base", "raw")), 100).after_power_loss(|| true).bytes());
    let before = storage.bytes();
    write_mapping(&storage, 2 << 20, HostOffset(3 << 16), 128).unwrap();
    write_refcount_table(&storage, HostOffset(2 << 16), 2).unwrap();
    write_incompatible(&storage, 1).unwrap();
    write_autoclear(&storage, 0).unwrap();
    let header = Header::read(&storage).unwrap();
    assert_eq!((header.capacity, header.l1, header.l1_entries), (2 << 20, HostOffset(3 << 16), 128));
    assert_eq!((header.refcount_table, header.refcount_table_clusters), (HostOffset(2 << 16), 2));
    assert_eq!((header.is_dirty(), header.autoclear), (true, 0));
    let after = storage.bytes();
    let same = [0..24, 60..72, 80..88, 96..before.len()];
    assert!(same.into_iter().all(|range| before[range.clone()] == after[range]));
}

#[test]
fn names_that_no_header_can_have_are_refused() {
    let storage = image(9, 3, None, 0);
    for (name, format) in [("", "raw"), (&*"n".repeat(1024), "raw"), ("a\0b", "raw"), ("base", "vmdk")] {
        assert_eq!(set_backing(&storage, Some((name, format))).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    let error = set_backing(&storage, Some((&"n".repeat(600), "raw"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(storage.unsynced(), 0);
}
