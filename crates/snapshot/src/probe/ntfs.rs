//! NTFS.
//!
//! Source: the layout and `$LogFile` headers of Linux's NTFS driver and of NTFS-3G (`layout.h`, `logfile.h`,
//! `ntfs_is_logfile_clean`).
//!
//! ```text
//!  boot sector ──▶ MFT record 3, $Volume  ──▶ $VOLUME_INFORMATION: dirty flag
//!              └─▶ MFT record 2, $LogFile ──▶ first run ──▶ two restart pages, the newer one counts
//! ```
//!
//! The journal is clean when it is empty (all ones), when no client has it open (Windows 2000 and before), or when it
//! says that the volume is clean (XP and later keep the client open, and say so when dismounting). The dirty flag
//! asks for chkdsk.

use block::Result;

use super::verdict::{Finding, FsKind, Verdict};
use super::volume::{Block, Volume};

const BYTES_PER_SECTOR: usize = 11;
const SECTORS_PER_CLUSTER: usize = 13;
const MFT_CLUSTER: usize = 48;
const CLUSTERS_PER_RECORD: usize = 64;

const LOG_FILE: u64 = 2;
const VOLUME: u64 = 3;

/// In an MFT record and a restart page: where the update sequence is, and how many words it has.
const SEQUENCE_OFFSET: usize = 4;
const SEQUENCE_COUNT: usize = 6;
const FIRST_ATTRIBUTE: usize = 20;

const VOLUME_NAME: u32 = 0x60;
const VOLUME_INFORMATION: u32 = 0x70;
const DATA: u32 = 0x80;
const END: u32 = 0xffff_ffff;
/// Within an attribute.
const NON_RESIDENT: usize = 8;
const NAME_LENGTH: usize = 9;
const VALUE_LENGTH: usize = 16;
const VALUE_OFFSET: usize = 20;
const RUNS_OFFSET: usize = 32;
/// Within the value of $VOLUME_INFORMATION.
const VOLUME_FLAGS: usize = 10;
const VOLUME_IS_DIRTY: u16 = 1;

/// Restart pages are one system page apart, and that is 4 KiB on all that Windows runs on.
const PAGE: usize = 4096;
const RESTART_AREA: usize = 24;
/// Within a restart area.
const CURRENT_LSN: usize = 0;
const CLIENTS_IN_USE: usize = 12;
const LOG_FLAGS: usize = 14;
const NO_CLIENT: u16 = 0xffff;
const VOLUME_IS_CLEAN: u16 = 2;

pub(super) fn probe(volume: &Volume<'_>) -> Result<Option<Finding>> {
    let Some(boot) = volume.read(0, 512)?.filter(|boot| boot.has(3, b"NTFS    ")) else { return Ok(None) };
    let Some(layout) = Layout::new(&boot) else {
        return Ok(Some(unknown("the boot sector's sizes make no sense")));
    };
    let Some(record) = layout.record(volume, VOLUME)? else {
        return Ok(Some(unknown("the MFT record of $Volume is not readable")));
    };
    let label = attribute(&record, VOLUME_NAME).and_then(|name| {
        name.label_utf16(usize::from(name.le16(VALUE_OFFSET)), name.le32(VALUE_LENGTH) as usize)
    });
    let Some(information) = attribute(&record, VOLUME_INFORMATION) else {
        return Ok(Some(unknown("$Volume has no flags").labelled(label)));
    };
    let flags = information.le16(usize::from(information.le16(VALUE_OFFSET)) + VOLUME_FLAGS);
    let (verdict, detail) = judge(flags, layout.log(volume)?);
    Ok(Some(Finding::new(FsKind::Ntfs, verdict, detail).labelled(label)))
}

fn unknown(why: &str) -> Finding {
    Finding::new(FsKind::Ntfs, Verdict::Unknown, why)
}

fn judge(flags: u16, log: Log) -> (Verdict, String) {
    let text = match log {
        Log::Empty => "$LogFile is empty",
        Log::Clean => "$LogFile says clean",
        Log::InUse => "$LogFile is in use and to be replayed",
        Log::Unreadable => "$LogFile has no readable restart page",
    };
    let dirty = flags & VOLUME_IS_DIRTY != 0;
    let verdict = match log {
        _ if dirty => Verdict::Dirty,
        Log::Empty | Log::Clean => Verdict::Clean,
        Log::InUse => Verdict::Replay,
        Log::Unreadable => Verdict::Unknown,
    };
    let flag = if dirty { "the dirty flag is set" } else { "the dirty flag is not set" };
    (verdict, format!("{flag}, {text}"))
}

/// What the journal's restart pages say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Log {
    Empty,
    Clean,
    InUse,
    Unreadable,
}

/// Where things are, from the boot sector.
struct Layout {
    cluster: u64,
    mft: u64,
    record: usize,
}

impl Layout {
    fn new(boot: &Block) -> Option<Self> {
        let sector = u64::from(boot.le16(BYTES_PER_SECTOR));
        let cluster = match boot.u8(SECTORS_PER_CLUSTER) {
            count @ 1..=0x80 => sector * u64::from(count),
            // Larger clusters: the negative binary logarithm of the number of sectors.
            exponent => sector.checked_shl(0x100 - u32::from(exponent))?,
        };
        let record = match boot.u8(CLUSTERS_PER_RECORD).cast_signed() {
            count @ 1.. => cluster.checked_mul(count.unsigned_abs().into())?,
            exponent => 1_u64.checked_shl(exponent.unsigned_abs().into())?,
        };
        let plausible = (256..=4096).contains(&sector)
            && sector.is_power_of_two()
            && (sector..=2 << 20).contains(&cluster)
            && cluster.is_power_of_two()
            && (512..=PAGE as u64).contains(&record)
            && record.is_power_of_two();
        let mft = boot.le64(MFT_CLUSTER).checked_mul(cluster)?;
        plausible.then_some(Self { cluster, mft, record: record as usize })
    }

    /// The MFT's record `number`; the first four always lie in its first run.
    fn record(&self, volume: &Volume<'_>, number: u64) -> Result<Option<Block>> {
        let Some(at) = self.mft.checked_add(number * self.record as u64) else { return Ok(None) };
        Ok(volume.read(at, self.record)?.filter(|record| record.has(0, b"FILE")).and_then(fix_up))
    }

    fn log(&self, volume: &Volume<'_>) -> Result<Log> {
        let start = self
            .record(volume, LOG_FILE)?
            .and_then(|record| attribute(&record, DATA))
            .and_then(|data| first_cluster(&data))
            .and_then(|cluster| cluster.checked_mul(self.cluster));
        let Some(pages) = start.map(|start| volume.read(start, 2 * PAGE)).transpose()?.flatten() else {
            return Ok(Log::Unreadable);
        };
        if pages.0.iter().all(|byte| *byte == 0xff) {
            return Ok(Log::Empty);
        }
        let newest = [0, PAGE]
            .into_iter()
            .filter_map(|at| restart_area(pages.part(at, PAGE)))
            .max_by_key(|area| area.le64(CURRENT_LSN));
        Ok(newest.map_or(Log::Unreadable, |area| {
            let clean = area.le16(CLIENTS_IN_USE) == NO_CLIENT || area.le16(LOG_FLAGS) & VOLUME_IS_CLEAN != 0;
            if clean { Log::Clean } else { Log::InUse }
        }))
    }
}

fn restart_area(page: Block) -> Option<Block> {
    let page = Some(page).filter(|page| page.has(0, b"RSTR") || page.has(0, b"CHKD")).and_then(fix_up)?;
    let at = usize::from(page.le16(RESTART_AREA));
    (at >= 30 && at + 48 <= PAGE).then(|| page.part(at, 48))
}

/// Undoes the update sequence: the last two bytes of each 512 are kept aside, and hold one number while on disk. If
/// they differ the record was torn in writing, and there is `None`.
fn fix_up(mut block: Block) -> Option<Block> {
    let (offset, count) = (usize::from(block.le16(SEQUENCE_OFFSET)), usize::from(block.le16(SEQUENCE_COUNT)));
    let number = block.bytes(offset, 2).to_vec();
    if count != block.0.len() / 512 + 1 || offset + 2 * count > 510 {
        return None;
    }
    for sector in 0..count - 1 {
        let kept = block.bytes(offset + 2 + 2 * sector, 2).to_vec();
        let last = block.0.get_mut(sector * 512 + 510..sector * 512 + 512)?;
        if last != number {
            return None;
        }
        last.copy_from_slice(&kept);
    }
    Some(block)
}

/// The unnamed attribute of this type in an MFT record.
fn attribute(record: &Block, kind: u32) -> Option<Block> {
    let mut at = usize::from(record.le16(FIRST_ATTRIBUTE));
    // An attribute is at least 16 bytes long, so this ends with the record.
    while record.le32(at) != END {
        let len = record.le32(at + 4) as usize;
        if len < 16 || len > record.0.len().saturating_sub(at) {
            return None;
        }
        if record.le32(at) == kind && record.u8(at + NAME_LENGTH) == 0 {
            return Some(record.part(at, len));
        }
        at += len;
    }
    None
}

/// Where a non-resident attribute begins: the first of its runs, each a byte with two lengths, a length, an offset.
fn first_cluster(attribute: &Block) -> Option<u64> {
    let at = usize::from(attribute.le16(RUNS_OFFSET));
    let (length, offset) = (usize::from(attribute.u8(at) & 0xf), usize::from(attribute.u8(at) >> 4));
    let bytes = attribute.bytes(at + 1 + length, offset);
    if attribute.u8(NON_RESIDENT) == 0 || bytes.is_empty() || bytes.len() > 8 || bytes.len() < offset {
        return None;
    }
    // The first offset counts from 0, so that a negative one is nonsense; its bytes are read as what they are, and
    // lead past the end of the volume.
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}
