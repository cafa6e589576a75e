//! ext2, ext3, ext4.
//!
//! Source: Linux `Documentation/filesystems/ext4/super.rst` for the fields; `ext4_freeze`, `ext4_setup_super` and
//! `ext4_put_super` in `fs/ext4/super.c` for when they change.
//!
//! - A journal with content is announced by the feature `needs_recovery`: set while mounted for writing, cleared by a
//!   clean unmount and by a freeze, which first writes the whole journal back.
//! - Without a journal the valid bit of `s_state` is cleared while mounted, and set by a clean unmount.
//! - The error bit of `s_state` asks for a check, whatever the journal says.

use block::Result;

use super::checksum::crc32c;
use super::verdict::{Finding, FsKind, Verdict};
use super::volume::{Block, Volume};

const SUPER_BLOCK: u64 = 1024;
const SIZE: usize = 1024;

const LOG_BLOCK_SIZE: usize = 0x18;
const MAGIC: usize = 0x38;
const STATE: usize = 0x3a;
const COMPAT: usize = 0x5c;
const INCOMPAT: usize = 0x60;
const RO_COMPAT: usize = 0x64;
const LABEL: usize = 0x78;
const LAST_ORPHAN: usize = 0xe8;
const CHECKSUM: usize = 0x3fc;

const STATE_VALID: u16 = 1;
const STATE_ERRORS: u16 = 2;
const COMPAT_HAS_JOURNAL: u32 = 0x4;
const INCOMPAT_NEEDS_RECOVERY: u32 = 0x4;
const INCOMPAT_JOURNAL_DEVICE: u32 = 0x8;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const RO_COMPAT_ORPHANS_PRESENT: u32 = 0x1_0000;
/// What the drivers of ext2 and ext3 know: filetype, needs_recovery, meta_bg; sparse_super, large_file, btree_dir.
const INCOMPAT_BEFORE_EXT4: u32 = 0x2 | 0x4 | 0x10;
const RO_COMPAT_BEFORE_EXT4: u32 = 0x1 | 0x2 | 0x4;

pub(super) fn probe(volume: &Volume<'_>) -> Result<Option<Finding>> {
    Ok(volume.read(SUPER_BLOCK, SIZE)?.and_then(|block| parse(&block)))
}

fn parse(block: &Block) -> Option<Finding> {
    // Linux knows blocks of 1 KiB to 64 KiB.
    if block.le16(MAGIC) != 0xef53 || block.le32(LOG_BLOCK_SIZE) > 6 {
        return None;
    }
    let kind = kind(block);
    let (verdict, detail) = judge(block);
    Some(Finding::new(kind, verdict, detail).labelled(block.label(LABEL, 16)))
}

fn kind(block: &Block) -> FsKind {
    let newer = block.le32(INCOMPAT) & !INCOMPAT_BEFORE_EXT4 != 0
        || block.le32(RO_COMPAT) & !RO_COMPAT_BEFORE_EXT4 != 0;
    match (newer, block.le32(COMPAT) & COMPAT_HAS_JOURNAL != 0) {
        (true, _) => FsKind::Ext4,
        (false, true) => FsKind::Ext3,
        (false, false) => FsKind::Ext2,
    }
}

fn judge(block: &Block) -> (Verdict, String) {
    let (state, incompat, ro_compat) = (block.le16(STATE), block.le32(INCOMPAT), block.le32(RO_COMPAT));
    let needs_recovery = incompat & INCOMPAT_NEEDS_RECOVERY != 0;
    let recovery = if needs_recovery { "needs_recovery is set" } else { "needs_recovery is not set" };
    if incompat & INCOMPAT_JOURNAL_DEVICE != 0 {
        return (Verdict::Opaque, "a journal of a file system elsewhere".into());
    }
    // The kernel keeps the sum without the last inversion.
    if ro_compat & RO_COMPAT_METADATA_CSUM != 0
        && !crc32c(&[block.bytes(0, CHECKSUM)]) != block.le32(CHECKSUM)
    {
        return (Verdict::Dirty, "the super-block's checksum is wrong".into());
    }
    if state & STATE_ERRORS != 0 {
        return (Verdict::Dirty, format!("errors are noted in the super-block; {recovery}"));
    }
    if needs_recovery {
        return (Verdict::Replay, recovery.into());
    }
    if state & STATE_VALID == 0 {
        return (Verdict::Dirty, format!("not unmounted (state {state:#x}), and no journal to replay"));
    }
    // Left by a freeze too, where a deleted file was open: no fault, the mount finishes the deletion.
    let orphans = block.le32(LAST_ORPHAN) != 0 || ro_compat & RO_COMPAT_ORPHANS_PRESENT != 0;
    let orphans = if orphans { "; deleted files that were open are freed at the next mount" } else { "" };
    (Verdict::Clean, format!("{recovery}, state clean{orphans}"))
}
