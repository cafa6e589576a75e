//! Zeroing and discarding.
//!
//! Whole subclusters are cleared by their entries alone: a whole cluster that is discarded, or zeroed with leave to
//! unmap, is freed; other whole subclusters get the zero bit, if anything else would show. Parts of subclusters are
//! written with zeroes, or punched out of the file.

use std::sync::Arc;
use std::task::{Poll, Waker};

use block::{ByteRange, ErrorKind, Place, Result, Source, Storage};

use crate::entry::{Entry, GuestCluster, State};
use crate::image::{Core, Inner, Writer};
use crate::publish::Step;
use crate::read::after;

/// Clusters that are cleared in one go: bounds how long the lock is held.
const BATCH: u64 = 256;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Why {
    Discard,
    Zero { unmap: bool },
}

impl Why {
    /// Whether room may be given back.
    fn unmaps(self) -> bool {
        self != Self::Zero { unmap: false }
    }
}

/// How a cluster is cleared.
enum Clearing {
    /// Its entry says so already.
    Done,
    /// By its entry.
    Entry(Entry),
    /// By its bytes.
    Bytes,
}

/// What a batch of clusters came to.
#[derive(Default)]
struct Cleared {
    /// Data that entries do not show any more, in clusters that keep their place.
    hidden: Vec<ByteRange>,
    /// Parts of the disk that are to be cleared by their bytes.
    bytes: Vec<ByteRange>,
    /// A claim is in the way: what is before it was cleared.
    waits: bool,
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

    fn clear(self: &Arc<Self>, range: ByteRange, why: Why, waker: &Waker) -> Poll<Result<()>> {
        let clear = |writer| Clear { image: self, writer, why, waker }.range(range);
        let cleared = self.begin_writing(range).map(clear);
        match cleared {
            Ok(Ok(true)) => Poll::Ready(Ok(())),
            Ok(Ok(false)) => Poll::Pending,
            Ok(Err(error)) | Err(error) => Poll::Ready(Err(error)),
        }
    }

    /// How the subclusters `covered` of a cluster are cleared.
    fn clearing(&self, cluster: GuestCluster, old: Entry, covered: u32, why: Why) -> Clearing {
        let geometry = self.geometry;
        let start = geometry.start_of(cluster);
        let shows = self.inside_backing(ByteRange { offset: start, len: geometry.cluster_size() }) > 0;
        let (absent, zeroes) = (State::default(), State::new(0, geometry.all()));
        let Entry { home, state } = old;
        if geometry.external && state.allocated() & covered != 0 {
            return Clearing::Bytes;
        }
        let all = covered == geometry.all();
        if all && !geometry.external && (why.unmaps() || (!home.is_none() && !home.is_own())) {
            let state = if shows { zeroes } else { absent };
            let new = Entry { state, ..Entry::default() };
            return match shows && !geometry.zero_flag {
                _ if new == old || (home.is_none() && state == absent) => Clearing::Done,
                true => Clearing::Bytes,
                false => Clearing::Entry(new),
            };
        }
        let shown = state.allocated() | if shows { !state.zero() } else { 0 };
        match covered & shown {
            0 => Clearing::Done,
            _ if home.is_compressed() || !geometry.zero_flag => Clearing::Bytes,
            hidden => Clearing::Entry(Entry { home, state: state.with_zeroed(hidden) }),
        }
    }
}

/// A request to clear.
pub(crate) struct Clear<'a> {
    pub(crate) image: &'a Arc<Inner>,
    /// For who may write there.
    pub(crate) writer: &'a Writer,
    pub(crate) why: Why,
    pub(crate) waker: &'a Waker,
}

impl Clear<'_> {
    /// Clears `range`; `false` if it has to wait. Then it is asked for all of it again: what is done stays done.
    pub(crate) fn range(&self, range: ByteRange) -> Result<bool> {
        let bits = self.image.geometry.subcluster_bits();
        // The disk's last cluster has nothing behind its end, so up to there is all of it.
        let end = match range.end() >= self.image.capacity() {
            true => range.end().next_multiple_of(self.image.geometry.cluster_size()),
            false => range.end() >> bits << bits,
        };
        let start = range.offset.div_ceil(1 << bits) << bits;
        if start >= end.min(range.end()) {
            return self.bytes(range);
        }
        let head = ByteRange { offset: range.offset, len: start - range.offset };
        let tail = ByteRange { offset: end.min(range.end()), len: range.end().saturating_sub(end) };
        let mut rest = ByteRange { offset: start, len: end - start };
        if !self.bytes(head)? || !self.bytes(tail)? {
            return Ok(false);
        }
        while rest.len > 0 {
            let inside = rest.offset & (self.image.geometry.cluster_size() - 1);
            let batch =
                ByteRange { len: rest.len.min((BATCH << self.image.geometry.cluster_bits) - inside), ..rest };
            if !self.batch(batch, range.end())? {
                return Ok(false);
            }
            rest = after(rest, batch.len);
        }
        Ok(true)
    }

    /// Clears whole subclusters, of what was asked for up to `limit`.
    fn batch(&self, range: ByteRange, limit: u64) -> Result<bool> {
        // Held while what was hidden is punched out: a cluster that somebody frees meanwhile is not used again.
        let _epoch = self.image.epochs.now();
        // Entries are read before the lock is taken.
        self.image.geometry.pieces(range).try_for_each(|(cluster, _)| self.image.look(cluster, |_| ()))?;
        let cleared = self.entries(&mut self.writer.core(), range)?;
        if self.why.unmaps() && !self.writer.keeps_freed {
            // Advice: entries say already that there are zeroes.
            cleared.hidden.iter().for_each(|hidden| _ = self.image.data.punch_hole(*hidden));
        }
        for range in cleared.bytes {
            let range = ByteRange { len: range.len.min(limit.saturating_sub(range.offset)), ..range };
            if !self.bytes(range)? {
                return Ok(false);
            }
        }
        Ok(!cleared.waits)
    }

    fn entries(&self, core: &mut Core, range: ByteRange) -> Result<Cleared> {
        let (mut cleared, mut steps) = (Cleared::default(), Vec::new());
        for (cluster, piece) in self.image.geometry.pieces(range) {
            let old = self.image.entry(core, cluster)?;
            let covered = self.image.geometry.masks(piece).covered;
            let new = match self.image.clearing(cluster, old, covered, self.why) {
                Clearing::Done => continue,
                Clearing::Bytes => {
                    cleared.bytes.push(piece);
                    continue;
                }
                Clearing::Entry(new) => new,
            };
            // A write that is copying the rest of one of them from elsewhere must end first: it would bring back what
            // was there. And one that was given this home needs it.
            let frees = old.home.0 != new.home.0;
            if core.claims.conflict(cluster, covered, 0) || (frees && core.claims.holds(cluster)) {
                core.claims.wait(self.waker);
                cleared.waits = true;
                break;
            }
            if let (false, Some(at)) = (frees || !old.home.is_own(), old.home.offset()) {
                let bits = self.image.geometry.subcluster_bits();
                let shown =
                    (0..u32::BITS).filter(|index| old.state.allocated() & covered & (1 << index) != 0);
                cleared.hidden.extend(
                    shown
                        .map(|index| ByteRange { offset: at.0 + (u64::from(index) << bits), len: 1 << bits }),
                );
            }
            steps.push(Step { cluster, old, new });
        }
        self.image.publish(core, &steps).map(|()| cleared)
    }

    /// Clears bytes one by one: those that are here where they are, and others that would show by a write of zeroes. A
    /// discard leaves those as they are. `false` if it has to wait.
    fn bytes(&self, range: ByteRange) -> Result<bool> {
        let mut rest = range;
        while rest.len > 0 {
            let found = self.image.run_at(rest)?;
            let run = ByteRange { offset: rest.offset, len: found.len };
            let here = matches!(found.place, Place::Data(_)) && found.own;
            let shows = match found.place {
                Place::Zero => false,
                Place::Absent => self.image.inside_backing(run) > 0,
                Place::Data(_) | Place::Packed => true,
            };
            if (here || (shows && self.why != Why::Discard)) && !self.overwrite(run)? {
                return Ok(false);
            }
            rest = after(rest, run.len);
        }
        Ok(true)
    }

    /// A write of zeroes like any other.
    fn overwrite(&self, range: ByteRange) -> Result<bool> {
        let mut extents = Vec::new();
        let guard = match self.image.resolve_write(self.writer, range, self.waker, &mut extents) {
            Poll::Ready(guard) => guard?,
            Poll::Pending => return Ok(false),
        };
        for extent in &extents {
            if let Source::File { storage, offset } = &extent.source {
                clear_file(&**storage, ByteRange { offset: *offset, len: extent.len }, self.why)?;
            }
        }
        guard.complete().map(|()| true)
    }
}

fn clear_file(storage: &dyn Storage, range: ByteRange, why: Why) -> Result<()> {
    if why.unmaps() {
        match storage.punch_hole(range) {
            // A discard is advice, and this host can not follow it.
            Err(error) if error.kind() == ErrorKind::Unsupported && why == Why::Discard => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            // A hole past the end of the file makes it no longer.
            Ok(()) if storage.len()? >= range.end() => return Ok(()),
            Ok(()) => {}
            Err(error) => return Err(error),
        }
    }
    block::write_zeroes(storage, range)
}
