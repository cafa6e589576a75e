//! The daemon's own sandbox: which part of the file system it needs, and what clients are told of it.

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use backup::TlsCredentials;
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
    /// Where clients may have it read certificates, besides.
    readable: Vec<Folder>,
    /// Whether the kernel keeps it there, too.
    held: bool,
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
        let known = |paths: &[PathBuf]| paths.iter().map(|path| Folder::new(path)).collect::<Vec<_>>();
        let (folders, readable) = (known(&reach.own), known(&reach.readable));
        let named = config.target_folders.iter().chain(&config.tls_folders);
        for missing in named.filter(|folder| !folder.exists()) {
            let folder = missing.display();
            warn!("the folder {folder} is not there: once it is, the daemon must be started again to use it");
        }
        let sandbox = Sandbox { reach: landlock.then_some(reach), filter };
        let state = confine(&sandbox).context(|| "begin the sandbox")?;
        state.complaints.iter().for_each(|complaint| warn!("{complaint}; the daemon runs without it"));
        info!(landlock = ?state.landlock, seccomp = ?state.seccomp, "sandbox");
        state.missing.iter().for_each(|what| warn!("this kernel's Landlock leaves open: {what}"));
        let held = matches!(state.landlock, Held::Full | Held::Partial);
        Ok(Self { state, folders: landlock.then_some(folders), readable, held })
    }

    /// Whether a client may name this file, which need not be there yet. Where Landlock is in force the kernel refuses it in
    /// any case, and this is to say so in words; where it is not, this is all that refuses it.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        match &self.folders {
            Some(folders) => self.look_for(path, folders.iter(), "target-folders (--target-folder)"),
            None => Ok(()),
        }
    }

    /// The same of certificates: their folder, and where its files are if they are links.
    pub(super) fn check_certificates(&self, credentials: &TlsCredentials) -> Result<()> {
        let Some(folders) = &self.folders else { return Ok(()) };
        let check = |path: &Path| {
            self.look_for(path, folders.iter().chain(&self.readable), "tls-folders (--tls-folder)")
        };
        check(&credentials.dir)?;
        for file in credentials.files() {
            // What is not there, or leads nowhere, is told by whoever reads it.
            let Ok(real) = file.canonicalize() else { continue };
            check(&real).context(|| format!("{} is a link, or its folder is", file.display()))?;
        }
        Ok(())
    }

    fn look_for<'a>(
        &'a self,
        path: &Path,
        folders: impl Iterator<Item = &'a Folder>,
        key: &str,
    ) -> Result<()> {
        let path = std::path::absolute(path)?;
        let found = path.canonicalize().or_else(|_| path.parent().unwrap_or(Path::new("/")).canonicalize());
        // A folder that is not there is told by whoever needs it.
        let Ok(found) = found else { return Ok(()) };
        let named: Vec<_> = folders.filter(|folder| found.starts_with(&folder.path)).collect();
        let path = path.display();
        let story = match named.first() {
            _ if named.iter().any(|folder| folder.is_known() || !self.held) => return Ok(()),
            Some(folder) => format!(
                "{path} lies in {}, which was made or mounted after this daemon was started: start it again, which \
                 guests do not notice",
                folder.path.display()
            ),
            None => format!(
                "{path} lies outside of the folders that this daemon may use: name its folder in {key} when it is \
                 started"
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
    Reach { own, existing: config.allow_folders.clone(), readable: config.tls_folders.clone() }
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
        let confinement = Confinement { folders, ..Confinement::default() };
        confinement.check(&inside.path().join("new")).unwrap();
        std::os::unix::fs::symlink(outside.path(), inside.path().join("link")).unwrap();
        for path in [outside.path().join("new"), inside.path().join("link/new"), inside.path().join("../x")] {
            let error = confinement.check(&path).unwrap_err();
            assert!(error.to_string().contains("--target-folder"), "{}: {error}", path.display());
        }
        Confinement::default().check(&outside.path().join("new")).unwrap();
    }

    #[test]
    fn certificates_may_be_links_to_where_they_may_be_read() {
        let [own, pki, archive] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
        std::fs::write(archive.path().join("key"), "").unwrap();
        std::os::unix::fs::symlink(archive.path().join("key"), pki.path().join("server-key.pem")).unwrap();
        let check = |readable: &[&tempfile::TempDir]| {
            let folders = Some(vec![Folder::new(own.path())]);
            let readable = readable.iter().map(|folder| Folder::new(folder.path())).collect();
            let confinement = Confinement { folders, readable, held: true, ..Confinement::default() };
            confinement.check(&pki.path().join("out")).unwrap_err();
            let credentials = TlsCredentials { id: "t".into(), dir: pki.path().into(), verify_peer: true };
            confinement.check_certificates(&credentials).map_err(|error| error.to_string())
        };
        let outside = check(&[]).unwrap_err();
        assert!(
            outside.contains("--tls-folder") && outside.contains(pki.path().to_str().unwrap()),
            "{outside}"
        );
        let link = check(&[&pki]).unwrap_err();
        assert!(link.contains("server-key.pem is a link") && link.contains("--tls-folder"), "{link}");
        check(&[&pki, &archive]).unwrap();
    }

    /// The kernel goes by what was there when the rules were made, and says no more than "Permission denied".
    #[test]
    fn a_folder_that_has_come_since_is_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("backup");
        let check =
            |folders| Confinement { folders, held: true, ..Confinement::default() }.check(&folder.join("x"));
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
