//! Syncs that failed: what the next process has to know of them, and what it does.

use std::sync::atomic::Ordering;

use block::Result;
use hostio::HostFile;
use tracing::{error, info};

use super::{Access, Content, Files, Layer};
use crate::journals::FailureNote;
use crate::manifest::LayerEntry;

impl Layer {
    /// Whether a sync of it has failed, which is final.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// To be called when it could not be flushed, before anybody is told: if that is final, the next process has to know. What
    /// failed for want of room may be done later.
    pub(crate) fn note_failure(&self) {
        let open = self.open.load();
        let has_failed = match &open.content {
            Content::Raw(disk) => disk.has_failed(),
            Content::Qcow2(image) => image.has_failed(),
        };
        if !has_failed || self.has_failed() {
            return;
        }
        error!(
            image = %self.entry.path.display(),
            "a sync has failed: what was written since the last one may be lost, and nothing more is written to this image \
             until a restart"
        );
        leave(open.note.as_ref());
        self.failed.store(true, Ordering::Release);
    }
}

impl Files {
    pub(super) fn sync_has_failed(&self) -> bool {
        self.image.sync_has_failed() || self.data.as_ref().is_some_and(|data| data.sync_has_failed())
    }
}

/// Where the process before this one could not sync an image, what is left is what the disk has, as after a loss of power; the
/// caller has a data file of its forgotten too. The note of it, to be taken away once the image is open.
pub(super) fn find(
    id: &str,
    entry: &LayerEntry,
    image: &HostFile,
    access: &Access<'_>,
) -> Result<Option<FailureNote>> {
    let Some(journals) = access.journals() else { return Ok(None) };
    let note = journals.failure_note(id, entry.number);
    if !note.is_there()? {
        return Ok(None);
    }
    info!(image = %entry.path.display(), "a sync of it had failed: it is taken as it is on the disk");
    image.forget_cached()?;
    // It may name what is lost.
    journals.void(id, entry.number)?;
    Ok(Some(note))
}

pub(super) fn leave(note: Option<&FailureNote>) {
    if let Some(Err(error)) = note.map(FailureNote::leave) {
        error!(%error, "the next process will not know that a sync has failed: restart the host instead");
    }
}

#[cfg(test)]
mod tests;
