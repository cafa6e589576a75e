//! Layers: the images of a chain, opened.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

use arc_swap::ArcSwap;
use block::{
    ByteRange, Context, Disk, Error, ErrorKind, Extent, Flush, RawDisk, Result, Run, Stack, Storage,
    WriteGuard,
};
use hostio::{Cache, HostFile};
use qcow2::Image;
use tracing::warn;

use crate::backing::{self, AllowedFolders};
use crate::journals::{FailureNote, JournalFolder};
use crate::manifest::LayerEntry;
use crate::model::ImageFormat;

/// So many changes of an image's tables may wait for a guest's flush, before they are written out without one: the
/// bound of the journal's size and of the time to replay it. A guest that flushes never gets there.
pub(crate) const MAX_PENDING: usize = 16 * 1024;

/// Bytes of its tables that a layer beneath the active one keeps in memory: what is found in it is in the stack's map,
/// and there may be many layers.
pub(crate) const FROZEN_TABLE_BYTES: u64 = 0;

/// The same of a layer that a job writes to.
pub(crate) const JOB_TABLE_BYTES: u64 = 1 << 20;

/// What a disk's metadata cache is where nobody says otherwise, in bytes.
pub const DEFAULT_METADATA_CACHE: u64 = 64 << 20;

/// Bytes that the map of a snapshot that is read takes at most, for all who read it.
const MAX_VIEW_BYTES: u64 = 16 << 20;

/// How long images are waited for that another process has: one that was killed holds them, locks and all, until the
/// kernel has ended what its io_urings had in flight, some time after the process itself is gone.
pub(crate) const LET_GO: Duration = Duration::from_secs(1);

/// Between two looks at them.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How the images of a disk are opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opening {
    /// The way of data I/O.
    pub(crate) cache: Cache,
    /// Bytes of memory for what is known of where the disk's bytes are.
    pub(crate) metadata_cache: u64,
}

impl Opening {
    /// For work on a chain that is not served.
    pub(crate) const OFFLINE: Self = Self { cache: Cache::Writeback, metadata_cache: DEFAULT_METADATA_CACHE };

    /// The share of the stack's map.
    pub(crate) fn map_bytes(self) -> u64 {
        self.metadata_cache / 2
    }

    /// What the map of each snapshot that is read may take besides, as long as it is read.
    pub(crate) fn view_bytes(self) -> u64 {
        self.map_bytes().min(MAX_VIEW_BYTES)
    }

    /// The share of the active image's own tables.
    pub(crate) fn table_bytes(self) -> u64 {
        self.metadata_cache - self.map_bytes()
    }
}

/// One image of a chain.
///
/// As a disk and a layer it shows whatever is open of it now: a job that writes to it opens the image once more, for
/// writing, and everybody who has this layer reads it through that from then on.
///
/// Stacks of the layers above it hold it, and it holds the one of those beneath it. No layer is the last to hold another
/// while it is dropped itself, however long the chain is: see [`Stack`].
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) entry: LayerEntry,
    open: ArcSwap<Open>,
    /// All that is beneath it; the image reads through it.
    beneath: Arc<Stack>,
    /// A sync of it has failed, which is final: what a later one would say of the same bytes means nothing.
    failed: AtomicBool,
}

/// An image that is open.
#[derive(Debug)]
struct Open {
    files: Files,
    content: Content,
    /// Where it is noted if a sync fails; `None` where nothing is written.
    note: Option<FailureNote>,
}

/// The files of an image.
#[derive(Clone, Debug)]
struct Files {
    image: Arc<HostFile>,
    /// Where its data is, if that is not in the image.
    data: Option<Arc<HostFile>>,
}

impl Files {
    fn forbid_writers(&self) {
        self.image.forbid_writers();
        self.data.iter().for_each(|data| data.forbid_writers());
    }
}

#[derive(Debug)]
enum Content {
    Raw(Arc<RawDisk>),
    Qcow2(Arc<Image>),
}

/// What a layer is opened over.
#[derive(Clone)]
pub(crate) enum Beneath<'a> {
    /// The layers of the chain.
    Layers(Arc<Stack>),
    /// Nothing but what the image, a chain's base, names in its header, as far as these folders allow.
    Named(&'a AllowedFolders),
}

/// What a layer is opened for.
pub(crate) enum Access<'a> {
    /// To be read, beneath others.
    Read,
    /// To be the active layer of a disk that is only read.
    ReadActive,
    /// To be the active layer, with its journal in this folder.
    Write {
        /// The state directory's folder of journals.
        journals: &'a JournalFolder,
    },
    /// To be written by a job, beneath others that read it.
    Job {
        /// The state directory's folder of journals.
        journals: &'a JournalFolder,
    },
}

impl<'a> Access<'a> {
    fn is_writing(&self) -> bool {
        self.journals().is_some()
    }

    fn journals(&self) -> Option<&'a JournalFolder> {
        match self {
            Self::Write { journals } | Self::Job { journals } => Some(journals),
            Self::Read | Self::ReadActive => None,
        }
    }
}

impl Layer {
    /// Opens the image of `entry` over what is beneath it. What a base image names in its header is opened too,
    /// read-only.
    pub(crate) fn open(
        id: &str,
        entry: &LayerEntry,
        beneath: Beneath<'_>,
        how: Opening,
        access: Access<'_>,
    ) -> Result<Self> {
        let open_how = hostio::Open { writable: access.is_writing(), cache: how.cache };
        let file = Arc::new(HostFile::open(&entry.path, open_how)?);
        // Before its header is believed.
        let failure = failure::find(id, entry, &file, &access)?;
        let (beneath, data_file) = match (beneath, entry.format) {
            (Beneath::Layers(stack), _) => (stack, None),
            (Beneath::Named(_), ImageFormat::Raw) => {
                (Arc::new(Stack::new(Vec::new(), how.map_bytes())), None)
            }
            (Beneath::Named(folders), ImageFormat::Qcow2) => {
                let named = backing::open_named(&entry.path, &*file, folders, open_how)?;
                (Arc::new(Stack::new(named.layers, how.map_bytes())), named.data_file)
            }
        };
        let table_bytes = match access {
            Access::Read => FROZEN_TABLE_BYTES,
            _ => how.table_bytes(),
        };
        if let (Some(_), Some(data)) = (&failure, &data_file) {
            data.forget_cached()?;
        }
        let files = Files { image: file, data: data_file };
        let open = Open::new(id, entry, files, Arc::clone(&beneath), table_bytes, access)?;
        if let Some(note) = failure {
            note.remove()?;
        }
        let failed = AtomicBool::new(false);
        Ok(Self { entry: entry.clone(), open: ArcSwap::from_pointee(open), beneath, failed })
    }

    /// The stack for an overlay on this layer. The layer may be written until that is first read.
    pub(crate) fn stack(self: &Arc<Self>) -> Stack {
        self.beneath.with_layer(Arc::clone(self) as _)
    }

    /// The disk as this layer shows it, with a map of its own of so many bytes: for who reads a snapshot, and with none for
    /// a layer on this one while this one is being written.
    pub(crate) fn view(self: &Arc<Self>, map_bytes: u64) -> Stack {
        let own = Arc::clone(self) as Arc<dyn block::Layer>;
        Stack::new(self.beneath.layers().into_iter().chain([own]).collect(), map_bytes)
    }

    /// What is beneath it.
    pub(crate) fn beneath(&self) -> &Stack {
        &self.beneath
    }

    /// The backing files of its own that it has as a chain's base. Only an image that a user gave has any.
    pub(crate) fn own_backing(&self) -> Vec<Arc<dyn block::Layer>> {
        if self.entry.number == 0 { self.beneath.layers() } else { Vec::new() }
    }

    /// Opens the image once more, to be written: by a job, beneath the chain that reads it, and then what is written must
    /// not change what is read through the layers above; or as the active layer. Nothing changes if it is open for writing
    /// already.
    ///
    /// Errors: [`ErrorKind::Busy`] while another program reads the image, [`ErrorKind::Latched`] once a sync of it has failed.
    pub(crate) fn begin_writing(&self, id: &str, table_bytes: u64, access: Access<'_>) -> Result<()> {
        if self.has_failed() {
            let path = self.entry.path.display();
            let story = format!("a sync of {path} has failed: nothing more is written to it until a restart");
            return Err(Error::new(ErrorKind::Latched, story));
        }
        if !self.disk().read_only() {
            return Ok(());
        }
        let before = self.open.load().files.clone();
        let reopen = |file: &HostFile| file.reopen_for_writing().map(Arc::new);
        let open = reopen(&before.image).and_then(|image| {
            let data = before.data.as_deref().map(reopen).transpose()?;
            let files = Files { image, data };
            let opened = self.reopened(id, files.clone(), table_bytes, access);
            opened.inspect_err(|_| {
                self.failed.fetch_or(files.sync_has_failed(), Ordering::AcqRel);
                // Before the new handles are closed.
                before.forbid_writers();
            })
        })?;
        self.open.store(Arc::new(open));
        Ok(())
    }

    fn reopened(&self, id: &str, files: Files, table_bytes: u64, access: Access<'_>) -> Result<Open> {
        let open = Open::new(id, &self.entry, files, Arc::clone(&self.beneath), table_bytes, access)?;
        match open.disk().capacity() == self.disk().capacity() {
            true => Ok(open),
            false => {
                let story = format!("{} has been resized by somebody", self.entry.path.display());
                Err(Error::new(ErrorKind::Unsupported, story))
            }
        }
    }

    /// The image as a disk, with all that is beneath it.
    pub(crate) fn disk(&self) -> Arc<dyn Disk> {
        self.open.load().disk()
    }

    /// The image, if it is one that knows which ranges are its own.
    pub(crate) fn image(&self) -> Option<Arc<Image>> {
        match &self.open.load().content {
            Content::Raw(_) => None,
            Content::Qcow2(image) => Some(Arc::clone(image)),
        }
    }

    /// No write is resolved from now on. Constant time, for it is called inside the cut.
    pub(crate) fn seal(&self) {
        match &self.open.load().content {
            Content::Raw(disk) => disk.seal(),
            Content::Qcow2(image) => image.seal(),
        }
    }

    /// Lets go of what only a writer needs, once the image is sealed and flushed: it is opened again, for reading. Where
    /// that fails it stays open as it is, which only costs memory.
    pub(crate) fn settle(&self, id: &str) {
        let sealed = self.open.load_full();
        if !sealed.disk().read_only() {
            // A job has begun to write to it.
            return;
        }
        let (files, beneath) = (sealed.files.clone(), Arc::clone(&self.beneath));
        match Open::new(id, &self.entry, files, beneath, FROZEN_TABLE_BYTES, Access::Read) {
            // Unless one has begun meanwhile.
            Ok(open) => drop(self.open.compare_and_swap(&sealed, Arc::new(open))),
            Err(error) => warn!(%error, "a layer that is sealed stays open for writing"),
        }
    }

    /// What a job wrote and could not be synced is not seen any more: the tables count as they are in the file, and nothing in
    /// them names bytes that may be lost. All that the journal has is the job's.
    pub(crate) fn forsake(&self, id: &str, journals: &JournalFolder) -> Result<()> {
        journals.void(id, self.entry.number)?;
        let files = self.open.load().files.clone();
        let beneath = Arc::clone(&self.beneath);
        let open = Open::new(id, &self.entry, files, beneath, FROZEN_TABLE_BYTES, Access::Read)?;
        self.open.store(Arc::new(open));
        Ok(())
    }

    /// Makes the image of the active layer larger, by zeroes; durable when it returns.
    pub(crate) fn grow(&self, capacity: u64) -> Result<()> {
        let open = self.open.load_full();
        let grown = match &open.content {
            Content::Raw(disk) => disk.grow(capacity),
            Content::Qcow2(image) => image.grow(capacity),
        };
        grown.inspect_err(|_| self.note_failure()).context(|| format!("grow {}", self.entry.path.display()))
    }

    /// Syncs all of it to stable storage, and once it is sealed, saves what it carries besides.
    pub(crate) fn flush(&self) -> Result<()> {
        let path = self.entry.path.display();
        if self.has_failed() {
            return Err(Error::new(ErrorKind::Latched, format!("an earlier sync of {path} failed")));
        }
        let flushed = self.disk().flush().run().inspect_err(|_| self.note_failure());
        flushed.context(|| format!("flush {path}"))?;
        self.close();
        Ok(())
    }

    /// Saves the dirty bitmaps of an image that is sealed and flushed. Where that fails they stay marked as in use, and
    /// nobody trusts them again, as with QEMU: the disk's bytes are safe, and a guest need not hear of it.
    pub(crate) fn close(&self) {
        let image = self.image().filter(|image| image.read_only());
        if let Some(Err(error)) = image.map(|image| image.close()) {
            warn!(%error, image = %self.entry.path.display(), "the image's dirty bitmaps are lost");
        }
    }

    /// Lets QEMU's tools read the image, now that it is sealed and flushed.
    pub(crate) fn share(&self) -> Result<()> {
        let files = self.open.load().files.clone();
        files.data.map_or(Ok(()), |data| data.downgrade()).and(files.image.downgrade())
    }

    /// Changes of its tables that are not on stable storage yet.
    pub(crate) fn pending(&self) -> usize {
        self.image().map_or(0, |image| image.pending())
    }

    /// Bytes that it takes on the host.
    pub(crate) fn allocated(&self) -> Result<u64> {
        let files = self.open.load().files.clone();
        Ok(files.image.allocated()? + files.data.map_or(Ok(0), |data| data.allocated())?)
    }

    /// Its host file, for its size and its holes.
    pub(crate) fn storage(&self) -> Arc<HostFile> {
        Arc::clone(&self.open.load().files.image)
    }
}

impl block::Layer for Layer {
    fn run_at(&self, range: ByteRange) -> Result<Run> {
        self.open.load().layer().run_at(range)
    }

    fn data(&self) -> Arc<dyn Storage> {
        self.open.load().layer().data()
    }

    fn forget(&self) {
        self.open.load().layer().forget();
    }
}

impl Disk for Layer {
    fn capacity(&self) -> u64 {
        self.open.load().layer().capacity()
    }

    fn read_only(&self) -> bool {
        self.open.load().layer().read_only()
    }

    fn discard_granularity(&self) -> u32 {
        self.open.load().layer().discard_granularity()
    }

    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        self.open.load().layer().resolve_read(range, out)
    }

    fn resolve_write(
        &self,
        range: ByteRange,
        waker: &Waker,
        out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>> {
        self.open.load().layer().resolve_write(range, waker, out)
    }

    fn discard(&self, range: ByteRange, waker: &Waker) -> Poll<Result<()>> {
        self.open.load().layer().discard(range, waker)
    }

    fn write_zeroes(&self, range: ByteRange, unmap: bool, waker: &Waker) -> Poll<Result<()>> {
        self.open.load().layer().write_zeroes(range, unmap, waker)
    }

    fn flush(&self) -> Box<dyn Flush> {
        self.open.load().layer().flush()
    }
}

mod failure;
#[cfg(test)]
pub(crate) mod faulty;
mod open;
