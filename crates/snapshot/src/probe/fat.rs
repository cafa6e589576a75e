//! FAT12, FAT16, FAT32, with or without long names.
//!
//! Source: Microsoft's "FAT: General Overview of On-Disk Format" 1.03 for the fields and the two bits of `FAT[1]`;
//! `fat_set_state` in Linux `fs/fat/inode.c` for the bit in the boot sector. There is no journal: a volume that was
//! mounted for writing may hold anything that a checker must sort out.
//!
//! | who | where | meaning |
//! |---|---|---|
//! | Windows, DOS, the BSDs | `FAT[1]`, highest bit of an entry | set: unmounted |
//! | the same | `FAT[1]`, second highest bit | set: no read or write error was met |
//! | Linux | bit 0 of the byte after the drive number | set: mounted for writing |

use block::Result;

use super::verdict::{Finding, FsKind, Verdict};
use super::volume::{Block, Volume};

const BYTES_PER_SECTOR: usize = 11;
const SECTORS_PER_CLUSTER: usize = 13;
const RESERVED_SECTORS: usize = 14;
const FATS: usize = 16;
const ROOT_ENTRIES: usize = 17;
const SECTORS_16: usize = 19;
const MEDIA: usize = 21;
const FAT_SECTORS_16: usize = 22;
const SECTORS_32: usize = 32;
const FAT_SECTORS_32: usize = 36;
const SIGNATURE: usize = 510;
/// Where the byte with Linux's bit and the label are: before FAT32, and in FAT32.
const STATE: (usize, usize) = (37, 65);
const LABEL: (usize, usize) = (43, 71);

const STATE_DIRTY: u8 = 1;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Width {
    Fat12,
    Fat16,
    Fat32,
}

pub(super) fn probe(volume: &Volume<'_>) -> Result<Option<Finding>> {
    let Some(boot) = volume.read(0, 512)? else { return Ok(None) };
    let Some(width) = width(&boot) else { return Ok(None) };
    let fat = u64::from(boot.le16(RESERVED_SECTORS)) * u64::from(boot.le16(BYTES_PER_SECTOR));
    let entry = match width {
        Width::Fat12 => None,
        Width::Fat16 => volume.read(fat + 2, 2)?.map(|entry| u32::from(entry.le16(0)) << 16),
        // The four highest bits of a FAT32 entry are not part of it.
        Width::Fat32 => volume.read(fat + 4, 4)?.map(|entry| entry.le32(0) << 4),
    };
    let at = |(before, since): (usize, usize)| if width == Width::Fat32 { since } else { before };
    let (verdict, detail) = judge(boot.u8(at(STATE)), entry, width);
    let label = boot.label(at(LABEL), 11).filter(|label| label != "NO NAME");
    Ok(Some(Finding::new(FsKind::Vfat, verdict, detail).labelled(label)))
}

/// How wide an entry is, if this is a boot sector of FAT at all: by the number of clusters, as the specification asks.
fn width(boot: &Block) -> Option<Width> {
    let sector = u64::from(boot.le16(BYTES_PER_SECTOR));
    let cluster = u64::from(boot.u8(SECTORS_PER_CLUSTER));
    let plausible = boot.has(SIGNATURE, &[0x55, 0xaa])
        && [512, 1024, 2048, 4096].contains(&sector)
        && cluster.is_power_of_two()
        && boot.le16(RESERVED_SECTORS) > 0
        && (1..=4).contains(&boot.u8(FATS))
        && (boot.u8(MEDIA) == 0xf0 || boot.u8(MEDIA) >= 0xf8);
    let or = |short: usize, long: usize| match boot.le16(short) {
        0 => u64::from(boot.le32(long)),
        short => u64::from(short),
    };
    let (sectors, fat_sectors) = (or(SECTORS_16, SECTORS_32), or(FAT_SECTORS_16, FAT_SECTORS_32));
    if !plausible || fat_sectors == 0 {
        return None;
    }
    let root_sectors = (u64::from(boot.le16(ROOT_ENTRIES)) * 32).div_ceil(sector);
    let before =
        u64::from(boot.le16(RESERVED_SECTORS)) + u64::from(boot.u8(FATS)) * fat_sectors + root_sectors;
    let clusters = sectors.checked_sub(before)? / cluster;
    // Linux, like Windows, takes the missing 16-bit length for FAT32, however few clusters there are.
    match (boot.le16(FAT_SECTORS_16), clusters) {
        (_, 0) => None,
        (0, _) => Some(Width::Fat32),
        (_, 1..4085) => Some(Width::Fat12),
        _ => Some(Width::Fat16),
    }
}

/// `entry` is `FAT[1]`, shifted so that its highest bit is bit 31.
fn judge(state: u8, entry: Option<u32>, width: Width) -> (Verdict, String) {
    let name = format!("{width:?}").to_uppercase();
    let linux = state & STATE_DIRTY != 0;
    let windows = entry.is_some_and(|entry| entry & (1 << 31) == 0);
    let failed = entry.is_some_and(|entry| entry & (1 << 30) == 0);
    let set: Vec<&str> = [
        (linux, "the boot sector's dirty bit is set"),
        (windows, "FAT[1] says not unmounted"),
        (failed, "FAT[1] says that I/O errors were met"),
    ]
    .into_iter()
    .filter_map(|(is, text)| is.then_some(text))
    .collect();
    match set.is_empty() {
        true => (Verdict::Clean, format!("{name}, no dirty bit is set")),
        false => (Verdict::Dirty, format!("{name}: {}", set.join(", "))),
    }
}
