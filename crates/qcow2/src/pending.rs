//! Writes to new room, between resolve and complete: who may touch which subcluster meanwhile.
//!
//! A write that covers a whole subcluster needs nobody's consent: if two of them overlap, their guest has asked for
//! either's bytes. A write of a part of a subcluster that is not yet allocated first copies the rest of it from below,
//! and that copy must not undo what another write, or zeroing, puts there meanwhile. So each write to new room
//! *claims* its subclusters: whole ones shared, partial ones exclusively, and an exclusive claim tolerates no other.
//!
//! A claim also keeps the host cluster that the write goes to. If that was taken for it, no entry names it until a
//! write to it is published; writes to the same guest cluster meanwhile share it.

use std::task::Waker;

use crate::entry::{Entry, GuestCluster, HostOffset};

/// Subclusters of one cluster that a write to new room is about to publish. The first two sets are disjoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) cluster: GuestCluster,
    /// Those that others may write as well.
    pub(crate) shared: u32,
    /// Those that nobody else may touch.
    pub(crate) exclusive: u32,
    /// Those that will hold data.
    pub(crate) publish: u32,
    /// The entry as it was when the claim was made.
    pub(crate) old: Entry,
    /// Where the cluster will be.
    pub(crate) home: HostOffset,
}

impl Claim {
    fn all(&self) -> u32 {
        self.shared | self.exclusive
    }

    /// Whether the write moves the cluster: it is shared with snapshots, or compressed.
    pub(crate) fn moves(&self) -> bool {
        !self.old.home.is_none() && !self.old.home.is_own()
    }
}

#[derive(Debug)]
struct Held {
    owner: u64,
    claim: Claim,
    /// Whether no entry names the home yet.
    unpublished: bool,
}

/// All claims of an image. They are as many as the clusters under way in requests to new room: few enough to look
/// through.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    held: Vec<Held>,
    next_owner: u64,
    waiting: Vec<Waker>,
}

impl Claims {
    /// Whether somebody holds a claim that does not go together with these of `cluster`.
    pub(crate) fn conflict(&self, cluster: GuestCluster, shared: u32, exclusive: u32) -> bool {
        self.of(cluster).any(|Held { claim, .. }| {
            exclusive & claim.all() != 0 || (shared | exclusive) & claim.exclusive != 0
        })
    }

    /// Whether any of `cluster` is claimed.
    pub(crate) fn holds(&self, cluster: GuestCluster) -> bool {
        self.of(cluster).next().is_some()
    }

    /// Whether nobody holds any.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The home that writes of `cluster` under way were given and have not published.
    pub(crate) fn home(&self, cluster: GuestCluster) -> Option<HostOffset> {
        self.of(cluster).find(|held| held.unpublished).map(|held| held.claim.home)
    }

    fn of(&self, cluster: GuestCluster) -> impl Iterator<Item = &Held> {
        self.held.iter().filter(move |held| held.claim.cluster == cluster)
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
        let owner = self.next_owner;
        self.held.extend(claims.iter().map(|claim| {
            let unpublished = claim.old.home.offset() != Some(claim.home) || claim.moves();
            Held { owner, claim: *claim, unpublished }
        }));
        owner
    }

    /// The entry of `cluster` now names the home that it is claimed with.
    pub(crate) fn published(&mut self, cluster: GuestCluster) {
        let same = |held: &&mut Held| held.claim.cluster == cluster;
        self.held.iter_mut().filter(same).for_each(|held| held.unpublished = false);
    }

    /// Lets go of what `owner` holds. Calls `unused` with each home that was taken in vain. The caller wakes those
    /// who waited once it has let go of its locks.
    pub(crate) fn release(&mut self, owner: u64, mut unused: impl FnMut(HostOffset)) -> Vec<Waker> {
        let mut index = 0;
        while let Some(held) = self.held.get(index) {
            if held.owner != owner {
                index += 1;
                continue;
            }
            let Held { claim, unpublished, .. } = self.held.swap_remove(index);
            if unpublished && !self.holds(claim.cluster) {
                unused(claim.home);
            }
        }
        std::mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: GuestCluster = GuestCluster(1);

    fn claim(shared: u32, exclusive: u32) -> Claim {
        let home = HostOffset(1 << 16);
        Claim {
            cluster: CLUSTER,
            shared,
            exclusive,
            publish: shared | exclusive,
            old: Entry::default(),
            home,
        }
    }

    fn release(claims: &mut Claims, owner: u64) -> Vec<HostOffset> {
        let mut unused = Vec::new();
        claims.release(owner, |home| unused.push(home));
        unused
    }

    #[test]
    fn only_exclusive_claims_conflict() {
        let mut claims = Claims::default();
        let owner = claims.hold(&[claim(0b0011, 0b0100)]);
        assert!(!claims.conflict(CLUSTER, 0b1011, 0));
        assert!(claims.conflict(CLUSTER, 0b0100, 0));
        assert!(claims.conflict(CLUSTER, 0, 0b0001));
        assert!(!claims.conflict(CLUSTER, 0, 0b1000));
        assert!(!claims.conflict(GuestCluster(2), 0, 0b100));
        claims.wait(Waker::noop());
        claims.wait(Waker::noop());
        assert_eq!(claims.release(owner, |_| ()).len(), 1);
        assert!(!claims.conflict(CLUSTER, 0b0100, 0) && !claims.holds(CLUSTER));
    }

    #[test]
    fn a_home_goes_back_when_all_who_had_it_are_gone_in_vain() {
        let mut claims = Claims::default();
        let owners = [1, 2, 4].map(|shared| claims.hold(&[claim(shared, 0)]));
        assert_eq!(claims.home(CLUSTER), Some(HostOffset(1 << 16)));
        assert_eq!(release(&mut claims, owners[1]), []);
        assert_eq!(release(&mut claims, owners[0]), []);
        assert_eq!(release(&mut claims, owners[2]), [HostOffset(1 << 16)]);
        let owners = [1, 2].map(|shared| claims.hold(&[claim(shared, 0)]));
        claims.published(CLUSTER);
        assert_eq!(claims.home(CLUSTER), None);
        assert_eq!(release(&mut claims, owners[0]), []);
        assert_eq!(release(&mut claims, owners[1]), []);
    }
}
