//! Reading: from a range of the disk to where its bytes are.

use std::sync::Arc;

use block::{ByteRange, Error, ErrorKind, Extent, Layer, Place, Result, Run, Source, Storage, read_disk};

use crate::entry::{Entry, GuestCluster, State};
use crate::epoch::Epoch;
use crate::image::{Image, Inner};

impl Layer for Image {
    fn run_at(&self, range: ByteRange) -> Result<Run> {
        self.0.check(range)?;
        match range.len {
            0 => Err(Error::new(ErrorKind::InvalidInput, "an empty range has no runs")),
            _ => self.0.run_at(range).map(|found| self.0.within_file(found)).map(|found| Run {
                range: ByteRange { offset: range.offset, len: found.len },
                place: found.place,
            }),
        }
    }

    fn data(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.0.data)
    }

    /// Only if nobody writes to it: then its entries are asked for all the time.
    fn forget(&self) {
        if self.0.writer.is_none() {
            self.0.mapping.forget();
        }
    }
}

/// A run of bytes of which the entries say the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) len: u64,
    pub(crate) place: Place,
    /// Whether data may be written where it is.
    pub(crate) own: bool,
}

impl Inner {
    pub(crate) fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        // Before any entry is looked at, and until the extents have it.
        let epoch = self.epochs.now();
        let mut rest = range;
        while rest.len > 0 {
            let found = self.within_file(self.run_at(rest)?);
            let run = ByteRange { offset: rest.offset, len: found.len };
            match found.place {
                Place::Absent => self.resolve_below(run, out)?,
                Place::Zero => out.push(Extent { len: run.len, source: Source::Zero }),
                Place::Data(offset) => out.push(data_extent(&epoch, offset, run.len)),
                Place::Packed => self.resolve_packed(run, out)?,
            }
            rest = after(rest, run.len);
        }
        Ok(())
    }

    /// The longest run at the start of `range`, which is not empty and inside the disk.
    pub(crate) fn run_at(&self, range: ByteRange) -> Result<Found> {
        let mut found = self.run_in_slice(range)?;
        while found.len < range.len {
            let more = self.run_in_slice(after(range, found.len))?;
            if !found.goes_on(&more) {
                break;
            }
            found.len += more.len;
        }
        Ok(found)
    }

    /// A run at the start of `range` that does not look beyond one slice, or one table that there is not.
    fn run_in_slice(&self, range: ByteRange) -> Result<Found> {
        let cluster = self.geometry.cluster_at(range.offset);
        self.look(cluster, |entries| {
            if entries.is_empty() {
                let len = (self.table_end(cluster).min(range.end()) - range.offset).min(range.len);
                return Found { len, place: Place::Absent, own: false };
            }
            let mut run: Option<Found> = None;
            let mut rest = range;
            for entry in entries {
                loop {
                    let more = self.run_in_cluster(*entry, rest);
                    match &mut run {
                        None => run = Some(more),
                        Some(run) if run.goes_on(&more) => run.len += more.len,
                        Some(run) => return *run,
                    }
                    rest = after(rest, more.len);
                    if rest.len == 0 || self.geometry.is_aligned(rest.offset) {
                        break;
                    }
                }
                if rest.len == 0 {
                    break;
                }
            }
            run.unwrap_or(Found { len: range.len, place: Place::Absent, own: false })
        })
    }

    /// The run at the start of `range` of the cluster there, which has this entry.
    fn run_in_cluster(&self, entry: Entry, range: ByteRange) -> Found {
        let bits = self.geometry.subcluster_bits();
        let inside = range.offset & (self.geometry.cluster_size() - 1);
        let first = (inside >> bits) as u32;
        let (kind, alike) = kind_at(entry.state, first);
        // A standard cluster has one subcluster, so only its first bit speaks.
        let count =
            if self.geometry.extended { (!(alike >> first)).trailing_zeros().min(32 - first) } else { 1 };
        let len = ((u64::from(first + count) << bits) - inside).min(range.len);
        let place = match (kind, entry.home.offset()) {
            (Kind::Data, Some(at)) => Place::Data(at.0 + inside),
            (Kind::Data, None) => Place::Packed,
            (Kind::Zero, _) => Place::Zero,
            (Kind::Absent, _) => Place::Absent,
        };
        Found { len, place, own: entry.home.is_own() }
    }

    fn table_end(&self, cluster: GuestCluster) -> u64 {
        let entries = self.geometry.entries_per_table();
        let end = (cluster.0 / entries + 1).saturating_mul(entries);
        end.saturating_mul(self.geometry.cluster_size())
    }

    /// What is left of a run at its start once the end of the file is looked at. QEMU may leave the last cluster of a file
    /// shorter than it is; what is missing reads as zeroes.
    fn within_file(&self, found: Found) -> Found {
        match found.place {
            Place::Data(offset) if offset >= self.readable => Found { place: Place::Zero, ..found },
            Place::Data(offset) => Found { len: found.len.min(self.readable - offset), ..found },
            _ => found,
        }
    }

    /// Where the bytes are that this layer does not have. The disk beneath may be shorter: zeroes follow its end.
    fn resolve_below(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        let inside = self.inside_backing(range);
        if let (Some(backing), true) = (&self.backing, inside > 0) {
            backing.resolve_read(ByteRange { offset: range.offset, len: inside }, out)?;
        }
        if inside < range.len {
            out.push(Extent { len: range.len - inside, source: Source::Zero });
        }
        Ok(())
    }

    /// Fills `buf` with what is beneath this layer at `offset`, zeroes where nothing is, and past this disk's own end.
    pub(crate) fn read_below(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = ByteRange { offset, len: buf.len() as u64 };
        let inside = self.inside_backing(range).min(self.capacity().saturating_sub(offset));
        let (below, nothing) = buf.split_at_mut(inside as usize);
        nothing.fill(0);
        match &self.backing {
            Some(backing) if !below.is_empty() => read_disk(&**backing, offset, below),
            _ => Ok(()),
        }
    }

    /// How many bytes from the start of `range` on the disk beneath has.
    pub(crate) fn inside_backing(&self, range: ByteRange) -> u64 {
        let capacity = self.backing.as_ref().map_or(0, |backing| backing.capacity());
        capacity.saturating_sub(range.offset).min(range.len)
    }
}

impl Found {
    fn goes_on(&self, next: &Self) -> bool {
        self.place.goes_on(self.len, next.place)
            && (self.own == next.own || !matches!(self.place, Place::Data(_)))
    }
}

/// An extent of the data file, resolved in `epoch`.
pub(crate) fn data_extent(epoch: &Arc<Epoch>, offset: u64, len: u64) -> Extent {
    let storage = Arc::clone(epoch) as Arc<dyn Storage>;
    Extent { len, source: Source::File { storage, offset } }
}

#[derive(Clone, Copy)]
enum Kind {
    Absent,
    Zero,
    Data,
}

/// What subcluster `index` is, and the set of all that are the same.
fn kind_at(state: State, index: u32) -> (Kind, u32) {
    let (allocated, zero) = (state.allocated(), state.zero());
    match 1 << index {
        bit if allocated & bit != 0 => (Kind::Data, allocated),
        bit if zero & bit != 0 => (Kind::Zero, zero),
        _ => (Kind::Absent, !(allocated | zero)),
    }
}

/// What is left of `range` without its first `len` bytes.
pub(crate) fn after(range: ByteRange, len: u64) -> ByteRange {
    ByteRange { offset: range.offset + len, len: range.len - len }
}
