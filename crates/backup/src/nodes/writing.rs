//! Targets: nodes that a job writes to.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Disk, Error, ErrorKind, Result};
use hostio::HostFile;
use qcow2::{Header, Image, Journal, Mode, Parts};

use snapshot::Pin;

use super::backing::{Backing, Beneath, Shown, What};
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

    /// Where it writes, for people.
    pub(crate) fn told(&self) -> String {
        format!("node '{}' in {}", self.node.name, self.node.place().0.display())
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// The image, if clusters can be written to it compressed.
    pub(crate) fn compressible(&self) -> Result<Arc<Image>> {
        self.qcow2.clone().ok_or_else(|| incompressible(&self.node.name))
    }

    /// Shows what is beneath the image, if that is the disk of this pin, as it was then, as long as somebody has what is
    /// returned.
    pub(crate) fn show(&self, pin: &Arc<Pin>) -> Option<Arc<Shown>> {
        match &self.node.kind {
            Kind::Image { backing: Some(backing), .. } if backing.disk == pin.id() => {
                Some(backing.show(Arc::clone(pin)))
            }
            _ => None,
        }
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

/// Opens a qcow2 image without the image that it names as its backing file; `backing` is the disk beneath it, if there is one.
pub(super) fn open_qcow2(
    file: Arc<HostFile>,
    writable: bool,
    backing: Option<Arc<Backing>>,
) -> Result<Image> {
    let header = Header::read(&*file)?;
    if header.has_data_file {
        return Err(Error::new(ErrorKind::Unsupported, "it has an external data file"));
    }
    let what = match backing {
        Some(backing) => What::Disk(backing),
        None if header.backing_file.is_none() => What::Nothing,
        None => What::Unopened,
    };
    let beneath = Arc::new(Beneath { capacity: header.capacity, what });
    let mode = match writable {
        // What a backup that was killed leaves is made again, never recovered.
        true => Mode::Writable(Journal::nowhere()?),
        false => Mode::ReadOnly,
    };
    Image::open(Parts::new(file, Some(beneath)), mode)
}
