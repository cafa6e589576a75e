//! The daemon's own files, to which no client may have anything written.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use block::{Context, Error, ErrorKind, Result};

/// Folders below the state directory that are looked into.
const DEPTH: usize = 4;

/// The state directory. Images in it are locked while they are served; its other files, the manifest and journals say, are
/// not, and whoever empties one of them loses disks.
#[derive(Debug, Default)]
pub(super) struct Own(pub(super) PathBuf);

impl Own {
    /// Refuses a file to write to that is in the state directory, by whatever name, or would be.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let folder = self.0.canonicalize().context(|| format!("look at {}", self.0.display()))?;
        let place = match path.canonicalize() {
            Ok(place) => place,
            // One that is to be made, or can not be opened either.
            Err(_) => {
                match std::path::absolute(path).ok().and_then(|path| path.parent()?.canonicalize().ok()) {
                    Some(parent) => parent,
                    None => return Ok(()),
                }
            }
        };
        let is_linked = |found: &Metadata| found.is_file() && found.nlink() > 1;
        let linked = path.metadata().ok().filter(is_linked);
        if place.starts_with(&folder) || linked.is_some_and(|found| holds(&folder, &found, DEPTH)) {
            let story = format!(
                "{} is in the state directory {}: choose another file",
                path.display(),
                folder.display()
            );
            return Err(Error::new(ErrorKind::InvalidInput, story));
        }
        Ok(())
    }
}

/// Whether a folder holds this file under another name.
fn holds(folder: &Path, wanted: &Metadata, depth: usize) -> bool {
    let Ok(entries) = folder.read_dir() else { return false };
    entries.flatten().any(|entry| match entry.metadata() {
        Ok(found) if found.is_dir() => depth > 0 && holds(&entry.path(), wanted, depth - 1),
        Ok(found) => (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()),
        Err(_) => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_to_be_made_where_the_daemon_runs_is_known_by_its_folder() {
        let name = Path::new("not-there-yet");
        assert_eq!(Own(".".into()).check(name).unwrap_err().kind(), ErrorKind::InvalidInput);
        let elsewhere = tempfile::tempdir().unwrap();
        Own(elsewhere.path().to_owned()).check(name).unwrap();
    }
}
