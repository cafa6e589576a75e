//! Writing: in place where there is room already, else into new room that a guard publishes.

use std::sync::Arc;
use std::task::{Poll, Waker};

use block::{ByteRange, Context, Extent, PendingWrite, Place, Result, Source, WriteGuard};

use crate::entry::{GuestCluster, Home, HostOffset, State};
use crate::image::{Inner, Writer};
use crate::pending::Claim;
use crate::read::after;

impl Inner {
    pub(crate) fn resolve_write(
        self: &Arc<Self>,
        range: ByteRange,
        waker: &Waker,
        out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>> {
        let before = out.len();
        let hit = self.check_writable(range).and_then(|writer| Ok((writer, self.resolve_hit(range, out)?)));
        match hit {
            Ok((_, true)) => Poll::Ready(Ok(WriteGuard::in_place())),
            Ok((writer, false)) => {
                out.truncate(before);
                self.resolve_new(writer, range, waker, out)
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    /// Resolves a write that goes wholly where data already is; takes no lock. `false` if some of it does not.
    fn resolve_hit(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<bool> {
        let mut rest = range;
        while rest.len > 0 {
            let run = self.run_at(rest)?;
            let Place::Data(offset) = run.place else { return Ok(false) };
            self.check_unshared(run.range)?;
            out.push(self.file_extent(offset, run.range.len));
            rest = after(rest, run.range.len);
        }
        Ok(true)
    }

    /// That data in `range`, all of it in this layer, may be changed where it is.
    pub(crate) fn check_unshared(&self, range: ByteRange) -> Result<()> {
        for (cluster, _) in self.geometry.pieces(range) {
            self.tables.entry_for_write(&*self.storage, cluster)?.home().writable_offset()?;
        }
        Ok(())
    }

    fn resolve_new(
        self: &Arc<Self>,
        writer: &Writer,
        range: ByteRange,
        waker: &Waker,
        out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>> {
        let claims = match self.claim(writer, range, waker) {
            Poll::Ready(Ok(claims)) => claims,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        };
        let filled = self.fill_rest(range, &claims.claims);
        let placed = filled.and_then(|()| self.place(range, out));
        Poll::Ready(placed.map(|()| WriteGuard::allocating(Box::new(claims))))
    }

    /// Gives each cluster of `range` a home and claims what the write will publish, all of it or nothing.
    fn claim(self: &Arc<Self>, writer: &Writer, range: ByteRange, waker: &Waker) -> Poll<Result<Allocating>> {
        // Tables are read before the lock is taken.
        for (cluster, _) in self.geometry.pieces(range) {
            if let Err(error) = self.tables.entry_for_write(&*self.storage, cluster) {
                return Poll::Ready(Err(error));
            }
        }
        let mut core = writer.core();
        let claims = self.wanted(range);
        let claims = match claims {
            Ok(claims) => claims,
            Err(error) => return Poll::Ready(Err(error)),
        };
        if claims.iter().any(|claim| core.claims.conflict(claim)) {
            core.claims.wait(waker);
            return Poll::Pending;
        }
        Poll::Ready(self.assign_homes(writer, &claims).map(|()| {
            let owner = core.claims.hold(&claims);
            Allocating { image: Arc::clone(self), owner, claims }
        }))
    }

    /// What a write of `range` would publish, as things are now.
    fn wanted(&self, range: ByteRange) -> Result<Vec<Claim>> {
        let mut claims = Vec::new();
        for (cluster, piece) in self.geometry.pieces(range) {
            let entry = self.tables.entry_for_write(&*self.storage, cluster)?;
            let home = entry.home();
            if !home.is_none() {
                home.writable_offset()?;
            }
            let masks = self.geometry.masks(piece);
            let new = masks.touched & !entry.state().allocated();
            if new != 0 {
                let (shared, exclusive) = (new & masks.covered, new & !masks.covered);
                claims.push(Claim { cluster, shared, exclusive });
            }
        }
        Ok(claims)
    }

    /// A home once assigned stays, even if the write that asked for it is aborted: the next one uses it.
    fn assign_homes(&self, writer: &Writer, claims: &[Claim]) -> Result<()> {
        for claim in claims {
            let entry = self.tables.entry_for_write(&*self.storage, claim.cluster)?;
            if entry.home().is_none() {
                entry.set_home(Home::fresh(writer.allocator.take()?));
            }
        }
        Ok(())
    }

    /// Copies from below what partial subclusters hold outside `range`. Only a range's two ends can be partial.
    fn fill_rest(&self, range: ByteRange, claims: &[Claim]) -> Result<()> {
        for claim in claims.iter().filter(|claim| claim.exclusive != 0) {
            let entry = self.tables.entry_for_write(&*self.storage, claim.cluster)?;
            let (home, state) = (entry.home().offset()?, entry.state());
            for index in (0..u32::BITS).filter(|index| claim.exclusive & (1 << index) != 0) {
                let zero = state.zero() & (1 << index) != 0;
                self.fill_subcluster(range, claim.cluster, index, home, zero)
                    .context(|| "copy the rest of a subcluster")?;
            }
        }
        Ok(())
    }

    fn fill_subcluster(
        &self,
        range: ByteRange,
        cluster: GuestCluster,
        index: u32,
        home: HostOffset,
        zero: bool,
    ) -> Result<()> {
        let size = self.geometry.subcluster_size();
        let start = (cluster.0 << self.geometry.cluster_bits) + u64::from(index) * size;
        let host = home.0 + u64::from(index) * size;
        let head = (start, range.offset.max(start));
        let tail = (range.end().min(start + size), start + size);
        for (from, to) in [head, tail] {
            if from < to {
                let mut bytes = vec![0; (to - from) as usize];
                if !zero {
                    self.read_below(from, &mut bytes)?;
                }
                self.storage.write_at(&bytes, host + (from - start))?;
            }
        }
        Ok(())
    }

    /// Appends where the bytes of `range` go, whose clusters all have homes.
    fn place(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        let mut run: Option<ByteRange> = None;
        for (cluster, piece) in self.geometry.pieces(range) {
            let entry = self.tables.entry_for_write(&*self.storage, cluster)?;
            let inside = piece.offset & (self.geometry.cluster_size() - 1);
            let offset = entry.home().writable_offset()?.0 + inside;
            run = match run {
                Some(run) if run.end() == offset => {
                    Some(ByteRange { offset: run.offset, len: run.len + piece.len })
                }
                finished => {
                    out.extend(finished.map(|run| self.file_extent(run.offset, run.len)));
                    Some(ByteRange { offset, len: piece.len })
                }
            };
        }
        out.extend(run.map(|run| self.file_extent(run.offset, run.len)));
        Ok(())
    }

    fn file_extent(&self, offset: u64, len: u64) -> Extent {
        Extent { len, source: Source::File { storage: Arc::clone(&self.storage), offset } }
    }
}

/// A write to new room. Dropped, it publishes nothing.
#[derive(Debug)]
struct Allocating {
    image: Arc<Inner>,
    owner: u64,
    claims: Vec<Claim>,
}

impl PendingWrite for Allocating {
    fn complete(self: Box<Self>) -> Result<()> {
        let Some(writer) = &self.image.writer else { return Ok(()) };
        writer.check_latch()?;
        let allocate = |state: State, claim: &Claim| state.with_allocated(claim.all());
        self.image.publish(&mut writer.core(), &self.claims, allocate)
    }
}

impl Drop for Allocating {
    fn drop(&mut self) {
        let Some(writer) = &self.image.writer else { return };
        let waiting = writer.core().claims.release(self.owner, &self.claims);
        waiting.into_iter().for_each(Waker::wake);
    }
}
