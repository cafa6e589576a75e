//! What is beneath a target: nothing, an image that is not opened, or a disk as it was at an instant.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Poll, Waker};

use block::{ByteRange, Disk, Error, ErrorKind, Extent, Flush, FlushStep, Result, Source, WriteGuard};
use snapshot::Pin;

/// A disk beneath an image: QEMU's way to offer a disk as it was (`backing` names the disk, a backup with `sync: none` goes to
/// the image, which is exported). It shows the instant at which that job began, as long as the job or an export lives.
#[derive(Debug)]
pub(crate) struct Backing {
    /// The disk's id.
    pub(crate) disk: String,
    view: Mutex<Weak<Shown>>,
}

/// What an image shows of the disk beneath it, as long as somebody has this: its job, and all of its exports. They see the same,
/// which is what whoever came last has it show.
#[derive(Debug)]
pub(crate) struct Shown(Mutex<Arc<Pin>>);

impl Shown {
    fn lock(&self) -> MutexGuard<'_, Arc<Pin>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backing {
    pub(super) fn new(disk: String) -> Self {
        Self { disk, view: Mutex::default() }
    }

    /// The disk as it is shown; `None` if nobody keeps it as it was.
    pub(crate) fn view(&self) -> Option<Arc<Pin>> {
        let shown = self.lock().upgrade()?;
        let pin = Arc::clone(&shown.lock());
        Some(pin)
    }

    /// Shows the disk as it was at this instant, as long as somebody has what is returned.
    pub(crate) fn show(&self, mut pin: Arc<Pin>) -> Arc<Shown> {
        let mut view = self.lock();
        let Some(shown) = view.upgrade() else {
            let shown = Arc::new(Shown(Mutex::new(pin)));
            *view = Arc::downgrade(&shown);
            return shown;
        };
        // The one before goes when nothing is locked any more.
        std::mem::swap(&mut *shown.lock(), &mut pin);
        drop(view);
        shown
    }

    fn lock(&self) -> MutexGuard<'_, Weak<Shown>> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The disk that an image reads where it has no bytes itself.
#[derive(Debug)]
pub(super) struct Beneath {
    pub(super) capacity: u64,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    /// Nothing yet. An increment may be put on top of the backup before it when it is restored, so what is zero in it must say
    /// so, as if something else could show.
    Nothing,
    /// The backing file that the image names: a backup writes whole clusters, and needs to know nothing of it.
    Unopened,
    Disk(Arc<Backing>),
}

fn unsupported<T>(story: &str) -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, story))
}

fn refuse_write<T>() -> Poll<Result<T>> {
    Poll::Ready(unsupported("what is beneath a target is not written"))
}

impl Beneath {
    fn zeroes(len: u64) -> Extent {
        Extent { len, source: Source::Zero }
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
        let backing = match &self.what {
            What::Nothing => {
                out.push(Self::zeroes(range.len));
                return Ok(());
            }
            What::Unopened => return unsupported("the backing file of a backup's target is not opened"),
            What::Disk(backing) => backing,
        };
        let Some(pin) = backing.view() else {
            return unsupported("neither a job nor an export keeps the disk beneath as it was");
        };
        let disk = pin.disk();
        // The image may be longer.
        let known = range.intersect(ByteRange { offset: 0, len: disk.capacity() });
        known.map_or(Ok(()), |known| disk.resolve_read(known, out))?;
        let rest = range.len - known.map_or(0, |known| known.len);
        out.extend((rest > 0).then(|| Self::zeroes(rest)));
        Ok(())
    }

    fn resolve_write(&self, _: ByteRange, _: &Waker, _: &mut Vec<Extent>) -> Poll<Result<WriteGuard>> {
        refuse_write()
    }

    fn discard(&self, _range: ByteRange, _waker: &Waker) -> Poll<Result<()>> {
        refuse_write()
    }

    fn write_zeroes(&self, _range: ByteRange, _unmap: bool, _waker: &Waker) -> Poll<Result<()>> {
        refuse_write()
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
