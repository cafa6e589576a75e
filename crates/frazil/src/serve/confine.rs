//! The daemon's own sandbox: which part of the file system it needs, and what clients are told of it.

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use block::{Context, Error, ErrorKind, Result};
use hostio::{Confined, Held, Reach, Sandbox, confine};
use tracing::{info, warn};

use crate::config::{Config, MetricsAddress, SandboxMode};

/// What the daemon is kept from.
#[derive(Debug, Default)]
pub(super) struct Confinement {
    pub(super) state: Confined,
    /// Where clients may have it work; `None` if that is everywhere.
    folders: Option<Vec<Folder>>,
}

/// A folder, or a single file, that the kernel lets the daemon use. It knows it by what was there at the start, not by
/// its name.
#[derive(Debug)]
struct Folder {
    /// All links followed.
    path: PathBuf,
    /// Its device and inode; `None` if it was not there.
    was: Option<(u64, u64)>,
}

impl Folder {
    fn new(path: &Path) -> Self {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        Self { was: identity(&path), path }
    }

    /// Whether it is still the one that was there.
    fn is_known(&self) -> bool {
        self.was.is_some() && self.was == identity(&self.path)
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    path.metadata().ok().map(|found| (found.dev(), found.ino()))
}

impl Confinement {
    /// Confines the process, which has one thread, for good. What the kernel lacks is told in the log.
    pub(super) fn begin(config: &Config) -> Result<Self> {
        let (landlock, filter) = match config.sandbox {
            SandboxMode::Off => {
                warn!("there is no sandbox: the configuration turned it off");
                return Ok(Self::default());
            }
            SandboxMode::On => (true, true),
            SandboxMode::Landlock => (true, false),
            SandboxMode::Seccomp => (false, true),
        };
        let reach = reach(config);
        let folders: Vec<_> = reach.own.iter().map(|path| Folder::new(path)).collect();
        for missing in config.target_folders.iter().filter(|folder| !folder.exists()) {
            let folder = missing.display();
            warn!(
                "the target folder {folder} is not there: once it is, the daemon must be started again to use it"
            );
        }
        let sandbox = Sandbox { reach: landlock.then_some(reach), filter };
        let state = confine(&sandbox).context(|| "begin the sandbox")?;
        state.complaints.iter().for_each(|complaint| warn!("{complaint}; the daemon runs without it"));
        info!(landlock = ?state.landlock, seccomp = ?state.seccomp, "sandbox");
        let held = matches!(state.landlock, Held::Full | Held::Partial);
        Ok(Self { state, folders: held.then_some(folders) })
    }

    /// Whether a client may name this file, which need not be there yet. The kernel refuses it in any case: this is to
    /// say so in words.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let Some(folders) = &self.folders else { return Ok(()) };
        let path = std::path::absolute(path)?;
        let found = path.canonicalize().or_else(|_| path.parent().unwrap_or(Path::new("/")).canonicalize());
        // A folder that is not there is told by whoever needs it.
        let Ok(found) = found else { return Ok(()) };
        let named: Vec<_> = folders.iter().filter(|folder| found.starts_with(&folder.path)).collect();
        let path = path.display();
        let story = match named.first() {
            _ if named.iter().any(|folder| folder.is_known()) => return Ok(()),
            Some(folder) => format!(
                "{path} lies in {}, which was made or mounted after this daemon was started: start it again, which \
                 guests do not notice",
                folder.path.display()
            ),
            None => format!(
                "{path} lies outside of the folders that this daemon may use: name its folder in target-folders \
                 (--target-folder) when it is started"
            ),
        };
        Err(Error::new(ErrorKind::InvalidInput, story))
    }
}

/// The folders of images and sockets, the state directory, and those that the operator lists.
fn reach(config: &Config) -> Reach {
    // It is made here, for what is not there can not be allowed; what may be wrong with it is told when it is opened.
    let _ = DirBuilder::new().recursive(true).mode(0o700).create(&config.state);
    let mut own = vec![config.state.clone()];
    for disk in &config.disks {
        own.extend(folder_of(&disk.socket));
        match disk.path.metadata() {
            // Its overlays are in the state directory.
            Ok(found) if found.file_type().is_block_device() => own.push(disk.path.clone()),
            // They are beside it, by whichever name.
            _ => {
                own.extend(folder_of(&disk.path));
                own.extend(disk.path.canonicalize().ok().as_deref().and_then(folder_of));
            }
        }
    }
    own.extend(folder_of(&config.control));
    if let Some(MetricsAddress::Unix(path)) = &config.metrics {
        own.extend(folder_of(path));
    }
    own.extend(config.target_folders.iter().cloned());
    Reach { own, existing: config.allow_folders.clone() }
}

fn folder_of(path: &Path) -> Option<PathBuf> {
    path.parent().map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_elsewhere_is_refused_in_words_that_name_the_key() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let folders = Some(vec![Folder::new(inside.path())]);
        let confinement = Confinement { state: Confined::default(), folders };
        confinement.check(&inside.path().join("new")).unwrap();
        std::os::unix::fs::symlink(outside.path(), inside.path().join("link")).unwrap();
        for path in [outside.path().join("new"), inside.path().join("link/new"), inside.path().join("../x")] {
            let error = confinement.check(&path).unwrap_err();
            assert!(error.to_string().contains("--target-folder"), "{}: {error}", path.display());
        }
        Confinement::default().check(&outside.path().join("new")).unwrap();
    }

    /// The kernel goes by what was there when the rules were made, and says no more than "Permission denied".
    #[test]
    fn a_folder_that_has_come_since_is_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("backup");
        let check = |folders| Confinement { state: Confined::default(), folders }.check(&folder.join("x"));
        let early = Some(vec![Folder::new(&folder)]);
        std::fs::create_dir(&folder).unwrap();
        assert!(check(early).unwrap_err().to_string().contains("start it again"));
        let known = || Some(vec![Folder::new(&folder)]);
        check(known()).unwrap();
        let before = known();
        std::fs::rename(&folder, root.path().join("old")).unwrap();
        std::fs::create_dir(&folder).unwrap();
        assert!(check(before).unwrap_err().to_string().contains("start it again"));
    }
}
