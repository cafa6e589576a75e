//! What the daemon takes of the host: in a life of it, nothing grows.

use std::fmt;

use frazil_integration::{Context, Error, Result};

/// What may come and go between two looks.
const MEMORY_KIB: u64 = 16 << 10;
const FEW: u64 = 8;
/// Layers of a disk: the snapshots that are kept, the active one, and what is about to be merged.
const MOST_LAYERS: u64 = 12;

/// What the daemon takes of the host, when no job is under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Health {
    pub(crate) memory_kib: u64,
    pub(crate) descriptors: u64,
    pub(crate) threads: u64,
    /// Of the disk that has most.
    pub(crate) layers: u64,
}

impl Health {
    /// Of the process of that id.
    pub(crate) fn of(process: u32, layers: u64) -> Result<Self> {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).context("the daemon")?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
            number.and_then(|number| number.parse().ok()).ok_or_else(|| Error::new(format!("no {name}")))
        };
        let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).context("the daemon")?.count();
        // Of its own: what is mapped of the guest's memory is the guest's.
        let memory_kib = field("RssAnon")?;
        Ok(Self { memory_kib, descriptors: descriptors as u64, threads: field("Threads")?, layers })
    }

    /// Whether nothing has grown.
    pub(crate) fn check_against(&self, first: &Self) -> Result<()> {
        let is_flat = self.memory_kib <= first.memory_kib + MEMORY_KIB
            && self.descriptors <= first.descriptors + FEW
            && self.threads <= first.threads + FEW
            && self.layers <= MOST_LAYERS;
        match is_flat {
            true => Ok(()),
            false => Err(Error::new(format!("the daemon has grown from {first} to {self}"))),
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory_kib, descriptors, threads, layers } = self;
        write!(f, "{memory_kib} KiB, {descriptors} descriptors, {threads} threads, {layers} layers")
    }
}
