//! A layer whose host can not sync it any more, for tests.

use std::sync::Mutex;

use qcow2::{Mode, Parts};

use super::*;

/// A file whose syncs fail, each with the loss of what was written since: the kernel drops what it could not write.
#[derive(Debug)]
struct Faulty {
    file: Arc<HostFile>,
    /// The bytes that each write replaced.
    replaced: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Storage for Faulty {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let end = offset + buf.len() as u64;
        if self.file.len()? < end {
            self.file.set_len(end)?;
        }
        let mut before = vec![0; buf.len()];
        self.file.read_at(&mut before, offset)?;
        self.replaced.lock().unwrap().push((offset, before));
        self.file.write_at(buf, offset)
    }

    fn sync(&self) -> Result<()> {
        for (offset, bytes) in self.replaced.lock().unwrap().drain(..).rev() {
            self.file.write_at(&bytes, offset)?;
        }
        Err(Error::new(ErrorKind::Io, "injected: a sync failed"))
    }

    fn len(&self) -> Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len)
    }

    fn punch_hole(&self, range: ByteRange) -> Result<()> {
        self.file.punch_hole(range)
    }
}

impl Layer {
    /// Opens a qcow2 layer for a job, on a host that can not sync it any more.
    pub(crate) fn begin_writing_in_vain(&self, id: &str, journals: &JournalFolder) {
        let files = self.open.load().files.clone();
        let image = Arc::new(files.image.reopen_for_writing().unwrap());
        let faulty = Arc::new(Faulty { file: Arc::clone(&image), replaced: Mutex::default() });
        let parts = Parts {
            storage: faulty,
            data_file: None,
            backing: Some(Arc::clone(&self.beneath) as _),
            cache_bytes: JOB_TABLE_BYTES,
        };
        let journal = journals.open(id, self.entry.number).unwrap();
        let content = Content::Qcow2(Arc::new(Image::open(parts, Mode::Job(journal)).unwrap()));
        let note = Some(journals.failure_note(id, self.entry.number));
        self.open.store(Arc::new(Open { files: Files { image, data: None }, content, note }));
    }
}
