//! Bringing up what is beneath: for jobs that make an image independent of the one it stands on.

use std::sync::Arc;
use std::task::{Poll, Waker};

use block::{ByteRange, Context, Error, ErrorKind, Result};

use crate::entry::{Entry, GuestCluster, Home};
use crate::image::{Image, Inner, Writer};
use crate::pending::Claim;
use crate::write::Allocating;

impl Image {
    /// Brings up into this layer what of `range` it does not have itself, from what is beneath, in whole subclusters: so
    /// the disk reads the same, and does not need what is beneath for it any more. What reads as zeroes takes no room,
    /// but in version 2. Guests may read and write meanwhile.
    ///
    /// Returns the bytes that were copied. If it has to wait, it is asked for the whole range again; what was brought
    /// up until then stays, and is not counted again: so ranges of some clusters at a time tell more.
    ///
    /// It reads and writes here and now: for a job's thread, not a virtqueue's worker.
    pub fn populate(&self, range: ByteRange, waker: &Waker) -> Poll<Result<u64>> {
        let may = self.0.check(range).and_then(|()| self.0.writer());
        let populated = may.and_then(|writer| self.0.populate(writer, range, waker));
        match populated {
            Ok(Some(copied)) => Poll::Ready(Ok(copied)),
            Ok(None) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

impl Inner {
    /// `None` if it has to wait.
    fn populate(self: &Arc<Self>, writer: &Writer, range: ByteRange, waker: &Waker) -> Result<Option<u64>> {
        let mut copied = 0;
        for (cluster, piece) in self.geometry.pieces(range) {
            let wanted = self.geometry.masks(piece).touched;
            let held = match self.claim_missing(writer, cluster, wanted, waker)? {
                Poll::Ready(held) => held,
                Poll::Pending => return Ok(None),
            };
            if let Some(held) = held {
                copied += self.bring_up(held).context(|| "bring up what is beneath")?;
            }
        }
        Ok(Some(copied))
    }

    /// Claims those of the `wanted` subclusters that this layer does not have; nothing if it has them all.
    fn claim_missing(
        self: &Arc<Self>,
        writer: &Writer,
        cluster: GuestCluster,
        wanted: u32,
        waker: &Waker,
    ) -> Result<Poll<Option<Allocating>>> {
        // Most often it has them: then no lock is taken.
        let old = self.look(cluster, |entries| entries.first().copied().unwrap_or_default())?;
        let missing = |old: Entry| wanted & !(old.state.allocated() | old.state.zero());
        if missing(old) == 0 {
            return Ok(Poll::Ready(None));
        }
        let mut core = writer.core();
        let old = self.entry(&core, cluster)?;
        let (missing, all) = (missing(old), self.geometry.all());
        let home = old.home.offset().unwrap_or_default();
        let mut claim = Claim { cluster, shared: 0, exclusive: missing, publish: missing, old, home };
        if claim.moves() {
            claim.exclusive = all;
        }
        if missing == 0 {
            return Ok(Poll::Ready(None));
        }
        if core.claims.conflict(cluster, 0, claim.exclusive) {
            core.claims.wait(waker);
            return Ok(Poll::Pending);
        }
        claim.home = self.home_for(&mut core, &claim)?;
        let claims = vec![claim];
        let owner = core.claims.hold(&claims);
        Ok(Poll::Ready(Some(Allocating { image: Arc::clone(self), owner, claims, held: true })))
    }

    /// Copies the claimed subclusters of one cluster from beneath, but for those that are zero, and publishes them.
    fn bring_up(&self, held: Allocating) -> Result<u64> {
        let none = || Error::new(ErrorKind::InvalidInput, "nothing is claimed");
        let claim = *held.claims.first().ok_or_else(none)?;
        let (bits, start) = (self.geometry.subcluster_bits(), self.geometry.start_of(claim.cluster));
        let (mut data, mut zero, mut index) = (0, 0, 0);
        while index < u32::BITS {
            let count = (claim.publish >> index).trailing_ones();
            if count > 0 {
                let mut bytes = vec![0; (u64::from(count) << bits) as usize];
                let from = u64::from(index) << bits;
                self.read_below(start + from, &mut bytes)?;
                for (nth, part) in (index..).zip(bytes.chunks(1 << bits)) {
                    if self.geometry.zero_flag && part.iter().all(|byte| *byte == 0) {
                        zero |= 1 << nth;
                        continue;
                    }
                    data |= 1 << nth;
                    self.data.write_at(part, claim.home.0 + (u64::from(nth) << bits))?;
                }
            }
            index += count.max(1);
        }
        if claim.moves() && data != 0 {
            // What the cluster holds already goes along.
            let nothing = ByteRange { offset: start, len: 0 };
            self.fill_rest(nothing, &Claim { publish: claim.old.state.allocated(), ..claim })?;
        }
        held.publish(|claim, old| Entry {
            home: if data == 0 { old.home } else { Home::own(claim.home) },
            state: old.state.with_allocated(data).with_zeroed(zero),
        })?;
        Ok(u64::from(data.count_ones()) << bits)
    }
}
