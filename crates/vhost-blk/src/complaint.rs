//! Complaints that a guest can not turn into a flood.

use std::time::{Duration, Instant};

use block::Error;

use crate::errors::is_hosts;
use crate::request::Op;

const EVERY: Duration = Duration::from_secs(1);

/// A worker's log: one line a second, with how many were left out.
#[derive(Debug)]
pub(crate) struct Complaints {
    disk: String,
    queue: usize,
    last: Option<Instant>,
    left_out: u64,
}

impl Complaints {
    pub(crate) fn new(disk: String, queue: usize) -> Self {
        Self { disk, queue, last: None, left_out: 0 }
    }

    /// A request that the disk or the host failed, or that was the guest's own mistake.
    pub(crate) fn request_failed(&mut self, op: Option<&Op>, error: &Error) {
        let Some(left_out) = self.due() else { return };
        let (disk, queue) = (self.disk.as_str(), self.queue);
        match is_hosts(error.kind()) {
            false => tracing::debug!(disk, queue, ?op, left_out, "refused a request: {error}"),
            true => tracing::error!(disk, queue, ?op, left_out, "a request failed: {error}"),
        }
    }

    /// A request that waits until the host can carry it out.
    pub(crate) fn request_parked(&mut self, op: Option<&Op>, error: &Error) {
        let Some(left_out) = self.due() else { return };
        let (disk, queue) = (self.disk.as_str(), self.queue);
        tracing::warn!(disk, queue, ?op, left_out, "a request waits for the host: {error}");
    }

    /// All that waited has been carried out.
    pub(crate) fn parked_no_more(&self) {
        tracing::info!(disk = self.disk, queue = self.queue, "the requests that waited have been answered");
    }

    /// So many requests of an earlier session are carried out again.
    pub(crate) fn submitted_again(&self, requests: usize) {
        tracing::info!(
            disk = self.disk,
            queue = self.queue,
            requests,
            "requests in flight are submitted again"
        );
    }

    /// Something wrong with the ring itself.
    pub(crate) fn ring(&mut self, story: &str, error: &dyn std::fmt::Display) {
        let Some(left_out) = self.due() else { return };
        tracing::warn!(disk = self.disk, queue = self.queue, left_out, "{story}: {error}");
    }

    /// How many complaints were left out since the last one, if it is time for another.
    fn due(&mut self) -> Option<u64> {
        if self.last.is_some_and(|last| last.elapsed() < EVERY) {
            self.left_out += 1;
            return None;
        }
        self.last = Some(Instant::now());
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line() {
        let mut complaints = Complaints::new("vda".to_owned(), 0);
        assert_eq!(complaints.due(), Some(0));
        assert_eq!((0..1000).filter_map(|_| complaints.due()).count(), 0);
        assert_eq!(complaints.left_out, 1000);
    }
}
