//! A chain: one disk's layers, served as one disk whose active layer can be switched in an instant.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Poll, Waker};

use arc_swap::ArcSwapOption;
use block::{
    ByteRange, Disk, Error, ErrorKind, Extent, Flush, FlushStep, Gate, Parking, Pulse, Result, Stack,
    WriteErrors, WriteGuard,
};
use hostio::Cache;

use crate::layer::{Layer, Opening};
use crate::model::{DiskLayer, DiskStatus};

/// One disk that is served, and its gate.
///
/// # Invariants
/// - `active` is switched only while the gate is closed and drained: no request sees it change.
/// - What a job gives back is not used again while a map names it: `relayer`, before the next job, begins
///   all maps anew, that of the chain and those of its views.
/// - While a layer is *sealing* (its snapshot is taken, its sync not done), a guest's flush syncs it too: the guest's
///   promise does not wait for ours.
#[derive(Debug)]
pub struct Chain {
    id: String,
    capacity: AtomicU64,
    read_only: bool,
    gate: Arc<Gate>,
    pulse: Arc<Pulse>,
    parking: Arc<Parking>,
    connected: AtomicBool,
    /// `None` while the images are closed, for work on the chain itself.
    active: ArcSwapOption<Active>,
    /// The base first, the active layer last. Held only by the control plane.
    layers: Mutex<Vec<Arc<Layer>>>,
    /// Frozen layers that are read as they are, by whom it may be, each through one stack.
    views: Mutex<Vec<View>>,
    /// Held by whoever does the seal of a layer.
    seals: Mutex<()>,
}

/// A frozen layer with all beneath it, as long as somebody reads that.
#[derive(Debug)]
struct View {
    layer: Weak<Layer>,
    stack: Weak<Stack>,
}

#[derive(Debug)]
struct Active {
    /// What is open of `layer`.
    top: Arc<dyn Disk>,
    layer: Arc<Layer>,
    sealing: Option<Arc<Layer>>,
}

impl Chain {
    /// A chain of `layers`, the last of which is active. Not empty.
    pub(crate) fn new(
        id: &str,
        read_only: bool,
        write_errors: WriteErrors,
        layers: Vec<Arc<Layer>>,
    ) -> Result<Self> {
        let chain = Self {
            id: id.to_owned(),
            capacity: AtomicU64::new(0),
            read_only,
            gate: Arc::default(),
            pulse: Arc::default(),
            parking: Arc::new(Parking::new(write_errors)),
            connected: AtomicBool::new(false),
            active: ArcSwapOption::empty(),
            layers: Mutex::default(),
            views: Mutex::default(),
            seals: Mutex::default(),
        };
        chain.attach(layers)?;
        Ok(chain)
    }

    /// The disk's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The gate at its virtqueues.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// How long its requests take: for jobs that must not be felt.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// Where its requests wait that the host could not carry out.
    pub fn parking(&self) -> &Arc<Parking> {
        &self.parking
    }

    /// Told by the device: whether a front-end is connected.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::SeqCst);
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::SeqCst)
    }

    pub(crate) fn layers(&self) -> MutexGuard<'_, Vec<Arc<Layer>>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The active layer.
    pub(crate) fn top(&self) -> Option<Arc<Layer>> {
        self.layers().last().cloned()
    }

    /// The cut's switch: `overlay` becomes active, what was active is sealing. The caller has the gate closed and
    /// drained. Constant time; nothing in it can fail. Returns the layer that now holds the frozen state, `None` if
    /// the chain is detached.
    pub(crate) fn pivot(&self, overlay: Arc<Layer>) -> Option<Arc<Layer>> {
        let mut layers = self.layers();
        let frozen = layers.last().cloned()?;
        frozen.seal();
        let sealing = Some(Arc::clone(&frozen));
        let active = Active { top: overlay.disk(), layer: Arc::clone(&overlay), sealing };
        self.active.store(Some(Arc::new(active)));
        layers.push(overlay);
        Some(frozen)
    }

    /// The turn to do the seal of this chain's layer, to be had before it is looked for. Two who sync it at once would both
    /// take away its journal and its lock, the second when a job may have begun to write to it.
    pub(crate) fn turn_to_seal(&self) -> MutexGuard<'_, ()> {
        self.seals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The layer whose snapshot is taken and whose sync is not done.
    pub(crate) fn sealing(&self) -> Option<Arc<Layer>> {
        self.active.load().as_ref().and_then(|active| active.sealing.clone())
    }

    /// This layer is on stable storage: a guest's flush need not sync it any more. The caller has the right to change
    /// chains, or another one is sealing by now, and stays so.
    pub(crate) fn sealed(&self, layer: &Arc<Layer>) {
        // Under the lock of a pivot, so that none comes in between.
        let _layers = self.layers();
        if let Some(active) = &*self.active.load()
            && active.sealing.as_ref().is_some_and(|sealing| Arc::ptr_eq(sealing, layer))
        {
            let (top, layer) = (Arc::clone(&active.top), Arc::clone(&active.layer));
            self.active.store(Some(Arc::new(Active { top, layer, sealing: None })));
        }
    }

    /// Brings all that was acknowledged onto stable storage, for good: nothing is written any more. The caller has the gate
    /// closed and drained, or serves no front-end.
    pub(crate) fn close(&self) -> Result<()> {
        let top = self.top();
        if let Some(top) = &top {
            top.seal();
        }
        self.flush().run()?;
        top.iter().for_each(|top| top.close());
        Ok(())
    }

    /// Closes the images, for work on the chain itself. The caller has the gate closed and drained, and keeps it so
    /// until it has attached the chain again.
    pub(crate) fn detach(&self) {
        self.active.store(None);
        self.layers().clear();
    }

    /// Shows these layers from now on, the last of which is active.
    pub(crate) fn attach(&self, layers: Vec<Arc<Layer>>) -> Result<()> {
        let top = layers.last().ok_or_else(|| Error::new(ErrorKind::Corrupt, "a chain without layers"))?;
        // Not always what it was: a snapshot that is reverted to may be of before it grew.
        self.capacity.store(top.disk().capacity(), Ordering::Release);
        let active = Active { top: top.disk(), layer: Arc::clone(top), sealing: None };
        self.active.store(Some(Arc::new(active)));
        *self.layers() = layers;
        Ok(())
    }

    /// The disk as a frozen layer of this chain shows it. All who read it share a map, whose memory is theirs: they do not
    /// crowd out what the guest uses.
    pub(crate) fn view(&self, layer: &Arc<Layer>, how: Opening) -> Arc<Stack> {
        let mut views = self.views();
        let is_of = |view: &&View| Weak::as_ptr(&view.layer) == Arc::as_ptr(layer);
        if let Some(stack) = views.iter().find(is_of).and_then(|view| view.stack.upgrade()) {
            return stack;
        }
        views.retain(|view| view.stack.strong_count() > 0);
        let stack = Arc::new(layer.view(how.view_bytes()));
        views.push(View { layer: Arc::downgrade(layer), stack: Arc::downgrade(&stack) });
        stack
    }

    fn views(&self) -> MutexGuard<'_, Vec<View>> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows these layers from now on, which read the same as those before, and all of which are open: a job has moved
    /// data between them. The active one stays. Not while a cut is under way, whose overlay was opened over the layers as
    /// they were.
    pub(crate) fn relayer(&self, layers: Vec<Arc<Layer>>, how: Opening) {
        let Some(base) = layers.first() else { return };
        // All share one map, as before.
        let mut stack = Stack::new(base.own_backing(), how.map_bytes());
        for layer in &layers {
            layer.beneath().replace(&stack);
            stack = layer.stack();
        }
        *self.layers() = layers;
        // Those who read layers that went go on with them.
        for view in self.views().iter().filter_map(|view| view.stack.upgrade()) {
            view.replace(&Stack::new(view.layers(), how.view_bytes()));
        }
    }

    /// Makes the disk larger, by zeroes, while it is served; durable when it returns. `capacity` has been checked. No cut
    /// and no maintenance is under way.
    pub(crate) fn grow(&self, capacity: u64) -> Result<()> {
        self.top().ok_or_else(|| self.closed())?.grow(capacity)?;
        self.capacity.store(capacity, Ordering::Release);
        Ok(())
    }

    /// What whoever needs the images is told while they are closed.
    pub(crate) fn closed(&self) -> Error {
        Error::new(ErrorKind::Busy, format!("the images of disk {} are closed for maintenance", self.id))
    }

    /// What a client is told of it.
    pub(crate) fn status(&self, cache: Cache) -> DiskStatus {
        let image = |layer: &Arc<Layer>| DiskLayer {
            node_name: format!("{}.{}", self.id, layer.entry.number),
            path: layer.entry.path.clone(),
            format: layer.entry.format,
            virtual_size: layer.disk().capacity(),
            actual_size: layer.allocated().ok(),
            sync_failed: layer.has_failed(),
        };
        // The host is asked for sizes: not under the lock, which a pivot needs.
        let layers = self.layers().clone();
        DiskStatus {
            id: self.id.clone(),
            capacity: self.capacity(),
            read_only: self.read_only,
            connected: self.is_connected(),
            cache,
            write_errors: self.parking.policy(),
            io_status: self.parking.status(),
            parked: self.parking.parked() as u64,
            in_flight: self.pulse.read().in_flight,
            layers: layers.iter().map(image).collect(),
        }
    }
}

impl Disk for Chain {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn discard_granularity(&self) -> u32 {
        // That of an overlay's subclusters and of a host's pages: the device is told once, the layers change.
        4096
    }

    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        match &*self.active.load() {
            Some(active) => active.top.resolve_read(range, out),
            None => Err(self.closed()),
        }
    }

    fn resolve_write(
        &self,
        range: ByteRange,
        waker: &Waker,
        out: &mut Vec<Extent>,
    ) -> Poll<Result<WriteGuard>> {
        match &*self.active.load() {
            Some(active) => active.top.resolve_write(range, waker, out),
            None => Poll::Ready(Err(self.closed())),
        }
    }

    fn discard(&self, range: ByteRange, waker: &Waker) -> Poll<Result<()>> {
        match &*self.active.load() {
            Some(active) => active.top.discard(range, waker),
            None => Poll::Ready(Err(self.closed())),
        }
    }

    fn write_zeroes(&self, range: ByteRange, unmap: bool, waker: &Waker) -> Poll<Result<()>> {
        match &*self.active.load() {
            Some(active) => active.top.write_zeroes(range, unmap, waker),
            None => Poll::Ready(Err(self.closed())),
        }
    }

    fn flush(&self) -> Box<dyn Flush> {
        match &*self.active.load() {
            Some(active) => {
                let layers = [Some(Arc::clone(&active.layer)), active.sealing.clone()];
                let top = active.top.flush();
                Box::new(match &active.sealing {
                    None => ChainFlush { now: top, then: None, layers },
                    Some(layer) => ChainFlush { now: layer.disk().flush(), then: Some(top), layers },
                })
            }
            None => Box::new(Refused(Some(self.closed()))),
        }
    }
}

/// A guest's flush. While the layer beneath is sealing: that layer first, then the active one.
struct ChainFlush {
    now: Box<dyn Flush>,
    then: Option<Box<dyn Flush>>,
    layers: [Option<Arc<Layer>>; 2],
}

impl Flush for ChainFlush {
    fn step(&mut self, last: Result<()>, waker: &Waker) -> Poll<Result<FlushStep>> {
        let mut step = self.now.step(last, waker);
        if matches!(step, Poll::Ready(Ok(FlushStep::Done)))
            && let Some(then) = self.then.take()
        {
            self.now = then;
            step = self.now.step(Ok(()), waker);
        }
        if matches!(step, Poll::Ready(Err(_))) {
            self.layers.iter().flatten().for_each(|layer| layer.note_failure());
        }
        step
    }
}

/// The flush of a disk that is closed.
struct Refused(Option<Error>);

impl Flush for Refused {
    fn step(&mut self, _last: Result<()>, _waker: &Waker) -> Poll<Result<FlushStep>> {
        Poll::Ready(self.0.take().map_or(Ok(FlushStep::Done), Err))
    }
}

#[cfg(test)]
mod tests;
