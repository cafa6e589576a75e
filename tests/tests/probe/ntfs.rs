//! NTFS against NTFS-3G's tools.

use snapshot::probe::{FsKind, Verdict};

use crate::disk::Image;
use crate::expect;
use crate::tools::{ask, run};

/// How `ntfs-3g.probe --readwrite` says that the journal must be replayed by Windows first (`NTFS_VOLUME_*`).
const UNCLEAN_UNMOUNT: i32 = 15;

pub(crate) fn make() -> Image {
    let image = Image::new(16 << 20);
    run("mkntfs", &["-q", "-F", "-f", "-L", "Windows", image.path()]);
    image
}

/// Where mkntfs put $LogFile, full of ones: the longest such run of clusters begins there.
fn log_file(image: &Image) -> u64 {
    let bytes = image.read(0, image.len() as usize);
    let is_log = |at: &usize| bytes[*at..at + (64 << 10)].iter().all(|byte| *byte == 0xff);
    let found = (0..bytes.len() - (64 << 10)).step_by(4096).find(is_log);
    found.expect("mkntfs fills the journal with ones") as u64
}

/// A restart page as Windows writes it, its update sequence applied.
fn restart_page(lsn: u64, client_in_use: u16, flags: u16) -> Vec<u8> {
    let mut page = vec![0_u8; 4096];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    let (sequence, area) = (30_u16, 64_u16);
    put(0, b"RSTR");
    put(4, &sequence.to_le_bytes());
    put(6, &9_u16.to_le_bytes());
    put(16, &4096_u32.to_le_bytes());
    put(20, &4096_u32.to_le_bytes());
    put(24, &area.to_le_bytes());
    put(26, &1_u16.to_le_bytes());
    put(28, &1_u16.to_le_bytes());
    put(64, &lsn.to_le_bytes());
    put(72, &1_u16.to_le_bytes());
    put(74, &if client_in_use == 0 { 0xffff_u16 } else { 0 }.to_le_bytes());
    put(76, &client_in_use.to_le_bytes());
    put(78, &flags.to_le_bytes());
    // Sequence number bits for a file of 2 MiB, lengths of the area, and of a record's header.
    put(80, &(67_u32 - 22).to_le_bytes());
    put(84, &(64_u16 + 160).to_le_bytes());
    put(86, &64_u16.to_le_bytes());
    put(88, &(2_u64 << 20).to_le_bytes());
    put(100, &48_u16.to_le_bytes());
    put(102, &64_u16.to_le_bytes());
    // The client's record: no others beside it, and its name.
    put(128 + 16, &[0xff; 4]);
    put(128 + 28, &8_u32.to_le_bytes());
    put(128 + 32, &[b'N', 0, b'T', 0, b'F', 0, b'S', 0]);
    put(30, &1_u16.to_le_bytes());
    for sector in 0..8 {
        put(sector * 512 + 510, &1_u16.to_le_bytes());
    }
    page
}

#[test]
fn a_new_one_is_clean() {
    let image = make();
    let found = expect(&image, FsKind::Ntfs, Verdict::Clean);
    assert_eq!(found.label.as_deref(), Some("Windows"));
    assert_eq!(ask("ntfs-3g.probe", &["--readwrite", image.path()]).status, 0);
    assert_eq!(run("blkid", &["-p", "-o", "value", "-s", "TYPE", image.path()]).text.trim(), "ntfs");
}

#[test]
fn the_dirty_flag_is_seen_as_ntfsfix_sets_and_clears_it() {
    let image = make();
    run("ntfsfix", &[image.path()]);
    expect(&image, FsKind::Ntfs, Verdict::Dirty);
    run("ntfsfix", &["-d", image.path()]);
    expect(&image, FsKind::Ntfs, Verdict::Clean);
}

#[test]
fn a_journal_in_use_needs_replay_unless_it_says_clean() {
    let image = make();
    let log = log_file(&image);
    image.write(log, &restart_page(100, 0, 0));
    image.write(log + 4096, &restart_page(90, 0, 2));
    expect(&image, FsKind::Ntfs, Verdict::Replay);
    assert_eq!(ask("ntfs-3g.probe", &["--readwrite", image.path()]).status, UNCLEAN_UNMOUNT);
    // The newer page counts, whichever it is.
    image.write(log + 4096, &restart_page(110, 0, 2));
    expect(&image, FsKind::Ntfs, Verdict::Clean);
    assert_eq!(ask("ntfs-3g.probe", &["--readwrite", image.path()]).status, 0);
    image.write(log, &restart_page(120, 0xffff, 0));
    expect(&image, FsKind::Ntfs, Verdict::Clean);
    assert_eq!(ask("ntfs-3g.probe", &["--readwrite", image.path()]).status, 0);
}

#[test]
fn a_torn_restart_page_is_not_believed() {
    let image = make();
    let log = log_file(&image);
    let mut torn = restart_page(100, 0, 2);
    torn[510] ^= 1;
    image.write(log, &torn);
    expect(&image, FsKind::Ntfs, Verdict::Unknown);
    image.write(log + 4096, &restart_page(90, 0, 0));
    expect(&image, FsKind::Ntfs, Verdict::Replay);
}
