//! Backing files of images that users gave: found, judged and opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Context, Error, ErrorKind, Layer, RawDisk, Result, Stack, Storage};
use hostio::{Cache, HostFile, Open};
use qcow2::{Header, Image, Mode};

/// How many images deep the base image that the user gave may be.
const MAX_DEPTH: usize = 1024;

/// The images beneath the base image `path`, the lowest first, as their headers name them.
pub(crate) fn open_own(path: &Path, storage: &dyn Storage) -> Result<Vec<Arc<dyn Layer>>> {
    let mut files = Vec::new();
    let mut next = named(path, storage)?;
    while let Some((path, format)) = next {
        if files.len() == MAX_DEPTH {
            let story = format!("{}: more than {MAX_DEPTH} backing files, or a loop", path.display());
            return Err(Error::new(ErrorKind::Unsupported, story));
        }
        let file = Arc::new(HostFile::open(&path, Open { writable: false, cache: Cache::Writeback })?);
        next = match format {
            Format::Raw => None,
            Format::Qcow2 => named(&path, &*file)?,
        };
        files.push((file, format));
    }
    let mut stack = Stack::new(Vec::new(), 0);
    for (file, format) in files.into_iter().rev() {
        let layer: Arc<dyn Layer> = match format {
            Format::Raw => Arc::new(RawDisk::new(file, true)?),
            Format::Qcow2 => {
                let beneath = Arc::new(Stack::new(stack.layers(), 0));
                Arc::new(Image::open(file, Some(beneath), Mode::ReadOnly)?)
            }
        };
        stack = stack.with_layer(layer);
    }
    Ok(stack.layers())
}

#[derive(Clone, Copy)]
enum Format {
    Raw,
    Qcow2,
}

/// The backing file that the header of the image `path` names, and its format.
fn named(path: &Path, storage: &dyn Storage) -> Result<Option<(PathBuf, Format)>> {
    let header = Header::read(storage).context(|| format!("open {}", path.display()))?;
    let Some(name) = header.backing_file else { return Ok(None) };
    let refuse = |story: String| Error::new(ErrorKind::Unsupported, format!("{}: {story}", path.display()));
    if name.contains(':') {
        return Err(refuse(format!("its backing file '{name}' is not a plain file name")));
    }
    let format = match header.backing_format.as_deref() {
        Some("raw") => Format::Raw,
        Some("qcow2") => Format::Qcow2,
        Some(other) => {
            return Err(refuse(format!("its backing file has the format '{other}', not raw or qcow2")));
        }
        None => {
            let story = "its header does not state the format of its backing file; \
                         state it with `qemu-img rebase -u -F FORMAT -b FILE`";
            return Err(refuse(story.to_owned()));
        }
    };
    Ok(Some((path.parent().unwrap_or(Path::new("")).join(&name), format)))
}
