//! The header of an image, which names the one beneath it. Frazil does not go by these names: QEMU's tools do.

use std::path::Path;
use std::sync::Arc;

use block::{Context, Disk, Error, ErrorKind, Result};
use hostio::Writing;

use crate::layer::Layer;

/// The right to change what a layer's image names. The caller has the right to change chains.
pub(crate) struct Naming {
    layer: Arc<Layer>,
    /// `None` where the layer is open for writing.
    turn: Option<Writing>,
}

impl Naming {
    /// Of a layer of a chain; [`ErrorKind::Busy`] while another program has its image open.
    pub(crate) fn begin(layer: Arc<Layer>) -> Result<Self> {
        let turn = Disk::read_only(&*layer).then(|| Writing::begin(layer.storage())).transpose()?;
        Ok(Self { layer, turn })
    }

    /// Of a job's own target, which nobody else has open.
    pub(crate) fn of_own(layer: Arc<Layer>) -> Self {
        Self { layer, turn: None }
    }

    /// The image.
    pub(crate) fn path(&self) -> &Path {
        &self.layer.entry.path
    }

    /// Writes the name and the format of the image beneath, or that there is none; durable when it returns.
    pub(crate) fn write(&self, names: Option<(&str, &str)>) -> Result<()> {
        let written = match (&self.turn, self.layer.image()) {
            (Some(turn), _) => qcow2::set_backing(turn.file(), names),
            (None, Some(image)) if !image.read_only() => {
                image.set_backing(names).inspect_err(|_| self.layer.note_failure())
            }
            // The job's own target, which nobody writes to any more.
            (None, _) => qcow2::set_backing(&*self.layer.storage(), names),
        };
        written.context(|| format!("change the header of {}", self.path().display()))
    }
}

/// Whether `name`, in the header of `image`, means the file at `beneath`: relative to the image's folder, as QEMU's tools
/// take it. [`ErrorKind::InvalidInput`] if not.
pub(crate) fn check(image: &Path, name: &str, beneath: &Path) -> Result<()> {
    let folder = image.parent().unwrap_or(Path::new("/"));
    // What could be a protocol is one to QEMU, unless a slash is before it.
    let is_plain = name.split_once(':').is_none_or(|(before, _)| before.contains('/'));
    let found = folder.join(name).canonicalize();
    match found.is_ok_and(|found| is_plain && beneath.canonicalize().is_ok_and(|beneath| found == beneath)) {
        true => Ok(()),
        false => {
            let story = format!(
                "'{name}' is not what is beneath {}: that is {}, and only its name can be changed",
                image.display(),
                beneath.display()
            );
            Err(Error::new(ErrorKind::InvalidInput, story))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_must_mean_the_image_beneath() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        std::fs::create_dir(path("sub")).unwrap();
        for name in ["base", "other", "a:b"] {
            std::fs::write(path(name), name).unwrap();
        }
        std::os::unix::fs::symlink(path("base"), path("sub/link")).unwrap();
        let whole = path("base").display().to_string();
        for name in ["base", "./base", "sub/../base", "sub/link", &whole] {
            check(&path("top"), name, &path("base")).unwrap();
        }
        for name in ["", "other", "missing", "json:{}", "file:base", "sub"] {
            let error = check(&path("top"), name, &path("base")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{name}");
        }
        check(&path("top"), "./a:b", &path("a:b")).unwrap();
        check(&path("top"), "a:b", &path("a:b")).unwrap_err();
    }
}
