//! Notes of hosted jobs under way, in the state directory: such a job ends with the daemon, and if that was killed, it is the
//! next one that says which job came to nothing, and what is not whole for it.
//!
//! Nothing of it is synced: a small backup takes less time than that would.

use std::fs;
use std::io::ErrorKind;
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
        fs::write(&note.0, text).context(|| format!("write {}", note.0.display()))?;
        Ok(note)
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                warn!(%error, "the next start will say that a job was cut short which was not");
            }
            _ => {}
        }
    }
}

/// Tells of the jobs that an earlier run left, in the log, and forgets them.
pub(crate) fn tell(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).context(|| format!("read {}", folder.display()))? {
        let path = entry.context(|| format!("read {}", folder.display()))?.path();
        let note =
            fs::read(&path).map_or(Value::Null, |text| serde_json::from_slice(&text).unwrap_or_default());
        // Else it was killed while it wrote this: the job had not begun.
        if let (Some(job), Some(makes)) = (note["id"].as_str(), note["makes"].as_str()) {
            warn!(job, makes, "the daemon ended during this job, which is not gone on with: it is not whole");
        }
        if let Err(error) = fs::remove_file(&path) {
            warn!(path = %path.display(), %error, "a note of a job can not be removed");
        }
    }
    Ok(())
}
