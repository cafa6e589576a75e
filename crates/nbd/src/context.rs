//! Metadata contexts: what an export tells of its bytes beside the bytes ("Metadata querying"; QEMU's are in its
//! `docs/interop/nbd.txt`).

use std::fmt::Debug;
use std::sync::Arc;

use block::{ByteRange, DirtyBitmap, Disk, Layer, Place, Result, Source, Storage};

/// `base:allocation`: a hole, writing to which may need room.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: it reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;
/// `qemu:dirty-bitmap`: it was written.
pub const STATE_DIRTY: u32 = 1;

/// How much of a disk is resolved at once: of compressed data a disk returns the bytes, and they take memory.
const STEP: u64 = 2 << 20;
/// After so many questions to a disk or a layer a reply ends, however little of the range it tells of, so that none takes
/// much time. Clients ask on from there.
const MAX_QUESTIONS: usize = 4096;

/// One kind of metadata of an export.
pub trait MetaContext: Send + Sync + Debug {
    /// What clients select it by: a namespace, a colon and a name.
    fn name(&self) -> &str;

    /// Tells the status of `range`, which lies within the export and is not empty, from its beginning on: all of it, or as
    /// much as `out` wants, or less if it were too much work, but some.
    fn describe(&self, range: ByteRange, out: &mut Extents) -> Result<()>;
}

/// Consecutive runs of bytes and their status, as many as a reply may hold.
#[derive(Debug)]
pub struct Extents {
    list: Vec<(u64, u32)>,
    max: usize,
    /// Bytes of the request that nothing was said of yet.
    left: u64,
}

impl Extents {
    /// For a request of `len` bytes; at most `max` runs, and one at least.
    pub(crate) fn new(len: u64, max: usize) -> Self {
        Self { list: Vec::new(), max: max.max(1), left: len }
    }

    /// The next `len` bytes have this status. Neighbours alike are made one, and what is past the request is cut off.
    /// `false` if nothing more is wanted.
    #[must_use = "who goes on walking once nothing more is wanted may do so for long"]
    pub fn push(&mut self, len: u64, flags: u32) -> bool {
        let len = len.min(self.left);
        let is_full = self.list.len() >= self.max;
        match self.list.last_mut() {
            Some(last) if last.1 == flags => last.0 += len,
            _ if len == 0 => {}
            _ if is_full => return false,
            _ => self.list.push((len, flags)),
        }
        self.left -= len;
        self.left > 0
    }

    pub(crate) fn list(&self) -> &[(u64, u32)] {
        &self.list
    }
}

/// `base:allocation`, as the disk resolves reads.
#[derive(Debug)]
pub(crate) struct Allocation(pub(crate) Arc<dyn Disk>);

impl MetaContext for Allocation {
    fn name(&self) -> &str {
        "base:allocation"
    }

    fn describe(&self, range: ByteRange, out: &mut Extents) -> Result<()> {
        let mut found = Vec::new();
        let mut rest = range;
        for _ in 0..MAX_QUESTIONS {
            let step = ByteRange { offset: rest.offset, len: STEP.min(rest.len) };
            self.0.resolve_read(step, &mut found)?;
            for extent in found.drain(..) {
                let more = match extent.source {
                    Source::Zero => out.push(extent.len, STATE_HOLE | STATE_ZERO),
                    Source::Bytes { .. } => out.push(extent.len, 0),
                    Source::File { storage, offset } => {
                        data(&*storage, ByteRange { offset, len: extent.len }, out)?
                    }
                };
                if !more {
                    return Ok(());
                }
            }
            rest = ByteRange { offset: step.end(), len: rest.len - step.len };
        }
        Ok(())
    }
}

/// Tells of bytes in a host file, which may have holes itself.
fn data(storage: &dyn Storage, range: ByteRange, out: &mut Extents) -> Result<bool> {
    let mut wanted = true;
    holes(storage, range, |part, is_hole| {
        wanted = out.push(part.len, if is_hole { STATE_HOLE | STATE_ZERO } else { 0 });
        Ok(wanted)
    })?;
    Ok(wanted)
}

/// Calls `tell` with each part of a range of a host file, in order, and whether it is a hole, until `tell` wants no more.
pub(crate) fn holes(
    storage: &dyn Storage,
    range: ByteRange,
    mut tell: impl FnMut(ByteRange, bool) -> Result<bool>,
) -> Result<()> {
    let mut rest = range;
    while rest.len > 0 {
        let next = storage.next_data(rest.offset)?;
        let start = next.map_or(rest.end(), |data| data.offset.clamp(rest.offset, rest.end()));
        let end = next.map_or(rest.end(), |data| data.end().clamp(start, rest.end()));
        for (from, to, is_hole) in [(rest.offset, start, true), (start, end, false)] {
            if to > from && !tell(ByteRange { offset: from, len: to - from }, is_hole)? {
                return Ok(());
            }
        }
        rest = ByteRange { offset: end, len: rest.end() - end };
    }
    Ok(())
}

/// A walk over a chain: which layer holds what.
#[derive(Debug)]
struct Layers(Vec<Arc<dyn Layer>>);

impl Layers {
    /// Calls `tell` with each run of `range`, in order, its layer's index, counted from the newest on, and what it is
    /// there, until `tell` wants no more or it were too much work. The index of what no layer holds is `None`.
    fn walk(
        &self,
        range: ByteRange,
        mut tell: impl FnMut(ByteRange, Option<usize>, Place) -> Result<bool>,
    ) -> Result<()> {
        let mut rest = range;
        let mut questions = 0;
        while rest.len > 0 && questions < MAX_QUESTIONS {
            let (run, index, place) = self.first_run(rest, &mut questions)?;
            if !tell(run, index, place)? {
                break;
            }
            rest = ByteRange { offset: run.end(), len: rest.end() - run.end() };
        }
        Ok(())
    }

    /// The newest layer that holds the first bytes of `range`, and how many of them alike.
    fn first_run(
        &self,
        range: ByteRange,
        questions: &mut usize,
    ) -> Result<(ByteRange, Option<usize>, Place)> {
        let mut range = range;
        for (index, layer) in self.0.iter().rev().enumerate() {
            let inside = layer.capacity().saturating_sub(range.offset).min(range.len);
            if inside == 0 {
                // The layer ends here, and zeroes follow, whatever is beneath.
                return Ok((range, Some(index), Place::Zero));
            }
            *questions += 1;
            let run = layer.run_at(ByteRange { len: inside, ..range })?;
            range.len = run.range.len.clamp(1, inside);
            if run.place != Place::Absent {
                return Ok((range, Some(index), run.place));
            }
        }
        Ok((range, None, Place::Absent))
    }
}

/// `base:allocation`, as the layers know it: nothing is unpacked for it.
#[derive(Debug)]
pub(crate) struct LayersAllocation(Layers);

impl LayersAllocation {
    /// The base first.
    pub(crate) fn new(layers: Vec<Arc<dyn Layer>>) -> Self {
        Self(Layers(layers))
    }
}

impl MetaContext for LayersAllocation {
    fn name(&self) -> &str {
        "base:allocation"
    }

    fn describe(&self, range: ByteRange, out: &mut Extents) -> Result<()> {
        self.0.walk(range, |run, index, place| {
            let layer = index.and_then(|index| self.0.0.iter().rev().nth(index));
            match (place, layer) {
                (Place::Data(offset), Some(layer)) => {
                    data(&*layer.data(), ByteRange { offset, len: run.len }, out)
                }
                (Place::Packed, _) => Ok(out.push(run.len, 0)),
                _ => Ok(out.push(run.len, STATE_HOLE | STATE_ZERO)),
            }
        })
    }
}

/// `qemu:allocation-depth`: which layer holds the bytes, the newest being 1, and 0 if none does.
#[derive(Debug)]
pub(crate) struct AllocationDepth(Layers);

impl AllocationDepth {
    /// The base first.
    pub(crate) fn new(layers: Vec<Arc<dyn Layer>>) -> Self {
        Self(Layers(layers))
    }
}

impl MetaContext for AllocationDepth {
    fn name(&self) -> &str {
        "qemu:allocation-depth"
    }

    fn describe(&self, range: ByteRange, out: &mut Extents) -> Result<()> {
        self.0.walk(range, |run, index, _| {
            // More layers than fit in 32 bits are more than a process can open.
            Ok(out.push(run.len, index.map_or(0, |index| index as u32 + 1)))
        })
    }
}

/// `qemu:dirty-bitmap:NAME`: which granules are marked in a bitmap, or have changed since a checkpoint.
#[derive(Debug)]
pub struct BitmapContext {
    name: String,
    bitmap: Arc<DirtyBitmap>,
}

impl BitmapContext {
    /// The context of `bitmap`; clients select it as `qemu:dirty-bitmap:` and `name`.
    pub fn new(name: &str, bitmap: Arc<DirtyBitmap>) -> Self {
        Self { name: format!("qemu:dirty-bitmap:{name}"), bitmap }
    }
}

impl MetaContext for BitmapContext {
    fn name(&self) -> &str {
        &self.name
    }

    fn describe(&self, range: ByteRange, out: &mut Extents) -> Result<()> {
        let mut rest = range;
        while let Some(dirty) = self.bitmap.next_dirty(rest) {
            let clean = dirty.offset - rest.offset;
            if (clean > 0 && !out.push(clean, 0)) || !out.push(dirty.len, STATE_DIRTY) {
                return Ok(());
            }
            rest = ByteRange { offset: dirty.end(), len: rest.end() - dirty.end() };
        }
        // The last thing said, so it does not matter whether more is wanted.
        let _ = out.push(rest.len, 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::testing::MemStorage;
    use block::{Error, ErrorKind, Extent, Flush, RawDisk, Run, WriteGuard};
    use std::task::{Poll, Waker};

    fn told(context: &dyn MetaContext, offset: u64, len: u64, max: usize) -> Vec<(u64, u32)> {
        let mut out = Extents::new(len, max);
        context.describe(ByteRange { offset, len }, &mut out).unwrap();
        out.list
    }

    /// A layer of 16 KiB whose runs are given by a string, a letter for each 4 KiB.
    #[derive(Debug)]
    struct Lettered(&'static str, Arc<MemStorage>);

    fn lettered(letters: &'static str) -> Arc<dyn Layer> {
        Arc::new(Lettered(letters, Arc::new(MemStorage::new(letters.len() * 4096))))
    }

    impl Disk for Lettered {
        fn capacity(&self) -> u64 {
            self.0.len() as u64 * 4096
        }
        fn read_only(&self) -> bool {
            true
        }
        fn discard_granularity(&self) -> u32 {
            4096
        }
        fn resolve_read(&self, _: ByteRange, _: &mut Vec<Extent>) -> Result<()> {
            Err(Error::new(ErrorKind::Io, "status must not need the bytes"))
        }
        fn resolve_write(&self, _: ByteRange, _: &Waker, _: &mut Vec<Extent>) -> Poll<Result<WriteGuard>> {
            unreachable!()
        }
        fn discard(&self, _: ByteRange, _: &Waker) -> Poll<Result<()>> {
            unreachable!()
        }
        fn write_zeroes(&self, _: ByteRange, _: bool, _: &Waker) -> Poll<Result<()>> {
            unreachable!()
        }
        fn flush(&self) -> Box<dyn Flush> {
            unreachable!()
        }
    }

    impl Layer for Lettered {
        fn run_at(&self, range: ByteRange) -> Result<Run> {
            let place = match self.0.as_bytes()[(range.offset / 4096) as usize] {
                b'd' => Place::Data(range.offset),
                b'z' => Place::Zero,
                b'p' => Place::Packed,
                _ => Place::Absent,
            };
            let len = (4096 - range.offset % 4096).min(range.len);
            Ok(Run { range: ByteRange { len, ..range }, place })
        }
        fn data(&self) -> Arc<dyn Storage> {
            Arc::clone(&self.1) as Arc<dyn Storage>
        }
    }

    #[test]
    fn neighbours_alike_are_one_and_nothing_is_said_past_the_request() {
        let mut out = Extents::new(100, 2);
        assert!(out.push(10, 1));
        assert!(out.push(10, 1));
        assert!(out.push(10, 2));
        assert!(!out.push(1, 3), "it holds two");
        assert!(!out.push(1000, 2));
        assert_eq!(out.list(), [(20, 1), (80, 2)]);
    }

    #[test]
    fn holes_of_a_raw_file_are_holes() {
        let folder = tempfile::tempdir().unwrap();
        let file = hostio::HostFile::create(&folder.path().join("a"), hostio::Cache::Writeback).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_at(&[1; 65536], 3 << 20).unwrap();
        let disk = Allocation(Arc::new(RawDisk::new(Arc::new(file), true).unwrap()));
        let hole = STATE_HOLE | STATE_ZERO;
        let all = [(3 << 20, hole), (65536, 0), ((5 << 20) - 65536, hole)];
        assert_eq!(told(&disk, 0, 8 << 20, 16), all);
        assert_eq!(told(&disk, 0, 8 << 20, 2), all[..2]);
        assert_eq!(told(&disk, (3 << 20) + 4096, 4096, 16), [(4096, 0)]);
    }

    #[test]
    fn the_newest_layer_that_holds_the_bytes_counts() {
        // The overlay is longer than its backing file, whose end is zeroes.
        let layers = vec![lettered("ddzpp"), lettered("-d-z-"), lettered("---dp--")];
        let depth = AllocationDepth::new(layers.clone());
        let found = told(&depth, 0, 7 * 4096, 16);
        assert_eq!(found, [(4096, 3), (4096, 2), (4096, 3), (8192, 1), (8192, 2)]);
        let allocation = LayersAllocation::new(layers);
        let hole = STATE_HOLE | STATE_ZERO;
        assert_eq!(told(&allocation, 0, 7 * 4096, 16), [(8192, 0), (4096, hole), (8192, 0), (8192, hole)]);
        assert_eq!(told(&allocation, 100, 50, 1), [(50, 0)]);
        let none = AllocationDepth::new(vec![lettered("--")]);
        assert_eq!(told(&none, 0, 8192, 16), [(8192, 0)]);
    }

    #[test]
    fn a_bitmap_is_told_in_whole_from_where_it_was_asked() {
        let bitmap = Arc::new(DirtyBitmap::new(1 << 20, 16).unwrap());
        bitmap.mark(ByteRange { offset: 65536, len: 1 });
        bitmap.mark(ByteRange { offset: (1 << 20) - 1, len: 1 });
        let context = BitmapContext::new("b0", bitmap);
        assert_eq!(context.name(), "qemu:dirty-bitmap:b0");
        let all = [(65536, 0), (65536, 1), (13 << 16, 0), (65536, 1)];
        assert_eq!(told(&context, 0, 1 << 20, 16), all);
        assert_eq!(told(&context, 0, 1 << 20, 3), all[..3]);
        assert_eq!(told(&context, 65536 + 512, 1024, 16), [(1024, 1)]);
        assert_eq!(told(&context, 2 << 16, 65536, 16), [(65536, 0)]);
    }

    #[test]
    fn a_reply_ends_before_it_is_too_much_work() {
        let stripes: &'static str = Box::leak("d-".repeat(8192).into_boxed_str());
        let context = AllocationDepth::new(vec![lettered(stripes)]);
        let len = stripes.len() as u64 * 4096;
        let told: u64 = told(&context, 0, len, usize::MAX).iter().map(|run| run.0).sum();
        assert_eq!(told, MAX_QUESTIONS as u64 * 4096);
    }
}
