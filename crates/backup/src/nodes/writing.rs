//! Targets: nodes that a job writes to.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use block::{ByteRange, Disk, Error, ErrorKind, Extent, Flush, FlushStep, Result, Source, WriteGuard};
use hostio::HostFile;
use qcow2::{Header, Image, Journal, Mode, Parts};

use super::{Kind, Node};

/// Changes of tables that may wait in memory, some tens of bytes each.
pub(crate) const MAX_PENDING: usize = 64 << 10;

/// A node while a job writes to it: nobody else may.
#[derive(Debug)]
pub(crate) struct Writing {
    node: Arc<Node>,
    disk: Arc<dyn Disk>,
    qcow2: Option<Arc<Image>>,
}

impl Writing {
    /// Takes a node to write a disk of `capacity` bytes to it.
    pub(crate) fn begin(node: Arc<Node>, capacity: u64) -> Result<Self> {
        let refuse = |kind, story: String| Err(Error::new(kind, story));
        let (disk, qcow2) = match &node.kind {
            Kind::Image { disk, qcow2, .. } => (Arc::clone(disk), qcow2.clone()),
            _ => {
                let story =
                    format!("Node '{}' is not an image: put a format, raw or qcow2, on the file", node.name);
                return refuse(ErrorKind::InvalidInput, story);
            }
        };
        if disk.read_only() {
            return refuse(ErrorKind::ReadOnly, format!("Block node is read-only: '{}'", node.name));
        }
        if disk.capacity() != capacity {
            let story = format!(
                "Source and target image have different sizes: {capacity} bytes and, of node '{}', {}",
                node.name,
                disk.capacity()
            );
            return refuse(ErrorKind::InvalidInput, story);
        }
        if node.written.swap(true, Ordering::AcqRel) {
            return refuse(ErrorKind::Busy, format!("Node '{}' is being written by another job", node.name));
        }
        Ok(Self { node, disk, qcow2 })
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// The image, if clusters can be written to it compressed.
    pub(crate) fn compressible(&self) -> Result<Arc<Image>> {
        self.qcow2.clone().ok_or_else(|| incompressible(&self.node.name))
    }

    /// Has what waits in memory written out if it has become much.
    pub(crate) fn relieve(&self) -> Result<()> {
        match &self.qcow2 {
            Some(image) if image.pending() > MAX_PENDING => image.flush().run(),
            _ => Ok(()),
        }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.node.written.store(false, Ordering::Release);
    }
}

/// QEMU's words for a target that takes no compressed clusters.
pub(crate) fn incompressible(target: &str) -> Error {
    let story = format!("Compression is not supported for this drive {target}");
    Error::new(ErrorKind::Unsupported, story)
}

/// Opens a qcow2 image without what is beneath it.
pub(super) fn open_qcow2(file: Arc<HostFile>, writable: bool) -> Result<Image> {
    let header = Header::read(&*file)?;
    if header.has_data_file {
        return Err(Error::new(ErrorKind::Unsupported, "it has an external data file"));
    }
    let beneath = Arc::new(Beneath { capacity: header.capacity, is_none: header.backing_file.is_none() });
    let mode = match writable {
        // What a backup that was killed leaves is made again, never recovered.
        true => Mode::Writable(Journal::nowhere()?),
        false => Mode::ReadOnly,
    };
    Image::open(Parts::new(file, Some(beneath)), mode)
}

/// What is beneath a target: its backing file, which is not opened, for a backup writes whole clusters; or nothing yet. An
/// increment may be put on top of the backup before it when it is restored, so what is zero in it must say so, as if
/// something else could show.
#[derive(Debug)]
struct Beneath {
    capacity: u64,
    is_none: bool,
}

impl Beneath {
    fn refuse<T>() -> Result<T> {
        Err(Error::new(ErrorKind::Unsupported, "the backing file of a backup's target is not opened"))
    }
}

impl Disk for Beneath {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn read_only(&self) -> bool {
        true
    }

    fn discard_granularity(&self) -> u32 {
        512
    }

    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        if !self.is_none {
            return Self::refuse();
        }
        out.push(Extent { len: range.len, source: Source::Zero });
        Ok(())
    }

    fn resolve_write(&self, _: ByteRange, _: &Waker, _: &mut Vec<Extent>) -> Poll<Result<WriteGuard>> {
        Poll::Ready(Self::refuse())
    }

    fn discard(&self, _range: ByteRange, _waker: &Waker) -> Poll<Result<()>> {
        Poll::Ready(Self::refuse())
    }

    fn write_zeroes(&self, _range: ByteRange, _unmap: bool, _waker: &Waker) -> Poll<Result<()>> {
        Poll::Ready(Self::refuse())
    }

    fn flush(&self) -> Box<dyn Flush> {
        Box::new(Nothing)
    }
}

/// The flush of what is never written.
struct Nothing;

impl Flush for Nothing {
    fn step(&mut self, _last: Result<()>, _waker: &Waker) -> Poll<Result<FlushStep>> {
        Poll::Ready(Ok(FlushStep::Done))
    }
}
