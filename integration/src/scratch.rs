use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{Context, Result};

/// A folder for one test's images, sockets and logs: removed after a success, kept and named after a failure.
#[derive(Debug)]
pub struct Scratch {
    folder: Option<TempDir>,
}

impl Scratch {
    /// Runs `body` with a new folder.
    ///
    /// # Errors
    /// Those of `body`, and failures to make the folder.
    pub fn with<T>(name: &str, body: impl FnOnce(&Scratch) -> Result<T>) -> Result<T> {
        Self::with_in(&std::env::temp_dir(), name, body)
    }

    /// As [`Scratch::with`], but the folder is made in `parent`.
    ///
    /// # Errors
    /// As for [`Scratch::with`].
    pub fn with_in<T>(parent: &Path, name: &str, body: impl FnOnce(&Scratch) -> Result<T>) -> Result<T> {
        let folder = tempfile::Builder::new()
            .prefix(&format!("frazil-{name}-"))
            .tempdir_in(parent)
            .context("temporary folder")?;
        let mut scratch = Self { folder: Some(folder) };
        let value = body(&scratch)?;
        // Reached only without an error and without a panic; the drop below keeps the folder otherwise.
        drop(scratch.folder.take());
        Ok(value)
    }

    /// A file of that name in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.as_ref().map_or(Path::new(""), TempDir::path).join(name)
    }

    /// Makes a file of `bytes` bytes without any content.
    pub fn sparse_file(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.path(name);
        let file = std::fs::File::create(&path).context(path.display())?;
        file.set_len(bytes).context(path.display())?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(folder) = self.folder.take() {
            eprintln!("logs and images kept in {}", folder.keep().display());
        }
    }
}
