//! UFS1 and UFS2, the BSDs' fast file system.
//!
//! Source: `struct fs` in FreeBSD's and NetBSD's `sys/ufs/ffs/fs.h` (1376 bytes, the magic number last), and the mount
//! and unmount paths in their `ffs_vfsops.c` and `ffs_wapbl.c`.
//!
//! - `fs_clean` is 1 after a clean unmount. While mounted for writing FreeBSD keeps 0 there, NetBSD 2 ("was clean"
//!   when mounted), and neither changes that when writing is suspended.
//! - NetBSD's journal (WAPBL) is announced by a flag that is set while mounted and cleared by a clean unmount. FreeBSD
//!   gives the same bit to NFSv4 ACLs, so the journal's version and place must be stated too; there FreeBSD counts
//!   unreferenced inodes, seldom so many.
//! - FreeBSD's journal of soft updates (SUJ) is a property: it is there to be replayed when `fs_clean` is not 1. It is
//!   fsck that replays it, which FreeBSD runs before it mounts.

use block::Result;

use super::verdict::{Finding, FsKind, Verdict};
use super::volume::{Block, Volume};

/// In the order in which the BSDs search: UFS2's place, UFS1's, a floppy's, and past large boot blocks.
const SUPER_BLOCKS: [u64; 4] = [64 * 1024, 8 * 1024, 0, 256 * 1024];
const UFS2_PLACE: u64 = 64 * 1024;
const SIZE: usize = 1376;

const CLEAN: usize = 209;
const OLD_FLAGS: usize = 211;
const VOLUME_NAME: usize = 680;
const JOURNAL_VERSION: usize = 864;
const JOURNAL_PLACE: usize = 865;
const SUPER_BLOCK_PLACE: usize = 1000;
const FLAGS: usize = 1312;
const MAGIC: usize = 1372;

const UFS1_MAGIC: u32 = 0x0001_1954;
const UFS2_MAGIC: u32 = 0x1954_0119;
/// UFS2 with extended attributes, NetBSD since 10.
const UFS2_EA_MAGIC: u32 = 0x1901_2038;

const NEEDS_FSCK: u32 = 0x4;
const SOFT_UPDATES_JOURNAL: u32 = 0x8;
/// In the old flags' byte: the flags have moved to the new field.
const FLAGS_MOVED: u8 = 0x80;
const WAPBL: u32 = 0x100;
const WAPBL_VERSION: u8 = 1;
/// Behind the file system in its partition, or in a file of it.
const WAPBL_PLACES: [u8; 2] = [1, 2];

pub(super) fn probe(volume: &Volume<'_>) -> Result<Option<Finding>> {
    for place in SUPER_BLOCKS {
        let found = volume.read(place, SIZE)?.and_then(|block| parse(&block, place));
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// The machine's byte order is the file system's.
struct Fields<'a> {
    block: &'a Block,
    big_endian: bool,
}

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        if self.big_endian { self.block.be32(at) } else { self.block.le32(at) }
    }

    fn u64(&self, at: usize) -> u64 {
        if self.big_endian { self.block.be64(at) } else { self.block.le64(at) }
    }
}

fn parse(block: &Block, place: u64) -> Option<Finding> {
    let (fields, kind) = [false, true].into_iter().find_map(|big_endian| {
        let fields = Fields { block, big_endian };
        match fields.u32(MAGIC) {
            UFS1_MAGIC => Some((fields, FsKind::Ufs1)),
            UFS2_MAGIC | UFS2_EA_MAGIC => Some((fields, FsKind::Ufs2)),
            _ => None,
        }
    })?;
    // A copy of the super-block may lie at one of the places; only the standard one names its own place. UFS1 has no
    // such field, and with blocks of 64 KiB it is a copy that lies where UFS2 begins.
    let is_copy = match kind {
        FsKind::Ufs1 => place == UFS2_PLACE,
        _ => fields.u64(SUPER_BLOCK_PLACE) != place,
    };
    if is_copy {
        return None;
    }
    let (verdict, detail) = judge(&fields, kind);
    Some(Finding::new(kind, verdict, detail).labelled(block.label(VOLUME_NAME, 32)))
}

fn judge(fields: &Fields<'_>, kind: FsKind) -> (Verdict, String) {
    let (clean, old_flags) = (fields.block.u8(CLEAN), fields.block.u8(OLD_FLAGS));
    let flags = match kind == FsKind::Ufs1 && old_flags & FLAGS_MOVED == 0 {
        true => u32::from(old_flags),
        false => fields.u32(FLAGS),
    };
    let state = format!("fs_clean {clean}, fs_flags {flags:#x}");
    if flags & NEEDS_FSCK != 0 {
        return (Verdict::Dirty, format!("{state}: it asks for fsck"));
    }
    let journal = (fields.block.u8(JOURNAL_VERSION), fields.block.u8(JOURNAL_PLACE));
    if flags & WAPBL != 0 && journal.0 == WAPBL_VERSION && WAPBL_PLACES.contains(&journal.1) {
        return (Verdict::Replay, format!("{state}: NetBSD's journal is in use"));
    }
    match clean {
        1 => (Verdict::Clean, format!("{state}: unmounted")),
        _ if flags & SOFT_UPDATES_JOURNAL != 0 => {
            (Verdict::Replay, format!("{state}: not unmounted, fsck replays the soft updates' journal"))
        }
        _ => (Verdict::Dirty, format!("{state}: not unmounted, and no journal to replay")),
    }
}
