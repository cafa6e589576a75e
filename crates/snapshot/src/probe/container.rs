//! What holds no file system that could be looked at: layers in between, and swap.
//!
//! Sources: LVM2 `lib/format_text/layout.h` and `lib/label/label.h`; LUKS1 and LUKS2 on-disk format specifications;
//! Linux `include/uapi/linux/raid/md_p.h` and `include/linux/swap.h`; FreeBSD `sys/sys/disklabel.h`.

use block::Result;

use super::verdict::{Finding, FsKind, Verdict};
use super::volume::Volume;

const SECTOR: u64 = 512;

pub(super) fn probe(volume: &Volume<'_>) -> Result<Option<Finding>> {
    for probe in [luks, lvm, md_raid, swap, bsd_label] {
        if let Some(found) = probe(volume)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn opaque(kind: FsKind, detail: impl Into<String>) -> Option<Finding> {
    Some(Finding::new(kind, Verdict::Opaque, detail))
}

fn luks(volume: &Volume<'_>) -> Result<Option<Finding>> {
    let header = volume.read(0, 8)?.filter(|header| header.has(0, b"LUKS\xba\xbe"));
    Ok(header.and_then(|header| opaque(FsKind::Luks, format!("LUKS{}, not looked into", header.be16(6)))))
}

/// The label is in one of the first four sectors, and names its own.
fn lvm(volume: &Volume<'_>) -> Result<Option<Finding>> {
    for sector in 0..4 {
        let is_label = volume.read(sector * SECTOR, 32)?.is_some_and(|label| {
            label.has(0, b"LABELONE") && label.le64(8) == sector && label.has(24, b"LVM2 001")
        });
        if is_label {
            return Ok(opaque(
                FsKind::Lvm,
                "a physical volume of LVM, its logical volumes are not looked into",
            ));
        }
    }
    Ok(None)
}

/// Versions 1.1 and 1.2 have their super-block at the start, 1.0 within the last 12 KiB, 0.90 in the last whole 64 KiB.
fn md_raid(volume: &Volume<'_>) -> Result<Option<Finding>> {
    let sectors = volume.size() / SECTOR;
    let version_1_0 = (sectors.saturating_sub(16) / 8 * 8) * SECTOR;
    let version_0_90 = (sectors / 128).saturating_sub(1) * 128 * SECTOR;
    for (at, major) in [(0, 1), (4096, 1), (version_1_0, 1), (version_0_90, 0)] {
        if volume.read(at, 8)?.is_some_and(|block| block.le32(0) == 0xa92b_4efc && block.le32(4) == major) {
            return Ok(opaque(FsKind::MdRaid, "a member of a software RAID, not looked into"));
        }
    }
    Ok(None)
}

/// The signature ends the first page, and pages differ among machines.
fn swap(volume: &Volume<'_>) -> Result<Option<Finding>> {
    for page in [4 << 10, 8 << 10, 16 << 10, 64 << 10] {
        let Some(signature) = volume.read(page - 10, 10)? else { continue };
        if signature.has(0, b"SWAPSPACE2") || signature.has(0, b"SWAP-SPACE") {
            return Ok(opaque(FsKind::Swap, "swap space"));
        }
        // A hibernated system's image takes the signature's place until it is resumed.
        if signature.has(0, b"S1SUSPEND") || signature.has(0, b"LINHIB0001") {
            return Ok(opaque(FsKind::Swap, "swap space with a hibernated system in it"));
        }
    }
    Ok(None)
}

fn bsd_label(volume: &Volume<'_>) -> Result<Option<Finding>> {
    const MAGIC: u32 = 0x8256_4557;
    let label = volume.read(SECTOR, 136)?.filter(|label| label.le32(0) == MAGIC && label.le32(132) == MAGIC);
    Ok(label.and_then(|_| opaque(FsKind::BsdLabel, "a BSD disk label, its partitions are not looked into")))
}
