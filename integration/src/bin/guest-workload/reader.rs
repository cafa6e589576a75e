//! A reader that takes its time: what the disk has put into its memory is looked at a while later.
//!
//! Only the disk writes to that memory. The processor does not, not even to zero it, as Linux does with each page of its page
//! cache before the disk may fill it (`init_on_alloc`): when the guest is moved in between, the other end has the right bytes
//! only if the device has said that it wrote there.

use std::convert::Infallible;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;

use crate::Result;
use crate::record::{self, SIZE};
use crate::report::Report;

/// Parts of the file, and records in one of them. They take turns in the same memory.
const PARTS: u64 = 64;
const RECORDS: usize = 64;
const PART: usize = RECORDS * SIZE;

/// Between a read and the look at it: long, against what a read takes.
const PAUSE: Duration = Duration::from_millis(50);

/// Makes a file, and reads it again and again. Tells how many parts were right so far; returns only when one is not.
pub(crate) fn run(path: &Path, report: &Path) -> Result<Infallible> {
    let report = Report::new(report.to_owned())?;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(path)?;
    // O_DIRECT wants aligned memory; a larger buffer always has an aligned part in it.
    let mut buffer = vec![0; PART + SIZE];
    let aligned = buffer.as_ptr().align_offset(SIZE);
    let buffer = buffer.get_mut(aligned..aligned + PART).ok_or("no aligned part")?;
    for part in 0..PARTS {
        fill(buffer, part);
        file.write_all_at(buffer, part * PART as u64)?;
    }
    file.sync_all()?;
    for turn in 1.. {
        let part = turn % PARTS;
        file.read_exact_at(buffer, part * PART as u64)?;
        thread::sleep(PAUSE);
        check(buffer, part)?;
        report.progress(turn, turn)?;
    }
    Err("out of numbers".into())
}

fn fill(buffer: &mut [u8], part: u64) {
    for (number, block) in (part * RECORDS as u64..).zip(buffer.chunks_exact_mut(SIZE)) {
        record::fill(block, number);
    }
}

fn check(buffer: &[u8], part: u64) -> Result<()> {
    for (number, block) in (part * RECORDS as u64..).zip(buffer.chunks_exact(SIZE)) {
        let found = record::read(block)?;
        if found != Some(number) {
            return Err(format!("memory holds record {found:?}, and not {number}, which was read").into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// That is what a guest would see whose page was not logged.
    #[test]
    fn a_page_of_an_older_part_is_found() {
        let (mut older, mut newer) = (vec![0; PART], vec![0; PART]);
        fill(&mut older, 2);
        fill(&mut newer, 3);
        check(&newer, 3).unwrap();
        newer[5 * SIZE..6 * SIZE].copy_from_slice(&older[5 * SIZE..6 * SIZE]);
        assert!(check(&newer, 3).is_err());
    }
}
