//! Which clusters of a file are the image's own.

use std::collections::HashSet;

use block::{Error, ErrorKind, Result};

use crate::entry::{Geometry, HostOffset};

/// The clusters that header and tables occupy.
///
/// An image may come from a hostile hand. If a table and a data cluster could be one and the same, the guest would
/// write its own mapping, or the name of its backing file.
#[derive(Debug)]
pub(crate) struct Metadata {
    geometry: Geometry,
    clusters: HashSet<u64>,
}

impl Metadata {
    /// The header's cluster, so far.
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self { geometry, clusters: HashSet::from([0]) }
    }

    fn index(&self, at: HostOffset) -> u64 {
        at.0 >> self.geometry.cluster_bits
    }

    /// Adds `count` clusters from `at` on, none of which may be known already.
    pub(crate) fn add(&mut self, at: HostOffset, count: u64) -> Result<()> {
        let first = self.index(at);
        match (first..first + count).all(|cluster| self.clusters.insert(cluster)) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Corrupt, "two tables of the image overlap")),
        }
    }

    /// Whether the cluster at `at` is one of them.
    pub(crate) fn contains(&self, at: HostOffset) -> bool {
        self.clusters.contains(&self.index(at))
    }

    /// The `count` clusters from `at` on hold tables no more.
    pub(crate) fn remove(&mut self, at: HostOffset, count: u64) {
        let first = self.index(at);
        (first..first + count).for_each(|cluster| _ = self.clusters.remove(&cluster));
    }
}
