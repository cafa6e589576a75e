//! Writing out the guest's dirty memory *before* the freeze.
//!
//! `FIFREEZE` stops writers first and syncs after (`freeze_super` in Linux: `SB_FREEZE_WRITE`, `SB_FREEZE_PAGEFAULT`, then
//! `sync_filesystem`), so all that is dirty then is written while applications wait: with 300 MB dirty, a write was seen
//! to stall for about a second, and for a tenth of one after a `sync -f`. What the agent could be asked for:
//!
//! | means | why, or why not |
//! |---|---|
//! | `guest-exec` of `sync -f` on the mount points | writes out just what will be frozen, and writers go on. **Taken** |
//! | `guest-exec` of `sync` | as a second choice, where `sync` takes no operands: also writes out other disks |
//! | a freeze and thaw, then the real freeze | the first of the two is the very stall that was to be avoided, and the guest's freeze hooks run twice |
//! | `guest-fstrim` | does not write out data |
//! | `guest-file-flush` | an `fflush` of one file that the agent itself has opened |
//!
//! So the guest's agent must offer `guest-exec`. Debian's package (7.2) blocks nothing; the Red Hat family's blocks it until
//! `/etc/sysconfig/qemu-ga` says otherwise.

use std::time::{Duration, Instant};

use crate::coverage::Coverage;
use crate::error::AgentError;
use crate::session::{AgentInfo, Session};

/// Longer lists of mount points than this are not worth naming.
const OPERANDS_MAX: usize = 64;

/// A busy guest dirties memory while it syncs: the longer that took, the more. Go on until a pass was this short…
const SHORT_PASS: Duration = Duration::from_millis(100);

/// …but no more often than this: a guest may dirty memory as fast as it can write it out.
const PASSES_MAX: u32 = 3;

/// How the guest was made to sync.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SyncMeans {
    /// `sync -f` on the mount points that will be frozen.
    FileSystems,
    /// `sync`, everything.
    All,
}

/// What became of it. That it failed is no reason against a snapshot: the freeze syncs too, only the guest waits longer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PreSync {
    /// The means of the passes that succeeded; `None` if none did.
    pub means: Option<SyncMeans>,
    /// How many passes succeeded.
    pub passes: u32,
    /// How long it all took.
    pub took: Duration,
    /// Why it could not be had, or not to the end.
    pub shortfall: Option<String>,
}

impl Session {
    /// Makes the guest write out its dirty memory, by the best means that the agent offers, until `deadline`.
    ///
    /// Call it just before [`Session::freeze`]. After a deadline the guest's `sync` may still be running; the freeze then
    /// waits for no more than it would have to write itself.
    pub fn pre_sync(&mut self, info: &AgentInfo, coverage: &Coverage, deadline: Instant) -> PreSync {
        let start = Instant::now();
        let mut report = PreSync { means: None, passes: 0, took: Duration::ZERO, shortfall: None };
        report.shortfall = match self.passes(info, coverage, deadline, &mut report) {
            Ok(shortfall) => shortfall.map(str::to_owned),
            Err(error) => Some(error.to_string()),
        };
        report.took = start.elapsed();
        tracing::debug!(?report, "pre-sync");
        report
    }

    /// The choice of the means. Returns why nothing was done, if nothing could be.
    fn passes(
        &mut self,
        info: &AgentInfo,
        coverage: &Coverage,
        deadline: Instant,
        report: &mut PreSync,
    ) -> Result<Option<&'static str>, AgentError> {
        if !info.offers("guest-exec") || !info.offers("guest-exec-status") {
            return Ok(Some(
                "the agent does not offer guest-exec: it is blocked in the guest's configuration",
            ));
        }
        if coverage.is_windows() {
            return Ok(Some("a Windows guest has no sync command; VSS flushes its volumes itself"));
        }
        // An operand is a path of the guest's choosing: never let one pass for an option.
        let operands: Vec<String> =
            coverage.mountpoints().filter(|path| path.starts_with('/')).map(str::to_owned).collect();
        let mut means = if operands.is_empty() || operands.len() > OPERANDS_MAX {
            SyncMeans::All
        } else {
            SyncMeans::FileSystems
        };
        while report.passes < PASSES_MAX {
            let start = Instant::now();
            let args = match means {
                SyncMeans::FileSystems => {
                    std::iter::once("-f".to_owned()).chain(operands.iter().cloned()).collect()
                }
                SyncMeans::All => Vec::new(),
            };
            match (self.run("sync", args, deadline)?, means) {
                (true, _) => {
                    report.means = Some(means);
                    report.passes += 1;
                    if start.elapsed() < SHORT_PASS {
                        break;
                    }
                }
                (false, SyncMeans::FileSystems) => means = SyncMeans::All,
                (false, SyncMeans::All) => return Ok(Some("the guest's `sync` failed")),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
