use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::Result;
use crate::mapping::Mapping;
use crate::record::{self, SIZE, SLOTS};
use crate::report::{self, Report};

/// A pause between two steps, so that writers leave an emulated processor to the others.
const PACE: Duration = Duration::from_millis(5);
/// Steps between two syncs.
const SYNC_EVERY: u64 = 4;
/// Rounds of the mapped writer between two syncs. In between only a freeze makes its pages clean.
const MAPPED_SYNC_EVERY: u64 = 32;
/// Pages of the mapped writer.
const PAGES: usize = 16;

/// How a writer writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// Through the page cache.
    Buffered,
    /// Around it (O_DIRECT).
    Direct,
    /// By stores to a shared mapping.
    Mapped,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Buffered, Self::Direct, Self::Mapped];

    fn name(self) -> &'static str {
        match self {
            Self::Buffered => "buffered",
            Self::Direct => "direct",
            Self::Mapped => "mapped",
        }
    }

    pub(crate) fn named(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| format!("no kind {name}").into())
    }
}

/// Runs a writer of each kind in each directory; returns only when one fails.
pub(crate) fn run(reports: &Path, directories: &[&str]) -> Result<()> {
    std::fs::create_dir_all(reports)?;
    let (failed, failure) = std::sync::mpsc::channel();
    for directory in directories {
        for kind in Kind::ALL {
            let path = Path::new(directory).join(kind.name());
            let report = Report::new(report::path(reports, Path::new(directory), kind.name()))?;
            let failed = failed.clone();
            thread::spawn(move || {
                let Err(error) = write(kind, &path, report);
                let _ = failed.send(format!("{}: {error}", path.display()));
            });
        }
    }
    Err(failure.recv()?.into())
}

fn write(kind: Kind, path: &Path, report: Report) -> Result<std::convert::Infallible> {
    let flags = if kind == Kind::Direct { OFlags::DIRECT } else { OFlags::empty() };
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    match kind {
        Kind::Buffered | Kind::Direct => write_records(&file, report),
        Kind::Mapped => stamp_pages(&file, report),
    }
}

fn write_records(file: &File, mut report: Report) -> Result<std::convert::Infallible> {
    // O_DIRECT wants aligned memory; a larger buffer always has an aligned block in it.
    let mut buffer = vec![0; 2 * SIZE];
    let aligned = buffer.as_ptr().align_offset(SIZE);
    let block = buffer.get_mut(aligned..aligned + SIZE).ok_or("no aligned block")?;
    let mut acknowledged = 0;
    for number in 1.. {
        record::fill(block, number);
        let begin = Instant::now();
        file.write_all_at(block, number % SLOTS * SIZE as u64)?;
        if number % SYNC_EVERY == 0 {
            file.sync_data()?;
            acknowledged = number;
        }
        report.step(begin.elapsed())?;
        report.progress(number, acknowledged)?;
        thread::sleep(PACE);
    }
    Err("out of numbers".into())
}

fn stamp_pages(file: &File, mut report: Report) -> Result<std::convert::Infallible> {
    // Real blocks, not holes: a store must not find the disk full.
    file.write_all_at(&vec![0; PAGES * SIZE], 0)?;
    file.sync_all()?;
    let mapping = Mapping::new(file, PAGES)?;
    let mut acknowledged = 0;
    for round in 1.. {
        let begin = Instant::now();
        for page in 0..PAGES {
            mapping.stamp(page, round);
        }
        report.step(begin.elapsed())?;
        if round % MAPPED_SYNC_EVERY == 0 {
            mapping.sync()?;
            acknowledged = round;
        }
        report.progress(round, acknowledged)?;
        thread::sleep(PACE);
    }
    Err("out of numbers".into())
}
