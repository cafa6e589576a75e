//! Opening: reading what is there, and finishing what a killed process left in its journal.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use block::{Context, Disk, Error, ErrorKind, Result, Storage};

use crate::alloc::{Allocator, Refcounts};
use crate::check::repair;
use crate::entry::Home;
use crate::flush::Flushes;
use crate::header::Header;
use crate::header_update::write_autoclear;
use crate::image::{Core, Image, Inner, Mode, Writer};
use crate::journal::{Journal, Record};
use crate::metadata::Metadata;
use crate::pending::Claims;
use crate::table::Tables;

impl Image {
    /// Opens the image in `storage` over `backing`, which the caller has found and opened: the header's name of it is
    /// not looked at.
    ///
    /// For writing, what the journal holds is first written into the image and synced, and the journal is emptied;
    /// this may take as long as a flush. Reading an image whose journal was never written out (a layer whose process
    /// was killed) would miss the last writes: open it for writing first.
    ///
    /// Errors: as [`Header::read`]; [`ErrorKind::Unsupported`] if it can be read but not written.
    pub fn open(storage: Arc<dyn Storage>, backing: Option<Arc<dyn Disk>>, mode: Mode) -> Result<Self> {
        let header = Header::read(&*storage)?;
        if header.has_data_file {
            return Err(Error::new(ErrorKind::Unsupported, "qcow2 images with an external data file"));
        }
        match mode {
            Mode::ReadOnly => open_read_only(storage, backing, &header),
            Mode::Writable(journal) => {
                let header = repaired(&*storage, header)?;
                open_writable(storage, backing, &header, journal)
            }
        }
    }
}

fn open_read_only(
    storage: Arc<dyn Storage>,
    backing: Option<Arc<dyn Disk>>,
    header: &Header,
) -> Result<Image> {
    let tables = Tables::open(&*storage, header.geometry(), header.l1, None)?;
    let readable = storage.len()?;
    let geometry = header.geometry();
    Ok(Image(Arc::new(Inner { storage, backing, geometry, tables, l1: header.l1, readable, writer: None })))
}

/// The header of the image, once its refcounts are true. If its last writer counted lazily and was killed, they are
/// repaired first, which takes a look at all of its tables.
fn repaired(storage: &dyn Storage, header: Header) -> Result<Header> {
    header.check_writable()?;
    if !header.is_dirty() {
        return Ok(header);
    }
    repair(storage, &header).context(|| "the image was not closed cleanly")?;
    Header::read(storage)
}

fn open_writable(
    storage: Arc<dyn Storage>,
    backing: Option<Arc<dyn Disk>>,
    header: &Header,
    journal: Journal,
) -> Result<Image> {
    let geometry = header.geometry();
    let mut metadata = Metadata::new(geometry);
    let l1_clusters = (geometry.tables() * 8).div_ceil(geometry.cluster_size());
    metadata.add(header.l1, l1_clusters)?;
    let refcounts = Refcounts::open(&*storage, header, &mut metadata)?;
    let tables = Tables::open(&*storage, geometry, header.l1, Some(metadata))?;
    let file_len = storage.len()?;
    if !geometry.is_aligned(file_len) {
        // QEMU may leave the last cluster short; from now on the file is as long as its clusters.
        storage.set_len(file_len.next_multiple_of(geometry.cluster_size()))?;
    }
    if header.autoclear != 0 {
        // "Software that does not know the meaning of such a bit clears it when it writes": what the bits vouch for
        // (persistent bitmaps) would not know of our writes. It must not be vouched for after a power loss either.
        write_autoclear(&*storage, 0)?;
        storage.sync()?;
    }
    let allocator = Allocator::new(geometry, file_len, &refcounts);
    let core = Core { claims: Claims::default(), journal, dirty: BTreeMap::new(), unflushed: 0 };
    let writer = Writer {
        allocator,
        core: Mutex::new(core),
        flushes: Mutex::new(Flushes::new(refcounts)),
        sealed: AtomicBool::new(false),
        failed: AtomicBool::new(false),
    };
    let (l1, readable, writer) = (header.l1, u64::MAX, Some(writer));
    let image = Image(Arc::new(Inner { storage, backing, geometry, tables, l1, readable, writer }));
    image.recover().context(|| "finish what the journal holds")?;
    Ok(image)
}

impl Image {
    /// Applies the journal to the tables in RAM, and flushes them.
    fn recover(&self) -> Result<()> {
        let Some(writer) = &self.0.writer else { return Ok(()) };
        {
            let mut core = writer.core();
            let Core { journal, dirty, .. } = &mut *core;
            journal.replay(|record| {
                let state = self.0.replay(writer, record)?;
                dirty.insert(record.cluster, state);
                Ok(())
            })?;
        }
        if !self.is_clean() {
            self.flush().run()?;
        }
        writer.core().journal.clear()
    }
}

impl Inner {
    fn replay(&self, writer: &Writer, record: Record) -> Result<crate::entry::State> {
        let wrong =
            |why: &str| Error::new(ErrorKind::Corrupt, format!("the journal is not this image's: {why}"));
        if record.cluster.0 >= self.geometry.clusters() {
            return Err(wrong("a cluster past the end"));
        }
        let entry = self.tables.entry_for_write(&*self.storage, record.cluster)?;
        let home = entry.home();
        if record.host.0 != 0 {
            let countable = writer.allocator.skip(record.host);
            let holds_data = record.state.allocated() != 0;
            if !countable || !self.tables.can_be_data(record.host, holds_data) {
                return Err(wrong("data where it can have none"));
            }
            if home.is_none() {
                entry.set_home(Home::fresh(record.host));
            } else if home.offset()? != record.host {
                return Err(wrong("a cluster is elsewhere"));
            }
        }
        let valid = if self.geometry.extended { u32::MAX } else { 1 };
        let state = entry.state().join(record.state);
        if (state.allocated() | state.zero()) & !valid != 0
            || (state.allocated() != 0 && entry.home().is_none())
        {
            return Err(wrong("an impossible state"));
        }
        entry.set_state(state);
        Ok(state)
    }
}
