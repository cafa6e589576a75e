//! The files that images of users name in their headers: found, judged, and only then opened.
//!
//! An image that somebody else made may name any file of the host. So a name is followed to the file that it means,
//! symbolic links and all, and that file must lie below a folder that the operator allows. Nothing is opened before
//! that is known: to open a device may already do something. Formats are never guessed, for a guest can write into a
//! raw image what looks like the header of another format.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Context, Error, ErrorKind, Layer, RawDisk, Result, Stack, Storage};
use hostio::{Cache, HostFile, Open};
use qcow2::{Header, Image, Mode, Parts};

use crate::layer::FROZEN_TABLE_BYTES;

/// How many files a base image may lead to: backing files, theirs, and data files.
const MAX_FILES: usize = 1024;

/// Below which folders the files may lie that images name.
#[derive(Clone, Debug, Default)]
pub struct AllowedFolders(Vec<PathBuf>);

impl AllowedFolders {
    /// These folders, or single files, as they are now: links in their paths are followed here, and once. If there are
    /// none, an image may name files below its own folder, but no devices.
    pub fn new(folders: &[PathBuf]) -> Result<Self> {
        let real = |folder: &PathBuf| {
            folder.canonicalize().context(|| format!("the allowed folder {}", folder.display()))
        };
        Ok(Self(folders.iter().map(real).collect::<Result<_>>()?))
    }

    /// The file that the image `by` means by `name`, if it may be opened.
    fn find(&self, by: &Path, name: &str) -> Result<Place> {
        // As QEMU tells the two apart: a protocol ends in a colon before any slash.
        if name.split('/').next().is_some_and(|first| first.contains(':')) {
            let story = "it is not a plain file name, but one with a protocol";
            return Err(Error::new(ErrorKind::Unsupported, story));
        }
        let path = folder_of(by).join(name).canonicalize()?;
        self.check(by, &path)?;
        let metadata = path.metadata()?;
        self.check_kind(&metadata)?;
        Ok(Place { identity: (metadata.dev(), metadata.ino()), path })
    }

    /// Whether a file lies where the image `by` may name it.
    fn check(&self, by: &Path, file: &Path) -> Result<()> {
        let own = match self.0.is_empty() {
            true => Some(folder_of(by).canonicalize()?),
            false => None,
        };
        if self.0.iter().chain(&own).any(|folder| file.starts_with(folder)) {
            return Ok(());
        }
        let story = format!(
            "{} is not below a folder where images may name files: move it there, or allow its folder \
             (allow-folder)",
            file.display()
        );
        Err(Error::new(ErrorKind::InvalidInput, story))
    }

    fn check_kind(&self, metadata: &Metadata) -> Result<()> {
        let kind = metadata.file_type();
        let story = if kind.is_file() {
            return Ok(());
        } else if kind.is_block_device() {
            if !self.0.is_empty() {
                return Ok(());
            }
            "it is a block device, which images may only name where the operator says so (allow-folder)"
        } else if kind.is_dir() {
            "it is a directory"
        } else if kind.is_fifo() {
            "it is a FIFO"
        } else if kind.is_char_device() {
            "it is a character device"
        } else {
            "it is neither a regular file nor a block device"
        };
        Err(Error::new(ErrorKind::InvalidInput, story))
    }
}

/// A file that may be opened.
struct Place {
    path: PathBuf,
    /// Its device and number there: the same by whatever name.
    identity: (u64, u64),
}

fn folder_of(image: &Path) -> &Path {
    image.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What has been opened for one base image.
struct Search<'a> {
    folders: &'a AllowedFolders,
    cache: Cache,
    /// All files so far.
    seen: Vec<(u64, u64)>,
}

impl Search<'_> {
    /// Opens the file that the image `by` means by `name`.
    fn open(&mut self, by: &Path, name: &str, writable: bool) -> Result<(PathBuf, Arc<HostFile>)> {
        let place = self.folders.find(by, name)?;
        if self.seen.contains(&place.identity) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "it is a loop: the file is part of the chain already",
            ));
        }
        if self.seen.len() > MAX_FILES {
            let story = format!("the chain has more than {MAX_FILES} files");
            return Err(Error::new(ErrorKind::Unsupported, story));
        }
        self.seen.push(place.identity);
        let file = HostFile::open(&place.path, Open { writable, cache: self.cache })?;
        // Somebody may have put another one there since it was judged.
        self.folders.check(by, &file.real_path()?)?;
        Ok((place.path, Arc::new(file)))
    }

    /// Opens the backing file that the header of the image `by` names, if it names one.
    fn backing_file(
        &mut self,
        by: &Path,
        header: &Header,
    ) -> Result<Option<(PathBuf, Arc<HostFile>, Format)>> {
        let Some(name) = &header.backing_file else { return Ok(None) };
        let story = || format!("{}: its backing file '{name}'", by.display());
        let format = format_of(header.backing_format.as_deref()).context(story)?;
        let (path, file) = self.open(by, name, false).context(story)?;
        Ok(Some((path, file, format)))
    }

    /// Opens the external data file that the header of the image `by` names, if it has one.
    fn data_file(&mut self, by: &Path, header: &Header, writable: bool) -> Result<Option<Arc<HostFile>>> {
        if !header.has_data_file {
            return Ok(None);
        }
        let nameless = || format!("{}: its header does not name its data file", by.display());
        let name = header.data_file.as_ref().ok_or_else(|| Error::new(ErrorKind::Corrupt, nameless()))?;
        let opened = self.open(by, name, writable);
        let (_, file) = opened.context(|| format!("{}: its data file '{name}'", by.display()))?;
        Ok(Some(file))
    }
}

#[derive(Clone, Copy)]
enum Format {
    Raw,
    Qcow2,
}

/// The files that a base image names, open.
pub(crate) struct Named {
    /// The images beneath it, the lowest first.
    pub(crate) layers: Vec<Arc<dyn Layer>>,
    /// The file that has its data, if that is not the image itself.
    pub(crate) data_file: Option<Arc<HostFile>>,
}

/// An image that was found beneath the base.
struct Found {
    path: PathBuf,
    file: Arc<HostFile>,
    format: Format,
    data_file: Option<Arc<HostFile>>,
}

/// Opens what the header of the qcow2 base image `base`, which is open as `storage`, names, and what the images beneath it
/// name; for reading all but the base's own data file, which is opened as the base was.
pub(crate) fn open_named(
    base: &Path,
    storage: &dyn Storage,
    folders: &AllowedFolders,
    how: Open,
) -> Result<Named> {
    let metadata = base.metadata().context(|| format!("open {}", base.display()))?;
    let mut search = Search { folders, cache: how.cache, seen: vec![(metadata.dev(), metadata.ino())] };
    let header = header_of(base, storage)?;
    let data_file = search.data_file(base, &header, how.writable)?;
    let mut chain = Vec::new();
    let mut next = search.backing_file(base, &header)?;
    while let Some((path, file, format)) = next.take() {
        let mut data_file = None;
        if let Format::Qcow2 = format {
            let header = header_of(&path, &*file)?;
            data_file = search.data_file(&path, &header, false)?;
            next = search.backing_file(&path, &header)?;
        }
        chain.push(Found { path, file, format, data_file });
    }
    Ok(Named { layers: open_chain(chain)?, data_file })
}

fn header_of(image: &Path, storage: &dyn Storage) -> Result<Header> {
    Header::read(storage).context(|| format!("open {}", image.display()))
}

/// Opens the images, the lowest of which comes last, each over those beneath it.
fn open_chain(chain: Vec<Found>) -> Result<Vec<Arc<dyn Layer>>> {
    let mut stack = Arc::new(Stack::new(Vec::new(), 0));
    for Found { path, file, format, data_file } in chain.into_iter().rev() {
        let layer: Arc<dyn Layer> = match format {
            Format::Raw => Arc::new(RawDisk::new(file, true)?),
            Format::Qcow2 => {
                let parts = Parts {
                    storage: file,
                    data_file: data_file.map(|file| file as _),
                    backing: Some(Arc::clone(&stack) as _),
                    cache_bytes: FROZEN_TABLE_BYTES,
                };
                let image = Image::open(parts, Mode::ReadOnly);
                Arc::new(image.context(|| format!("open {}", path.display()))?)
            }
        };
        stack = Arc::new(stack.with_layer(layer));
    }
    Ok(stack.layers())
}

fn format_of(stated: Option<&str>) -> Result<Format> {
    match stated {
        Some("raw") => Ok(Format::Raw),
        Some("qcow2") => Ok(Format::Qcow2),
        Some(other) => {
            Err(Error::new(ErrorKind::Unsupported, format!("it has the format '{other}', not raw or qcow2")))
        }
        None => {
            let story = "its format is not stated: state it with `qemu-img rebase -u -F FORMAT -b FILE`";
            Err(Error::new(ErrorKind::Unsupported, story))
        }
    }
}

#[cfg(test)]
mod tests;
