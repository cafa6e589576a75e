//! Notes of hosted jobs under way, in the state directory: such a job ends with the daemon, and if that was killed, it is the
//! next one that says which job came to nothing, and what is not whole for it.

use std::fs;
use std::path::{Path, PathBuf};

use block::{Context, Result};
use serde_json::{Value, json};
use tracing::warn;

/// Behind a job's id, which is made of letters, digits, `-`, `.` and `_`.
const SUFFIX: &str = ".job";

/// There as long as this is.
#[derive(Debug)]
pub(super) struct Note(PathBuf);

impl Note {
    /// Notes that this job is about to make what is told in these words.
    pub(super) fn leave(folder: &Path, id: &str, makes: &str) -> Result<Self> {
        let text = json!({ "id": id, "makes": makes }).to_string() + "\n";
        let note = Self(folder.join(id.to_owned() + SUFFIX));
        hostio::replace_file(&note.0, text.as_bytes())?;
        Ok(note)
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        if let Err(error) = hostio::remove_file(&self.0) {
            warn!(%error, "the next start will say that a job was cut short which was not");
        }
    }
}

/// Tells of the jobs that an earlier run left, in the log, and forgets them.
pub(crate) fn tell(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        // One that was killed while it was written: the job had not begun.
        if path.to_string_lossy().ends_with(SUFFIX) {
            let note: Value = serde_json::from_slice(&fs::read(&path)?).unwrap_or_default();
            let word = |key: &str| note[key].as_str().unwrap_or("unknown").to_owned();
            let (job, makes) = (word("id"), word("makes"));
            warn!(job, makes, "the daemon ended during this job, which is not gone on with: it is not whole");
        }
        hostio::remove_file(&path)?;
    }
    Ok(())
}
