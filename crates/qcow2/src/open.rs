//! Opening: reading what is there, and checking that it can be what it says.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

use block::{Context, Error, ErrorKind, Result, Storage};

use crate::alloc::Allocator;
use crate::bitmaps::Bitmaps;
use crate::check::repair;
use crate::entry::Geometry;
use crate::epoch::Epochs;
use crate::flush::Flushes;
use crate::header::Header;
use crate::header_update;
use crate::image::{Core, Image, Inner, Mode, Parts, Writer};
use crate::journal::Journal;
use crate::mapping::Mapping;
use crate::metadata::Metadata;
use crate::pack::{Packer, Packing};
use crate::packed::PackedCache;
use crate::pending::Claims;
use crate::refcounts::Refcounts;
use crate::snapshots::Snapshots;
use crate::work::Work;

impl Image {
    /// Opens the image of these parts, which the caller has found and opened.
    ///
    /// For writing, what the journal holds is first written into the image and synced, and the journal is emptied;
    /// this may take as long as a flush. Reading an image whose journal was never written out (a layer whose process
    /// was killed) would miss the last writes: open it for writing first.
    ///
    /// Errors: as [`Header::read`]; [`ErrorKind::InvalidInput`] if there is a data file too many or too few;
    /// [`ErrorKind::Unsupported`] if it can be read but not written.
    pub fn open(parts: Parts, mode: Mode) -> Result<Self> {
        let mut header = Header::read(&*parts.storage)?;
        if header.has_data_file != parts.data_file.is_some() {
            let story = match header.has_data_file {
                true => "the image has its data in an external file, which is missing",
                false => "the image has no external data file",
            };
            return Err(Error::new(ErrorKind::InvalidInput, story));
        }
        if !matches!(mode, Mode::ReadOnly) {
            header = repaired(&*parts.storage, header)?;
        }
        let geometry =
            Geometry { zero_flag: header.version >= 3, external: header.has_data_file, ..header.geometry() };
        match mode {
            Mode::ReadOnly => open_read_only(parts, &header, geometry),
            Mode::Writable(journal) => open_writable(parts, &header, geometry, journal, false),
            Mode::Job(journal) => open_writable(parts, &header, geometry, journal, true),
        }
    }
}

/// The header of the image, once its refcounts are true. If its last writer counted lazily and was killed, they are
/// repaired first, which takes a look at all of its tables.
fn repaired(storage: &dyn Storage, header: Header) -> Result<Header> {
    header.check_intact()?;
    if !header.is_dirty() {
        return Ok(header);
    }
    repair(storage, &header).context(|| "the image was not closed cleanly")?;
    Header::read(storage)
}

fn open_read_only(parts: Parts, header: &Header, geometry: Geometry) -> Result<Image> {
    let readable = parts.data_file.as_ref().unwrap_or(&parts.storage).len()?;
    assemble(parts, header, geometry, readable, None)
}

fn assemble(
    parts: Parts,
    header: &Header,
    geometry: Geometry,
    readable: u64,
    writer: Option<Writer>,
) -> Result<Image> {
    let Parts { storage, data_file, backing, cache_bytes } = parts;
    let limit = storage.len()?.next_multiple_of(geometry.cluster_size());
    let mapping = Mapping::open(&*storage, geometry, header.l1, limit, cache_bytes, writer.is_some())?;
    let data = data_file.unwrap_or_else(|| Arc::clone(&storage));
    Ok(Image(Arc::new(Inner {
        epochs: Epochs::new(Arc::clone(&data)),
        storage,
        data,
        backing,
        geometry,
        capacity: AtomicU64::new(header.capacity),
        mapping,
        packed: PackedCache::new(header.compression),
        limit,
        readable,
        writer,
    })))
}

fn open_writable(
    parts: Parts,
    header: &Header,
    geometry: Geometry,
    journal: Journal,
    keeps_freed: bool,
) -> Result<Image> {
    let storage = Arc::clone(&parts.storage);
    let mut metadata = Metadata::new(geometry);
    let clusters = |bytes: u64| bytes.div_ceil(geometry.cluster_size());
    metadata.add(header.l1, clusters(u64::from(header.l1_entries) * 8))?;
    let refcounts = Refcounts::open(&*storage, header, |at, count| metadata.add(at, count))?;
    let snapshots = Snapshots::read(&*storage, header)?;
    metadata.add(snapshots.at, clusters(snapshots.len))?;
    for table in &snapshots.tables {
        metadata.add(table.at, clusters(u64::from(table.entries) * 8))?;
    }
    let bitmaps = Bitmaps::open(&*storage, header, |at, count| metadata.add(at, count))?;
    let limit = Refcounts::limit(geometry, header.refcount_width());
    let core = Core {
        claims: Claims::default(),
        journal,
        allocator: Allocator::new(geometry, storage.len()?, limit, !keeps_freed),
        metadata,
        dirty: BTreeMap::new(),
        freed: Vec::new(),
        packing: Packing::default(),
        batch: Arc::default(),
        settled: 0,
    };
    let writer = Writer {
        core: Mutex::new(core),
        flushes: Mutex::new(Flushes::new(Work::new(refcounts, header.l1, header.l1_entries))),
        sealed: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        bitmaps,
        packer: Mutex::new(Packer::new(header.refcount_width())),
        growing: Mutex::new(()),
        keeps_freed,
    };
    let image = assemble(parts, header, geometry, u64::MAX, Some(writer))?;
    image.0.add_tables()?;
    if let Some(writer) = &image.0.writer {
        writer.with_work(|work| work.reserve(&image.0, writer, geometry));
    }
    let left = image.0.replay_journal().context(|| "read what the journal holds")?;
    // Nothing was written so far: an image that fails a check stays as it is.
    image.0.make_writable(header)?;
    image.0.finish_journal(left).context(|| "finish what the journal holds")?;
    Ok(image)
}

impl Inner {
    /// Writes what an image that is being written has to say of itself.
    fn make_writable(&self, header: &Header) -> Result<()> {
        // QEMU may leave the last cluster of a file short. From now on files are as long as their clusters.
        let len = self.storage.len()?;
        if !self.geometry.is_aligned(len) {
            self.storage.set_len(len.next_multiple_of(self.geometry.cluster_size()))?;
        }
        if self.geometry.external && self.data.len()? < header.capacity {
            self.data.set_len(header.capacity)?;
        }
        if header.autoclear != header.kept_autoclear() {
            // "May only write to an image with unknown auto-clear features if it clears the respective bits": what they
            // vouch for would not know of our writes. It must not be vouched for after a power loss either.
            header_update::write_autoclear(&*self.storage, header.kept_autoclear())?;
            self.storage.sync()?;
        }
        let bitmaps = self.writer.as_ref().and_then(|writer| writer.bitmaps.as_ref());
        bitmaps.map_or(Ok(()), |bitmaps| bitmaps.begin(&*self.storage))
    }

    /// Tells the set of metadata of the L2 tables.
    fn add_tables(&self) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        let mut core = writer.core();
        let l1 = self.mapping.l1();
        l1.iter().filter_map(|entry| entry.table()).try_for_each(|at| core.metadata.add(at, 1))
    }
}
