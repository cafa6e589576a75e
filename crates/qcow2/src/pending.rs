//! Writes to new room, between resolve and complete: who may touch which subcluster meanwhile.
//!
//! A write that covers a whole subcluster needs nobody's consent: if two of them overlap, their guest has asked for
//! either's bytes. A write of a part of a subcluster that is not yet allocated first copies the rest of it from below,
//! and that copy must not undo what another write, or zeroing, puts there meanwhile. So each write to new room
//! *claims* its subclusters: whole ones shared, partial ones exclusively, and an exclusive claim tolerates no other.

use std::collections::HashMap;
use std::task::Waker;

use crate::entry::GuestCluster;

/// Subclusters of one cluster that a write to new room is about to publish. The two sets are disjoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) cluster: GuestCluster,
    /// Those it writes wholly.
    pub(crate) shared: u32,
    /// Those of which it copied a part from below.
    pub(crate) exclusive: u32,
}

impl Claim {
    /// Everything it is about to publish.
    pub(crate) fn all(&self) -> u32 {
        self.shared | self.exclusive
    }

    fn conflicts(&self, other: &Self) -> bool {
        self.exclusive & other.all() != 0 || self.all() & other.exclusive != 0
    }
}

/// All claims of an image. Their number is bounded by the requests in flight.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    held: HashMap<GuestCluster, Vec<(u64, Claim)>>,
    next_owner: u64,
    waiting: Vec<Waker>,
}

impl Claims {
    /// Whether somebody holds a claim that does not go together with `wanted`.
    pub(crate) fn conflict(&self, wanted: &Claim) -> bool {
        let held = self.held.get(&wanted.cluster).map_or(&[][..], Vec::as_slice);
        held.iter().any(|(_, claim)| claim.conflicts(wanted))
    }

    /// Keeps `waker` for the next release.
    pub(crate) fn wait(&mut self, waker: &Waker) {
        if !self.waiting.iter().any(|waiting| waiting.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
    }

    /// Holds `claims`, which do not conflict with any, for the owner it returns.
    pub(crate) fn hold(&mut self, claims: &[Claim]) -> u64 {
        self.next_owner += 1;
        for claim in claims {
            self.held.entry(claim.cluster).or_default().push((self.next_owner, *claim));
        }
        self.next_owner
    }

    /// Lets go of what `owner` holds; the caller wakes those who waited once it has let go of its locks.
    pub(crate) fn release(&mut self, owner: u64, claims: &[Claim]) -> Vec<Waker> {
        for claim in claims {
            if let Some(held) = self.held.get_mut(&claim.cluster) {
                held.retain(|(holder, _)| *holder != owner);
                if held.is_empty() {
                    self.held.remove(&claim.cluster);
                }
            }
        }
        std::mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exclusive_claims_conflict() {
        let claim = |shared, exclusive| Claim { cluster: GuestCluster(1), shared, exclusive };
        let mut claims = Claims::default();
        let owner = claims.hold(&[claim(0b0011, 0b0100)]);
        assert!(!claims.conflict(&claim(0b1011, 0)));
        assert!(claims.conflict(&claim(0b0100, 0)));
        assert!(claims.conflict(&claim(0, 0b0001)));
        assert!(!claims.conflict(&claim(0, 0b1000)));
        assert!(!claims.conflict(&Claim { cluster: GuestCluster(2), shared: 0, exclusive: 0b100 }));
        claims.wait(Waker::noop());
        claims.wait(Waker::noop());
        assert_eq!(claims.release(owner, &[claim(0b0011, 0b0100)]).len(), 1);
        assert!(!claims.conflict(&claim(0b0100, 0)));
    }
}
