//! Layers: the images of a chain, opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Poll, Waker};

use arc_swap::ArcSwap;
use block::{
    ByteRange, Context, Disk, Error, ErrorKind, Extent, Flush, RawDisk, Result, Run, Storage, WriteGuard,
};
use hostio::{Cache, HostFile};
use qcow2::{Header, Image, Journal, Mode};

use crate::manifest::LayerEntry;
use crate::model::ImageFormat;

/// So many changes of an image's tables may wait for a guest's flush, before they are written out without one: the
/// bound of the journal's size and of the time to replay it. A guest that flushes never gets there.
pub(crate) const MAX_PENDING: usize = 16 * 1024;

/// How many images deep the base image that the user gave may be.
const MAX_BASE_DEPTH: usize = 64;

/// One image of a chain.
///
/// As a disk and a layer it shows whatever is open of it now: a job that writes to it opens the image once more, for
/// writing, and everybody who has this layer reads it through that from then on.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) entry: LayerEntry,
    open: ArcSwap<Open>,
}

/// An image that is open.
#[derive(Debug)]
struct Open {
    file: Arc<HostFile>,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Raw(Arc<RawDisk>),
    Qcow2(Arc<Image>),
}

/// What a layer is opened for.
pub(crate) enum Access<'a> {
    /// To be read, beneath others.
    Read,
    /// To be the active layer, with its journal in this folder.
    Write {
        /// The state directory's folder of journals.
        journals: &'a JournalFolder,
    },
}

impl Layer {
    /// Opens the image of `entry` on top of `backing`, which is `None` for the base: what a base image names in its
    /// header as its own backing file is opened too, read-only.
    pub(crate) fn open(
        id: &str,
        entry: &LayerEntry,
        backing: Option<Arc<dyn Disk>>,
        cache: Cache,
        access: Access<'_>,
    ) -> Result<Self> {
        let writable = matches!(access, Access::Write { .. });
        let file = Arc::new(HostFile::open(&entry.path, hostio::Open { writable, cache })?);
        let open = Open::new(id, entry, file, backing, access)?;
        Ok(Self { entry: entry.clone(), open: ArcSwap::from_pointee(open) })
    }

    /// Opens the image once more, for a job to write to it beneath the chain that reads it. Nothing changes if it is open
    /// for writing already. What the job writes must not change what is read through the layers above.
    ///
    /// Errors: [`ErrorKind::Busy`] while another program reads the image.
    #[allow(dead_code, reason = "the jobs that follow call it")]
    pub(crate) fn begin_writing(
        &self,
        id: &str,
        backing: Option<Arc<dyn Disk>>,
        journals: &JournalFolder,
    ) -> Result<()> {
        if !self.disk().read_only() {
            return Ok(());
        }
        let file = Arc::new(self.storage().reopen_for_writing()?);
        let open = Open::new(id, &self.entry, file, backing, Access::Write { journals })?;
        if open.disk().capacity() != self.disk().capacity() {
            let story = format!("{} has been resized by somebody", self.entry.path.display());
            return Err(Error::new(ErrorKind::Unsupported, story));
        }
        self.open.store(Arc::new(open));
        Ok(())
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

    /// Syncs all of it to stable storage.
    pub(crate) fn flush(&self) -> Result<()> {
        let what = || format!("flush {}", self.entry.path.display());
        self.disk().flush().run().context(what)
    }

    /// Lets QEMU's tools read the image, now that it is sealed and flushed.
    pub(crate) fn share(&self) -> Result<()> {
        self.storage().downgrade()
    }

    /// Changes of its tables that are not on stable storage yet.
    pub(crate) fn pending(&self) -> usize {
        self.image().map_or(0, |image| image.pending())
    }

    /// Its host file, for its size and its holes.
    pub(crate) fn storage(&self) -> Arc<HostFile> {
        Arc::clone(&self.open.load().file)
    }
}

impl Open {
    fn new(
        id: &str,
        entry: &LayerEntry,
        file: Arc<HostFile>,
        backing: Option<Arc<dyn Disk>>,
        access: Access<'_>,
    ) -> Result<Self> {
        let content = match entry.format {
            ImageFormat::Raw => {
                let read_only = matches!(access, Access::Read);
                Content::Raw(Arc::new(RawDisk::new(Arc::clone(&file) as _, read_only)?))
            }
            ImageFormat::Qcow2 => {
                let backing = match backing {
                    None => open_own_backing(&entry.path, &*file, 0)?,
                    some => some,
                };
                let mode = match access {
                    Access::Read => Mode::ReadOnly,
                    Access::Write { journals } => Mode::Writable(journals.open(id, entry.number)?),
                };
                let image = Image::open(Arc::clone(&file) as _, backing, mode);
                Content::Qcow2(Arc::new(image.context(|| format!("open {}", entry.path.display()))?))
            }
        };
        Ok(Self { file, content })
    }

    fn disk(&self) -> Arc<dyn Disk> {
        match &self.content {
            Content::Raw(disk) => Arc::clone(disk) as _,
            Content::Qcow2(image) => Arc::clone(image) as _,
        }
    }

    fn layer(&self) -> &dyn block::Layer {
        match &self.content {
            Content::Raw(disk) => &**disk,
            Content::Qcow2(image) => &**image,
        }
    }
}

impl block::Layer for Layer {
    fn run_at(&self, range: ByteRange) -> Result<Run> {
        self.open.load().layer().run_at(range)
    }

    fn data(&self) -> Arc<dyn Storage> {
        self.open.load().layer().data()
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

/// The backing file that the header of the base image `path` names, and those beneath it.
fn open_own_backing(path: &Path, storage: &dyn Storage, depth: usize) -> Result<Option<Arc<dyn Disk>>> {
    let header = Header::read(storage).context(|| format!("open {}", path.display()))?;
    let Some(name) = header.backing_file else { return Ok(None) };
    let refuse = |story: String| Error::new(ErrorKind::Unsupported, format!("{}: {story}", path.display()));
    if depth == MAX_BASE_DEPTH {
        return Err(refuse(format!("its chain of backing files is longer than {MAX_BASE_DEPTH}, or a loop")));
    }
    if name.contains(':') {
        return Err(refuse(format!("its backing file '{name}' is not a plain file name")));
    }
    let backing = path.parent().unwrap_or(Path::new("")).join(&name);
    let file = Arc::new(HostFile::open(&backing, hostio::Open { writable: false, cache: Cache::Writeback })?);
    let disk: Arc<dyn Disk> = match header.backing_format.as_deref() {
        Some("raw") => Arc::new(RawDisk::new(file, true)?),
        Some("qcow2") => {
            let beneath = open_own_backing(&backing, &*file, depth + 1)?;
            Arc::new(Image::open(file, beneath, Mode::ReadOnly)?)
        }
        Some(other) => {
            return Err(refuse(format!("its backing file has the format '{other}', not raw or qcow2")));
        }
        None => {
            let story = "its header does not state the format of its backing file; \
                         state it with `qemu-img rebase -u -F FORMAT -b FILE`";
            return Err(refuse(story.to_owned()));
        }
    };
    Ok(Some(disk))
}

/// Where the journals of writable qcow2 images are.
#[derive(Clone, Debug)]
pub(crate) struct JournalFolder {
    /// The folder.
    pub(crate) path: PathBuf,
    /// The boot of the host; a journal of another boot is void.
    pub(crate) boot_id: String,
}

impl JournalFolder {
    fn files(&self, id: &str, number: u32) -> [PathBuf; 2] {
        ["a", "b"].map(|half| self.path.join(format!("{id}-{number:06}.{half}")))
    }

    fn open(&self, id: &str, number: u32) -> Result<Journal> {
        let open = |path: PathBuf| -> Result<Arc<dyn Storage>> {
            let how = hostio::Open { writable: true, cache: Cache::Writeback };
            let file = match HostFile::create(&path, Cache::Writeback) {
                Err(_) if path.exists() => HostFile::open(&path, how)?,
                created => created?,
            };
            Ok(Arc::new(file))
        };
        let [a, b] = self.files(id, number);
        Journal::open(open(a)?, open(b)?, &self.boot_id)
    }

    /// Takes the journal of a layer away that has been sealed and flushed, or that is no more.
    pub(crate) fn remove(&self, id: &str, number: u32) -> Result<()> {
        self.files(id, number).iter().try_for_each(|path| hostio::remove_file(path))
    }
}
