//! Reading: from a range of the disk to where its bytes are. No locks, but to load a table the first time.

use std::sync::Arc;

use block::{ByteRange, Error, ErrorKind, Extent, Layer, Place, Result, Run, Source, Storage, read_disk};

use crate::entry::{GuestCluster, State};
use crate::image::{Image, Inner};

impl Layer for Image {
    fn run_at(&self, range: ByteRange) -> Result<Run> {
        self.0.check(range)?;
        match range.len {
            0 => Err(Error::new(ErrorKind::InvalidInput, "an empty range has no runs")),
            _ => self.0.run_at(range),
        }
    }

    fn data(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.0.storage)
    }
}

impl Inner {
    pub(crate) fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        let mut rest = range;
        while rest.len > 0 {
            let run = self.run_at(rest)?;
            match run.place {
                Place::Absent => self.resolve_below(run.range, out)?,
                Place::Zero => out.push(Extent { len: run.range.len, source: Source::Zero }),
                Place::Data(offset) => self.push_data(offset, run.range.len, out),
                Place::Packed => return Err(Error::new(ErrorKind::Unsupported, "compressed qcow2 clusters")),
            }
            rest = after(rest, run.range.len);
        }
        Ok(())
    }

    /// The longest run at the start of `range`, which is not empty and inside the disk.
    pub(crate) fn run_at(&self, range: ByteRange) -> Result<Run> {
        let (mut len, place) = self.piece_at(range)?;
        while len < range.len {
            let (more, next) = self.piece_at(after(range, len))?;
            if !place.goes_on(len, next) {
                break;
            }
            len += more;
        }
        Ok(Run { range: ByteRange { offset: range.offset, len }, place })
    }

    /// A run at the start of `range` that does not look beyond one cluster, or one table that there is not.
    fn piece_at(&self, range: ByteRange) -> Result<(u64, Place)> {
        let cluster = self.geometry.cluster_at(range.offset);
        let Some(entry) = self.tables.entry(&*self.storage, cluster)? else {
            return Ok((self.table_end(cluster).min(range.end()) - range.offset, Place::Absent));
        };
        let state = entry.state();
        let bits = self.geometry.subcluster_bits();
        let inside = range.offset & (self.geometry.cluster_size() - 1);
        let first = (inside >> bits) as u32;
        let (kind, alike) = kind_at(state, first);
        // A standard cluster has one subcluster, so only its first bit speaks.
        let count =
            if self.geometry.extended { (!(alike >> first)).trailing_zeros().min(32 - first) } else { 1 };
        let len = ((u64::from(first + count) << bits) - inside).min(range.len);
        let place = match kind {
            // Loaded after the state, see `table`.
            Kind::Data => Place::Data(entry.home().offset()?.0 + inside),
            Kind::Zero => Place::Zero,
            Kind::Absent => Place::Absent,
        };
        Ok((len, place))
    }

    fn table_end(&self, cluster: GuestCluster) -> u64 {
        let entries = self.geometry.entries_per_table();
        let end = (cluster.0 / entries + 1).saturating_mul(entries);
        end.saturating_mul(self.geometry.cluster_size())
    }

    fn push_data(&self, offset: u64, len: u64, out: &mut Vec<Extent>) {
        // QEMU may leave the last cluster of a file shorter than it is; what is missing reads as zeroes.
        let there = self.readable.saturating_sub(offset).min(len);
        if there > 0 {
            let storage = Arc::clone(&self.storage);
            out.push(Extent { len: there, source: Source::File { storage, offset } });
        }
        if there < len {
            out.push(Extent { len: len - there, source: Source::Zero });
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

    /// Fills `buf` with what is beneath this layer at `offset`, zeroes where nothing is.
    pub(crate) fn read_below(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let inside = self.inside_backing(ByteRange { offset, len: buf.len() as u64 });
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
