//! Layers: the images of a chain, opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Context, Disk, Error, ErrorKind, RawDisk, Result, Storage};
use hostio::{Cache, HostFile, Open};
use qcow2::{Header, Image, Journal, Mode};

use crate::manifest::LayerEntry;
use crate::model::ImageFormat;

/// So many changes of an image's tables may wait for a guest's flush, before they are written out without one: the
/// bound of the journal's size and of the time to replay it. A guest that flushes never gets there.
pub(crate) const MAX_PENDING: usize = 16 * 1024;

/// How many images deep the base image that the user gave may be.
const MAX_BASE_DEPTH: usize = 64;

/// One image of a chain.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) entry: LayerEntry,
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
        let file = Arc::new(HostFile::open(&entry.path, Open { writable, cache })?);
        let content = match entry.format {
            ImageFormat::Raw => Content::Raw(Arc::new(RawDisk::new(Arc::clone(&file) as _, !writable)?)),
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
        Ok(Self { entry: entry.clone(), file, content })
    }

    /// The layer as a disk, with all that is beneath it.
    pub(crate) fn disk(&self) -> Arc<dyn Disk> {
        match &self.content {
            Content::Raw(disk) => Arc::clone(disk) as _,
            Content::Qcow2(image) => Arc::clone(image) as _,
        }
    }

    /// The image, if it is one that knows which ranges are its own.
    pub(crate) fn image(&self) -> Option<&Image> {
        match &self.content {
            Content::Raw(_) => None,
            Content::Qcow2(image) => Some(image),
        }
    }

    /// No write is resolved from now on. Constant time, for it is called inside the cut.
    pub(crate) fn seal(&self) {
        match &self.content {
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
        self.file.downgrade()
    }

    /// Changes of its tables that are not on stable storage yet.
    pub(crate) fn pending(&self) -> usize {
        self.image().map_or(0, Image::pending)
    }

    /// Its host file, for its size and its holes.
    pub(crate) fn storage(&self) -> &HostFile {
        &self.file
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
    let file = Arc::new(HostFile::open(&backing, Open { writable: false, cache: Cache::Writeback })?);
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
            let how = Open { writable: true, cache: Cache::Writeback };
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
