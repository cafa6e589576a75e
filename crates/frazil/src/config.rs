//! What `frazil serve` is told: the same words as flags or as one TOML file.
//!
//! Both ways end in one [`Config`], whose paths are absolute: those of flags start from the working directory, those
//! of a file from the file's own folder, so that a unit file and a shell mean the same thing.

mod disk;
mod file;
mod metrics;
mod mistake;
mod words;

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use snapshot::{FreezeOwner, FreezePolicy};

pub(crate) use disk::{DiskConfig, parse as parse_disk};
pub(crate) use file::read;
pub(crate) use metrics::{MetricsAddress, parse as parse_metrics};
use mistake::MAX_SOCKET_PATH;
pub(crate) use mistake::Mistake;
pub(crate) use words::{SandboxMode, Word, parser as word};

/// Everything that `frazil serve` needs to know.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Config {
    /// The state directory: manifest, thaw-owed record, and overlays that have no better place.
    pub(crate) state: PathBuf,
    /// Where QMP clients connect.
    pub(crate) control: PathBuf,
    /// The guest agent's socket, which need not exist yet.
    pub(crate) agent: Option<PathBuf>,
    /// Who freezes the guest.
    pub(crate) freeze_owner: FreezeOwner,
    /// The policy of a snapshot that states none.
    pub(crate) freeze: FreezePolicy,
    /// Whether the guest writes out its dirty memory before it is frozen, where that can be had.
    pub(crate) pre_sync: bool,
    /// Below which folders the files may lie that base images name; below the image's own folder if there are none.
    pub(crate) allow_folders: Vec<PathBuf>,
    /// Folders besides its own where clients may have it write: of backups, exports and NBD sockets.
    pub(crate) target_folders: Vec<PathBuf>,
    /// Folders of certificates that clients may have it read.
    pub(crate) tls_folders: Vec<PathBuf>,
    /// What it keeps itself from.
    pub(crate) sandbox: SandboxMode,
    /// Where metrics are served, if anywhere.
    pub(crate) metrics: Option<MetricsAddress>,
    /// The ids of the users who may connect to the Unix sockets; whoever can open them if there are none.
    pub(crate) users: Vec<u32>,
    /// The disks, at least one.
    pub(crate) disks: Vec<DiskConfig>,
}

impl Config {
    /// The same with paths that start from `base`.
    pub(crate) fn based_on(mut self, base: &Path) -> io::Result<Self> {
        let absolute = |path: &mut PathBuf| -> io::Result<()> {
            *path = std::path::absolute(base.join(&path))?;
            Ok(())
        };
        absolute(&mut self.state)?;
        absolute(&mut self.control)?;
        self.agent.as_mut().map_or(Ok(()), absolute)?;
        let folders = self.allow_folders.iter_mut().chain(&mut self.target_folders);
        folders.chain(&mut self.tls_folders).try_for_each(absolute)?;
        if let Some(MetricsAddress::Unix(path)) = &mut self.metrics {
            absolute(path)?;
        }
        for disk in &mut self.disks {
            absolute(&mut disk.path)?;
            absolute(&mut disk.socket)?;
        }
        Ok(self)
    }

    /// What no single key can tell: names and paths that must differ, and words that contradict each other.
    pub(crate) fn check(&self) -> Result<(), Mistake> {
        match (self.freeze, self.freeze_owner) {
            (FreezePolicy::Require, FreezeOwner::None) => return Err(Mistake::RequireWithoutOwner),
            (FreezePolicy::Require, FreezeOwner::Frazil) if self.agent.is_none() => {
                return Err(Mistake::RequireWithoutAgent);
            }
            _ => {}
        }
        for (at, disk) in self.disks.iter().enumerate() {
            let Some(earlier) = self.disks.get(..at) else { continue };
            if earlier.iter().any(|other| other.id == disk.id) {
                return Err(Mistake::SharedId { id: disk.id.clone() });
            }
        }
        self.check_paths()
    }

    /// Every socket is its own and fits the kernel; an image is shared only by disks that all only read it.
    fn check_paths(&self) -> Result<(), Mistake> {
        let mut seen: Vec<(&Path, String, bool)> = Vec::new();
        for (path, owner, shareable) in self.paths() {
            let shared = seen.iter().find(|(other, _, also)| *other == path && !(shareable && *also));
            if let Some((_, first, _)) = shared {
                return Err(Mistake::SharedPath {
                    path: path.to_owned(),
                    first: first.clone(),
                    second: owner,
                });
            }
            seen.push((path, owner, shareable));
        }
        let sockets = self.disks.iter().map(|disk| ("socket", disk.socket.as_os_str()));
        let agent = self.agent.iter().map(|agent| ("agent", agent.as_os_str()));
        let metrics = self.metrics_socket().map(|path| ("metrics", path.as_os_str()));
        std::iter::once(("control", self.control.as_os_str()))
            .chain(metrics)
            .chain(agent)
            .chain(sockets)
            .try_for_each(|(key, path)| check_socket(key, path))
    }

    fn paths(&self) -> impl Iterator<Item = (&Path, String, bool)> {
        let agent = self.agent.iter().map(|path| (path.as_path(), "agent".to_owned(), false));
        let disks = self.disks.iter().flat_map(|disk| {
            [
                (disk.path.as_path(), format!("path of disk {}", disk.id), disk.readonly),
                (disk.socket.as_path(), format!("socket of disk {}", disk.id), false),
            ]
        });
        let metrics = self.metrics_socket().map(|path| (path, "metrics".to_owned(), false));
        let control = (self.control.as_path(), "control".to_owned(), false);
        std::iter::once(control).chain(metrics).chain(agent).chain(disks)
    }

    fn metrics_socket(&self) -> Option<&Path> {
        match &self.metrics {
            Some(MetricsAddress::Unix(path)) => Some(path),
            _ => None,
        }
    }
}

fn check_socket(key: &str, path: &OsStr) -> Result<(), Mistake> {
    match path.len() {
        0..=MAX_SOCKET_PATH => Ok(()),
        len => Err(Mistake::LongSocket { key: key.to_owned(), len }),
    }
}

#[cfg(test)]
mod tests;
