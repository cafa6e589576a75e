//! The real gates of a group of disks.

use std::sync::Arc;
use std::time::Instant;

use block::{Closed, Gate, Result, Wait};

use super::ports::{ClosedGates, Gates};

/// The gates of a group. All are closed before the first is drained, so no write that depends on another disk's refused
/// write can slip in: that makes the cut one instant for the group.
#[derive(Debug)]
pub struct GateGroup(Vec<Arc<Gate>>);

impl GateGroup {
    /// The group of these disks' gates.
    pub fn new(gates: Vec<Arc<Gate>>) -> Self {
        Self(gates)
    }
}

impl Gates for GateGroup {
    fn close(&self) -> Box<dyn ClosedGates> {
        Box::new(ClosedGroup(self.0.iter().map(Gate::close).collect()))
    }
}

struct ClosedGroup(Vec<Closed>);

impl ClosedGates for ClosedGroup {
    fn drain(&self, deadline: Instant) -> Result<()> {
        self.0.iter().try_for_each(|closed| closed.drain(deadline))
    }

    fn open(self: Box<Self>) -> Wait {
        self.0.into_iter().map(Closed::open).fold(Wait::default(), |all, one| Wait {
            longest: all.longest.max(one.longest),
            lanes: all.lanes + one.lanes,
        })
    }
}
