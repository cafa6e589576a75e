//! Small files that must never be half written, and facts of the host.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use block::{Context, Error, ErrorKind, Result};

/// Replaces the file at `path` by `bytes`, mode 0600, so that after a crash it is the old one or the new one, whole.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().map(ToOwned::to_owned).unwrap_or_default();
    name.push(".new");
    let new = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().context(|| format!("replace {}", path.display()))?;
    sync_dir(parent(path)?)
}

/// Removes a file, for good: its absence survives a crash. That it is gone already is fine.
pub fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::from(error).context(format!("remove {}", path.display()))),
        Ok(()) => sync_dir(parent(path)?),
    }
}

/// Makes the names in a folder durable.
pub fn sync_dir(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).context(|| format!("sync {}", folder.display()))
}

/// Names this boot of the host; what is only in the page cache lives as long as it.
pub fn boot_id() -> Result<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").context(|| "read the host's boot id")?;
    Ok(id.trim().to_owned())
}

/// Bytes that an ordinary user can still write to the file system of `path`.
pub fn free_space(path: &Path) -> Result<u64> {
    let found = rustix::fs::statvfs(path).map_err(std::io::Error::from);
    let found = found.context(|| format!("look for free space at {}", path.display()))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// The folder that a file is in.
pub(crate) fn parent(path: &Path) -> Result<&Path> {
    match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(folder) => Ok(folder),
        None => Err(Error::new(ErrorKind::InvalidInput, format!("{} has no folder", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaced_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest.json");
        replace_file(&path, b"one").unwrap();
        replace_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        remove_file(&path).unwrap();
        remove_file(&path).unwrap();
        assert!(!path.exists());
    }
}
