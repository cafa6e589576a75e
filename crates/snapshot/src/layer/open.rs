//! Opening an image, and what is open of it.

use std::sync::Arc;

use block::{Context, Disk, RawDisk, Result, Stack};
use qcow2::{Image, Mode, Parts};

use super::{Access, Content, Files, Open, failure};
use crate::manifest::LayerEntry;
use crate::model::ImageFormat;

impl Open {
    pub(super) fn new(
        id: &str,
        entry: &LayerEntry,
        files: Files,
        beneath: Arc<Stack>,
        table_bytes: u64,
        access: Access<'_>,
    ) -> Result<Self> {
        let note = access.journals().map(|journals| journals.failure_note(id, entry.number));
        let content = match entry.format {
            ImageFormat::Raw => {
                let read_only = !access.is_writing();
                Content::Raw(Arc::new(RawDisk::new(Arc::clone(&files.image) as _, read_only)?))
            }
            ImageFormat::Qcow2 => {
                let mode = match access {
                    Access::Read | Access::ReadActive => Mode::ReadOnly,
                    Access::Write { journals } => Mode::Writable(journals.open(id, entry.number)?),
                    Access::Job { journals } => Mode::Job(journals.open(id, entry.number)?),
                };
                let parts = Parts {
                    storage: Arc::clone(&files.image) as _,
                    data_file: files.data.clone().map(|data| data as _),
                    backing: Some(beneath),
                    cache_bytes: table_bytes,
                };
                // Which syncs what it writes.
                let image = Image::open(parts, mode)
                    .inspect_err(|_| failure::leave(note.as_ref().filter(|_| files.sync_has_failed())));
                Content::Qcow2(Arc::new(image.context(|| format!("open {}", entry.path.display()))?))
            }
        };
        Ok(Self { files, content, note })
    }

    pub(super) fn disk(&self) -> Arc<dyn Disk> {
        match &self.content {
            Content::Raw(disk) => Arc::clone(disk) as _,
            Content::Qcow2(image) => Arc::clone(image) as _,
        }
    }

    pub(super) fn layer(&self) -> &dyn block::Layer {
        match &self.content {
            Content::Raw(disk) => &**disk,
            Content::Qcow2(image) => &**image,
        }
    }
}
