//! Writing: in place where there is room already, else into new room that a guard publishes.
//!
//! A cluster that snapshots share, or that is compressed, is not written where it is: it *moves*, with all it holds.

use std::sync::Arc;
use std::task::{Poll, Waker};

use block::{ByteRange, Context, Extent, PendingWrite, Place, Result, WriteGuard};

use crate::entry::{Entry, GuestCluster, Home, HostOffset};
use crate::epoch::Epoch;
use crate::image::{Core, Inner, Writer};
use crate::pending::Claim;
use crate::publish::Step;
use crate::read::{after, data_extent};

impl Inner {
    /// For who may write `range`.
    pub(crate) fn resolve_write(
        self: &Arc<Self>,
        writer: &Writer,
        range: ByteRange,
        waker: &Waker,
        out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>> {
        let before = out.len();
        // Before any entry is looked at, and until the extents have it.
        let epoch = self.epochs.now();
        match self.resolve_hit(&epoch, range, out) {
            Ok(true) => Poll::Ready(Ok(WriteGuard::in_place())),
            Ok(false) => {
                out.truncate(before);
                self.resolve_new(writer, &epoch, range, waker, out)
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    /// Resolves a write that goes wholly where data already is. `false` if some of it does not.
    fn resolve_hit(&self, epoch: &Arc<Epoch>, range: ByteRange, out: &mut Vec<Extent>) -> Result<bool> {
        let mut rest = range;
        while rest.len > 0 {
            let found = self.run_at(rest)?;
            let Place::Data(offset) = found.place else { return Ok(false) };
            if !found.own {
                return Ok(false);
            }
            out.push(data_extent(epoch, offset, found.len));
            rest = after(rest, found.len);
        }
        Ok(true)
    }

    /// Gives each cluster of `range` a home and claims what the write will publish, all of it or nothing. Appends where the
    /// bytes go.
    fn resolve_new(
        self: &Arc<Self>,
        writer: &Writer,
        epoch: &Arc<Epoch>,
        range: ByteRange,
        waker: &Waker,
        out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>> {
        let mut claims = Vec::with_capacity(1);
        let owner = {
            let mut core = writer.core();
            let mut homes = Homes { image: self, epoch, out, run: None };
            let found = self.find_homes(&mut core, range, waker, &mut claims, &mut homes);
            if !matches!(found, Ok(true)) {
                self.give_back(&mut core, &claims);
                return found.map_or_else(|error| Poll::Ready(Err(error)), |_| Poll::Pending);
            }
            homes.end();
            core.claims.hold(&claims)
        };
        let pending = Allocating { image: Arc::clone(self), owner, claims, held: true };
        let filled = pending.claims.iter().try_for_each(|claim| self.fill_rest(range, claim));
        let filled = filled.context(|| "copy the rest of a subcluster");
        Poll::Ready(filled.map(|()| WriteGuard::allocating(Box::new(pending))))
    }

    /// Adds to `claims` what a write of `range` is to hold. `false` if it has to wait; whatever comes of it, the claims so
    /// far have their homes.
    fn find_homes(
        &self,
        core: &mut Core,
        range: ByteRange,
        waker: &Waker,
        claims: &mut Vec<Claim>,
        homes: &mut Homes<'_>,
    ) -> Result<bool> {
        for (cluster, piece) in self.geometry.pieces(range) {
            let old = self.entry(core, cluster)?;
            let Some(claim) = self.wanted(cluster, piece, old) else {
                homes.push(old.home.offset(), piece);
                continue;
            };
            if core.claims.conflict(cluster, claim.shared, claim.exclusive) {
                core.claims.wait(waker);
                return Ok(false);
            }
            let home = self.home_for(core, &claim)?;
            claims.push(Claim { home, ..claim });
            homes.push(Some(home), piece);
        }
        Ok(true)
    }

    /// What a write of `piece` would publish, as things are now. Its home is the one that there is, if any.
    fn wanted(&self, cluster: GuestCluster, piece: ByteRange, old: Entry) -> Option<Claim> {
        let masks = self.geometry.masks(piece);
        let home = old.home.offset().unwrap_or_default();
        let claim = Claim { cluster, shared: 0, exclusive: 0, publish: 0, old, home };
        if claim.moves() {
            let publish = old.state.allocated() | masks.touched;
            return Some(Claim { exclusive: self.geometry.all(), publish, ..claim });
        }
        let new = masks.touched & !old.state.allocated();
        let (shared, exclusive) = (new & masks.covered, new & !masks.covered);
        (new != 0).then_some(Claim { shared, exclusive, publish: new, ..claim })
    }

    /// Where the claimed cluster will be.
    pub(crate) fn home_for(&self, core: &mut Core, claim: &Claim) -> Result<HostOffset> {
        if self.geometry.external {
            return Ok(HostOffset(self.geometry.start_of(claim.cluster)));
        }
        match claim.old.home.offset().filter(|_| claim.old.home.is_own()) {
            Some(home) => Ok(home),
            None => core.claims.home(claim.cluster).map_or_else(|| core.take(), Ok),
        }
    }

    /// Takes back the homes of claims that were not held in the end.
    fn give_back(&self, core: &mut Core, claims: &[Claim]) {
        for claim in claims {
            let new = claim.old.home.is_none() || claim.moves();
            if new && core.claims.home(claim.cluster).is_none() && !self.geometry.external {
                core.allocator.give_back(claim.home);
            }
        }
    }

    /// Copies what exclusively claimed subclusters hold outside `range`, from where they are now.
    pub(crate) fn fill_rest(&self, range: ByteRange, claim: &Claim) -> Result<()> {
        let copied = claim.exclusive & claim.publish;
        if copied == 0 {
            return Ok(());
        }
        let size = self.geometry.subcluster_size();
        let start = self.geometry.start_of(claim.cluster);
        for index in (0..u32::BITS).filter(|index| copied & (1 << index) != 0) {
            let (first, end) = (start + u64::from(index) * size, start + u64::from(index + 1) * size);
            let head = (first, range.offset.clamp(first, end));
            let tail = (range.end().clamp(first, end), end);
            for (from, to) in [head, tail] {
                if from < to {
                    let mut bytes = vec![0; (to - from) as usize];
                    self.read_old(claim, 1 << index, from, &mut bytes)?;
                    self.data.write_at(&bytes, claim.home.0 + (from - start))?;
                }
            }
        }
        Ok(())
    }

    /// Fills `buf` with what `subcluster` holds at `offset` as long as the claim's write is not published.
    fn read_old(&self, claim: &Claim, subcluster: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        let Entry { home, state } = claim.old;
        let inside = offset - self.geometry.start_of(claim.cluster);
        if state.zero() & subcluster != 0 {
            return Ok(());
        }
        if state.allocated() & subcluster == 0 {
            return self.read_below(offset, buf);
        }
        match home.offset() {
            Some(at) => self.data.read_at(buf, at.0 + inside),
            None => {
                let bytes = self.unpack(claim.cluster, home)?;
                let found = bytes.get(inside as usize..).and_then(|bytes| bytes.get(..buf.len()));
                buf.copy_from_slice(found.unwrap_or(&[]));
                Ok(())
            }
        }
    }
}

/// Where the pieces of a write go, neighbours joined.
struct Homes<'a> {
    image: &'a Inner,
    epoch: &'a Arc<Epoch>,
    out: &'a mut Vec<Extent>,
    run: Option<ByteRange>,
}

impl Homes<'_> {
    /// `piece` goes to the host cluster at `home`, which there is.
    fn push(&mut self, home: Option<HostOffset>, piece: ByteRange) {
        let inside = piece.offset & (self.image.geometry.cluster_size() - 1);
        let offset = home.unwrap_or_default().0 + inside;
        match &mut self.run {
            Some(run) if run.end() == offset => run.len += piece.len,
            _ => {
                self.end();
                self.run = Some(ByteRange { offset, len: piece.len });
            }
        }
    }

    fn end(&mut self) {
        let run = self.run.take();
        self.out.extend(run.map(|run| data_extent(self.epoch, run.offset, run.len)));
    }
}

/// A write to new room. Dropped, it publishes nothing.
#[derive(Debug)]
pub(crate) struct Allocating {
    pub(crate) image: Arc<Inner>,
    pub(crate) owner: u64,
    pub(crate) claims: Vec<Claim>,
    /// Whether the claims are still held.
    pub(crate) held: bool,
}

impl Allocating {
    /// Makes the claimed entries visible, as `advance` makes them of what they are now, and lets go of the claims.
    pub(crate) fn publish(mut self, advance: impl Fn(&Claim, Entry) -> Entry) -> Result<()> {
        let image = Arc::clone(&self.image);
        let Some(writer) = &image.writer else { return Ok(()) };
        writer.check_latch()?;
        let mut core = writer.core();
        let mut steps = Vec::with_capacity(self.claims.len());
        for claim in &self.claims {
            let old = image.entry(&core, claim.cluster)?;
            steps.push(Step { cluster: claim.cluster, old, new: advance(claim, old) });
        }
        image.publish(&mut core, &steps)?;
        for (claim, step) in self.claims.iter().zip(&steps) {
            if step.new.home.offset() == Some(claim.home) {
                core.claims.published(claim.cluster);
            }
        }
        let waiting = self.release(&mut core);
        drop(core);
        waiting.into_iter().for_each(Waker::wake);
        Ok(())
    }

    fn release(&mut self, core: &mut Core) -> Vec<Waker> {
        self.held = false;
        let Core { claims, allocator, .. } = core;
        let external = self.image.geometry.external;
        claims.release(self.owner, |unused| {
            if !external {
                allocator.give_back(unused);
            }
        })
    }
}

impl PendingWrite for Allocating {
    fn complete(self: Box<Self>) -> Result<()> {
        self.publish(|claim, old| Entry {
            home: Home::own(claim.home),
            state: match claim.moves() {
                true => claim.old.state.with_allocated(claim.publish),
                false => old.state.with_allocated(claim.publish),
            },
        })
    }
}

impl Drop for Allocating {
    fn drop(&mut self) {
        let image = Arc::clone(&self.image);
        let (Some(writer), true) = (&image.writer, self.held) else { return };
        let waiting = self.release(&mut writer.core());
        waiting.into_iter().for_each(Waker::wake);
    }
}
