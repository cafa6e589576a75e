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
        // By what they are, for a folder can be mounted at another place too.
        let own = folder.metadata().context(|| format!("look at {}", folder.display()))?;
        let is_own = |above: &Path| above.metadata().is_ok_and(|found| is_same(&found, &own));
        if let Some(other) = place.ancestors().find(|above| is_state(above) && !is_own(above)) {
            let story = format!(
                "{} is in {}, the state directory of another daemon: choose another file",
                path.display(),
                other.display()
            );
            return Err(Error::new(ErrorKind::InvalidInput, story));
        }
        if place.ancestors().any(is_own) || linked.is_some_and(|found| holds(&folder, &found, DEPTH)) {
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

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Whether a folder is the state directory of a daemon, whichever.
fn is_state(folder: &Path) -> bool {
    folder.join("manifest.json").is_file() && folder.join("journal").is_dir()
}

/// Whether a folder holds this file under another name.
fn holds(folder: &Path, wanted: &Metadata, depth: usize) -> bool {
    let Ok(entries) = folder.read_dir() else { return false };
    entries.flatten().any(|entry| match entry.metadata() {
        Ok(found) if found.is_dir() => depth > 0 && holds(&entry.path(), wanted, depth - 1),
        Ok(found) => is_same(&found, wanted),
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

    #[test]
    fn another_daemons_state_directory_is_known_by_what_is_in_it() {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let own = Own(folder.path().to_owned());
        let target = other.path().join("layers/target");
        std::fs::write(other.path().join("manifest.json"), "{}").unwrap();
        std::fs::create_dir(other.path().join("layers")).unwrap();
        own.check(&target).unwrap();
        std::fs::create_dir(other.path().join("journal")).unwrap();
        for _ in 0..2 {
            assert!(own.check(&target).unwrap_err().to_string().contains("of another daemon"));
            std::fs::write(&target, "").unwrap();
        }
    }

    #[test]
    #[ignore = "needs root, to mount a folder once more"]
    fn a_folder_that_is_mounted_at_another_place_is_the_same() {
        let (folder, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir(folder.path().join("layers")).unwrap();
        let run = |program: &str, words: &[&Path]| {
            let done = std::process::Command::new(program).args(words).output().unwrap();
            assert!(done.status.success(), "are you root? {done:?}");
        };
        run("mount", &[Path::new("--bind"), folder.path(), place.path()]);
        let checked = Own(folder.path().to_owned()).check(&place.path().join("layers/target"));
        run("umount", &[place.path()]);
        assert!(checked.unwrap_err().to_string().contains("is in the state directory"));
    }
}
