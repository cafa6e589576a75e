//! Zeroing and discarding.
//!
//! Room that holds data keeps its place: its bytes are punched out of the file, or written with zeroes. Room that holds
//! none gets the zero bit, if what is beneath could show through.

use std::sync::Arc;
use std::task::{Poll, Waker};

use block::{ByteRange, Error, ErrorKind, Place, Result, Source};

use crate::entry::State;
use crate::image::{Core, Inner, Writer};
use crate::pending::Claim;
use crate::read::after;

/// Clusters whose zero bits are set in one go: bounds how long the lock is held.
const BATCH: u64 = 256;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Why {
    Discard,
    Zero { unmap: bool },
}

impl Inner {
    pub(crate) fn discard(self: &Arc<Self>, range: ByteRange, waker: &Waker) -> Poll<Result<()>> {
        self.clear(range, Why::Discard, waker)
    }

    pub(crate) fn write_zeroes(
        self: &Arc<Self>,
        range: ByteRange,
        unmap: bool,
        waker: &Waker,
    ) -> Poll<Result<()>> {
        self.clear(range, Why::Zero { unmap }, waker)
    }

    /// Run by run. After a `Pending` it begins again: what is done stays done.
    fn clear(self: &Arc<Self>, range: ByteRange, why: Why, waker: &Waker) -> Poll<Result<()>> {
        let writer = match self.check_writable(range) {
            Ok(writer) => writer,
            Err(error) => return Poll::Ready(Err(error)),
        };
        let mut rest = range;
        while rest.len > 0 {
            // Cut at the end of a cluster, lest the cut makes two parts of a subcluster.
            let inside = rest.offset & (self.geometry.cluster_size() - 1);
            let most = (BATCH << self.geometry.cluster_bits) - inside;
            let batch = ByteRange { offset: rest.offset, len: rest.len.min(most) };
            let run = match self.run_at(batch) {
                Ok(run) => run,
                Err(error) => return Poll::Ready(Err(error)),
            };
            let cleared = match run.place {
                Place::Zero => Poll::Ready(Ok(())),
                Place::Data(offset) => {
                    Poll::Ready(self.clear_data(run.range, ByteRange { offset, len: run.range.len }, why))
                }
                Place::Packed => {
                    Poll::Ready(Err(Error::new(ErrorKind::Unsupported, "compressed qcow2 clusters")))
                }
                Place::Absent => self.clear_absent(writer, run.range, why, waker),
            };
            match cleared {
                Poll::Ready(Ok(())) => rest = after(rest, run.range.len),
                other => return other,
            }
        }
        Poll::Ready(Ok(()))
    }

    fn clear_data(&self, guest: ByteRange, host: ByteRange, why: Why) -> Result<()> {
        self.check_unshared(guest)?;
        if why != (Why::Zero { unmap: false }) {
            match self.storage.punch_hole(host) {
                // A discard is advice, and this host can not follow it.
                Err(error) if error.kind() == ErrorKind::Unsupported && why == Why::Discard => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                done => return done,
            }
        }
        block::write_zeroes(&*self.storage, host)
    }

    /// Clears `range`, none of which was in this layer a moment ago.
    fn clear_absent(
        self: &Arc<Self>,
        writer: &Writer,
        range: ByteRange,
        why: Why,
        waker: &Waker,
    ) -> Poll<Result<()>> {
        let bits = self.geometry.subcluster_bits();
        let inside = self.inside_backing(range);
        if inside == 0 {
            return Poll::Ready(Ok(()));
        }
        // Past the end of what is beneath it reads as zeroes anyway.
        let shown = ((range.offset + inside).div_ceil(1 << bits) << bits).min(range.end());
        let range = ByteRange { offset: range.offset, len: shown - range.offset };
        // The disk's last subcluster has nothing behind its end, so up to there is all of it.
        let last = range.end() == self.geometry.capacity;
        let end = if last { range.end().div_ceil(1 << bits) } else { range.end() >> bits } << bits;
        let start = range.offset.div_ceil(1 << bits) << bits;
        if start >= end {
            return self.clear_part(range, why, waker);
        }
        let head = ByteRange { offset: range.offset, len: start - range.offset };
        let tail = ByteRange { offset: end, len: range.end().saturating_sub(end) };
        for part in [head, tail] {
            match self.clear_part(part, why, waker) {
                Poll::Ready(Ok(())) => {}
                other => return other,
            }
        }
        self.set_zero_bits(writer, ByteRange { offset: start, len: end - start }, waker)
    }

    /// Clears a part of a subcluster: a write of zeroes like any other. A discard leaves it as it is.
    fn clear_part(self: &Arc<Self>, range: ByteRange, why: Why, waker: &Waker) -> Poll<Result<()>> {
        if range.len == 0 || why == Why::Discard {
            return Poll::Ready(Ok(()));
        }
        let mut extents = Vec::new();
        let guard = match self.resolve_write(range, waker, &mut extents) {
            Poll::Ready(Ok(guard)) => guard,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        };
        let written = extents.iter().try_for_each(|extent| match &extent.source {
            Source::File { storage, offset } => {
                block::write_zeroes(&**storage, ByteRange { offset: *offset, len: extent.len })
            }
            Source::Zero | Source::Bytes { .. } => Ok(()),
        });
        Poll::Ready(written.and_then(|()| guard.complete()))
    }

    /// Sets the zero bits of whole subclusters, but for those that got data meanwhile. A write that is copying the
    /// rest of one of them from below must end first: it would bring back what was there.
    fn set_zero_bits(&self, writer: &Writer, range: ByteRange, waker: &Waker) -> Poll<Result<()>> {
        let mut claims = Vec::new();
        for (cluster, piece) in self.geometry.pieces(range) {
            if let Err(error) = self.tables.entry_for_write(&*self.storage, cluster) {
                return Poll::Ready(Err(error));
            }
            claims.push(Claim { cluster, shared: self.geometry.masks(piece).covered, exclusive: 0 });
        }
        let mut core = writer.core();
        if claims.iter().any(|claim| core.claims.conflict(claim)) {
            core.claims.wait(waker);
            return Poll::Pending;
        }
        Poll::Ready(self.publish_zero(&mut core, &claims))
    }

    fn publish_zero(&self, core: &mut Core, claims: &[Claim]) -> Result<()> {
        self.publish(core, claims, |state: State, claim| state.with_zero(claim.shared))
    }
}
