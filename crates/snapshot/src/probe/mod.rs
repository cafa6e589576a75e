//! The file-system probe: are the file systems in a snapshot clean?
//!
//! ```text
//!  Disk ──▶ partition table (GPT, MBR with logical partitions) ──▶ each partition, or the whole disk
//!                                                                        │ signatures
//!        Clean · Replay · Dirty · Opaque · Unknown  ◀── super-block (xfs: log, NTFS: $Volume, $LogFile)
//! ```
//!
//! # I/O model
//! Nothing is mounted, and nothing is written. A probe makes some dozens of small reads for each partition, each of at
//! most 64 KiB, through [`block::read_disk`]; how many is bounded, whatever the content says. It may be run on a disk
//! that is being written, but only of a snapshot does the answer stay true.
//!
//! # Invariants
//! - The content is the guest's, so it is hostile: every offset, count and length is checked or saturated, every loop
//!   is bounded, no content makes an error or a panic. An error is the disk's own.
//! - A verdict is never better than what was read supports: what can not be decided is [`Verdict::Unknown`], and
//!   signatures of two formats at once are not guessed between.
//! - Each verdict carries what a probe can not know of its format; `docs/probe.md` has the rules and their sources.

mod btrfs;
mod checksum;
mod container;
mod ext;
mod fat;
mod gpt;
mod mbr;
mod ntfs;
mod table;
#[cfg(test)]
mod tests;
mod ufs;
mod verdict;
mod volume;
mod xfs;
mod xfs_log;

use block::{Disk, Result};

pub use verdict::{FsKind, FsVerdict, Verdict};

use table::Partition;
use verdict::Finding;
use volume::Volume;

/// Says of each file system on `disk` whether it is clean: one verdict a partition, in the table's order, or one for
/// the disk as a whole (and one for a table that is not as it should be, or empty).
///
/// # Errors
/// Only those of reading the disk; no content makes one.
pub fn probe(disk: &dyn Disk) -> Result<Vec<FsVerdict>> {
    let whole = Volume::whole(disk);
    let Some(table) = table::read(&whole)? else {
        return Ok(vec![verdict(None, 0, whole.size(), examine(&whole)?)]);
    };
    let mut verdicts = Vec::new();
    for partition in &table.partitions {
        let finding = examine_partition(&whole, partition)?;
        let (number, name) = (Some(partition.number), partition.name.clone());
        verdicts.push(FsVerdict {
            partition: number,
            name,
            ..verdict(number, partition.offset, partition.size, finding)
        });
    }
    let none = || table.partitions.is_empty().then(|| "a partition table without partitions".to_owned());
    if let Some(complaint) = table.complaint.or_else(none) {
        let finding = Finding::new(FsKind::Unknown, Verdict::Unknown, complaint);
        verdicts.push(verdict(None, 0, whole.size(), finding));
    }
    Ok(verdicts)
}

fn verdict(partition: Option<u32>, offset: u64, size: u64, finding: Finding) -> FsVerdict {
    let Finding { kind, verdict, label, detail } = finding;
    let unknowable = kind.unknowable().into();
    FsVerdict { partition, name: None, label, offset, size, kind, verdict, detail, unknowable }
}

fn examine_partition(disk: &Volume<'_>, partition: &Partition) -> Result<Finding> {
    if let Some(what) = partition.reserved {
        return Ok(Finding::new(FsKind::Reserved, Verdict::Opaque, what));
    }
    match disk.part(partition.offset, partition.size) {
        Some(volume) if volume.size() > 0 => examine(&volume),
        _ => {
            let detail = "the partition does not lie within the disk";
            Ok(Finding::new(FsKind::Unknown, Verdict::Unknown, detail))
        }
    }
}

/// Tries each format. Formatting removes other formats' signatures, so there is one, or none; if there are two it is
/// not for us to say which is in use.
fn examine(volume: &Volume<'_>) -> Result<Finding> {
    let mut found = Vec::new();
    for probe in [container::probe, xfs::probe, btrfs::probe, ext::probe, ntfs::probe, fat::probe, ufs::probe]
    {
        found.extend(probe(volume)?);
    }
    if found.len() > 1 {
        let kinds: Vec<String> = found.iter().map(|finding| format!("{:?}", finding.kind)).collect();
        let detail = format!("signatures of several formats: {}", kinds.join(", ").to_lowercase());
        return Ok(Finding::new(FsKind::Unknown, Verdict::Unknown, detail));
    }
    let none = || Finding::new(FsKind::Unknown, Verdict::Unknown, "no known signature");
    Ok(found.pop().unwrap_or_else(none))
}
