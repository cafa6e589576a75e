use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::Result;

/// Shorter gaps are not worth a line.
const NOTEWORTHY: Duration = Duration::from_millis(5);

/// What one writer tells the harness, through two files in memory.
///
/// `NAME` holds "written acknowledged", replaced in one step. `NAME.gaps` gets a line "end length" for each longer gap
/// between two steps of the writer, in microseconds, the end on the monotonic clock.
pub(crate) struct Report {
    path: PathBuf,
    next: PathBuf,
    gaps: File,
}

impl Report {
    pub(crate) fn new(path: PathBuf) -> Result<Self> {
        let gaps = File::create(path.with_extension("gaps"))?;
        Ok(Self { next: path.with_extension("next"), path, gaps })
    }

    pub(crate) fn progress(&self, written: u64, acknowledged: u64) -> Result<()> {
        fs::write(&self.next, format!("{written} {acknowledged}\n"))?;
        fs::rename(&self.next, &self.path)?;
        Ok(())
    }

    /// Notes how long a step took that ends now.
    pub(crate) fn step(&mut self, length: Duration) -> Result<()> {
        if length >= NOTEWORTHY {
            writeln!(self.gaps, "{} {}", now().as_micros(), length.as_micros())?;
        }
        Ok(())
    }
}

/// The monotonic clock, which `/proc/uptime` shows too.
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The report of the writer of `kind` in `directory`.
pub(crate) fn path(reports: &Path, directory: &Path, kind: &str) -> PathBuf {
    let disk = directory.file_name().unwrap_or_default().to_string_lossy();
    reports.join(format!("{disk}-{kind}"))
}
