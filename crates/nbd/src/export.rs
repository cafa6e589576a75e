//! Exports: what clients can choose from, and who uses them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Disk, Error, ErrorKind, Layer, Result};

use crate::context::{Allocation, AllocationDepth, LayersAllocation, MetaContext};
use crate::proto::MAX_STRING;
use crate::wire::Socket;

/// A disk that is offered to clients under a name.
pub struct Export {
    name: String,
    description: String,
    disk: Arc<dyn Disk>,
    writable: bool,
    writethrough: bool,
    contexts: Vec<Arc<dyn MetaContext>>,
    on_gone: Option<OnGone>,
}

type OnGone = Box<dyn FnOnce() + Send + Sync>;

impl Export {
    /// `disk`, read-only, with the context `base:allocation`. Its size is that of the moment at which a client chooses
    /// it. The name is what clients ask for; the empty one is the default export.
    pub fn new(name: impl Into<String>, disk: Arc<dyn Disk>) -> Self {
        let contexts: Vec<Arc<dyn MetaContext>> = vec![Arc::new(Allocation(Arc::clone(&disk)))];
        Self {
            name: name.into(),
            description: String::new(),
            disk,
            writable: false,
            writethrough: false,
            contexts,
            on_gone: None,
        }
    }

    /// A text for people, which clients are shown.
    #[must_use]
    pub fn description(mut self, text: impl Into<String>) -> Self {
        self.description = text.into();
        self
    }

    /// Clients may write, if the disk lets them.
    #[must_use]
    pub fn writable(mut self) -> Self {
        self.writable = true;
        self
    }

    /// Every write is on stable storage before it is acknowledged, as if clients set FUA on each.
    #[must_use]
    pub fn writethrough(mut self) -> Self {
        self.writethrough = true;
        self
    }

    /// What the disk is made of, the base first: the contexts `base:allocation`, which then unpacks nothing, and with
    /// `depth` `qemu:allocation-depth`. Together they read as the disk does.
    #[must_use]
    pub fn layers(mut self, layers: Vec<Arc<dyn Layer>>, depth: bool) -> Self {
        if depth {
            self.contexts.push(Arc::new(AllocationDepth::new(layers.clone())));
        }
        self.contexts[0] = Arc::new(LayersAllocation::new(layers));
        self
    }

    /// One more context. Its name must be another than those of the contexts that are there.
    #[must_use]
    pub fn context(mut self, context: Arc<dyn MetaContext>) -> Self {
        self.contexts.push(context);
        self
    }

    /// `tell` is called once when the export has been removed and the last request of its last client is done, so that
    /// nothing of this server uses the disk any more; also when it is not added after all.
    #[must_use]
    pub fn on_gone(mut self, tell: impl FnOnce() + Send + Sync + 'static) -> Self {
        self.on_gone = Some(Box::new(tell));
        self
    }

    fn check(&self) -> Result<()> {
        let names = [&self.name, &self.description].into_iter().map(String::as_str);
        for text in names.chain(self.contexts.iter().map(|context| context.name())) {
            if text.len() > MAX_STRING || text.contains('\0') {
                let story =
                    format!("NBD takes no names of more than {MAX_STRING} bytes, or with a NUL in them");
                return Err(Error::new(ErrorKind::InvalidInput, story));
            }
        }
        let names: std::collections::BTreeSet<_> =
            self.contexts.iter().map(|context| context.name()).collect();
        if names.len() != self.contexts.len() {
            return Err(Error::new(ErrorKind::InvalidInput, "two contexts of the export have one name"));
        }
        Ok(())
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

/// What is known of an export that is offered.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ExportStatus {
    /// What clients ask for.
    pub name: String,
    /// The text for people.
    pub description: String,
    /// Whether clients may write.
    pub writable: bool,
    /// Connections that use it now.
    pub clients: usize,
}

/// How an export is removed while it is in use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Removal {
    /// Not at all: [`ErrorKind::Busy`].
    Safe,
    /// Its clients are cut off.
    Hard,
}

/// An export that is, or was, offered.
#[derive(Debug)]
pub(crate) struct Offered {
    export: Export,
    users: Mutex<BTreeMap<u64, Arc<Socket>>>,
}

impl Offered {
    pub(crate) fn name(&self) -> &str {
        &self.export.name
    }

    pub(crate) fn description(&self) -> &str {
        &self.export.description
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.export.disk
    }

    pub(crate) fn writable(&self) -> bool {
        self.export.writable && !self.export.disk.read_only()
    }

    pub(crate) fn writethrough(&self) -> bool {
        self.export.writethrough
    }

    pub(crate) fn contexts(&self) -> &[Arc<dyn MetaContext>] {
        &self.export.contexts
    }

    fn users(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Socket>>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        if let Some(tell) = self.export.on_gone.take() {
            tell();
        }
    }
}

/// All exports by their names.
#[derive(Debug, Default)]
pub(crate) struct Exports(Mutex<BTreeMap<String, Arc<Offered>>>);

impl Exports {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Offered>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, export: Export) -> Result<()> {
        export.check()?;
        let offered = Arc::new(Offered { export, users: Mutex::default() });
        let mut exports = self.lock();
        if exports.contains_key(offered.name()) {
            // Whoever waits to hear that it is gone is told without the lock.
            drop(exports);
            let story = format!("NBD server already has export named '{}'", offered.name());
            return Err(Error::new(ErrorKind::Busy, story));
        }
        exports.insert(offered.name().to_owned(), offered);
        Ok(())
    }

    pub(crate) fn remove(&self, name: &str, how: Removal) -> Result<()> {
        let mut exports = self.lock();
        let Some(offered) = exports.get(name) else {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no export '{name}'")));
        };
        let clients = offered.users().len();
        if how == Removal::Safe && clients > 0 {
            let story = format!("the export '{name}' is in use by {clients} clients");
            return Err(Error::new(ErrorKind::Busy, story));
        }
        let removed = exports.remove(name);
        drop(exports);
        if let Some(offered) = removed {
            offered.users().values().for_each(|socket| socket.cut());
        }
        Ok(())
    }

    pub(crate) fn clear(&self) {
        // Dropped without the lock, as above.
        let all = std::mem::take(&mut *self.lock());
        drop(all);
    }

    pub(crate) fn find(&self, name: &str) -> Option<Arc<Offered>> {
        self.lock().get(name).cloned()
    }

    /// The names and descriptions.
    pub(crate) fn names(&self) -> Vec<(String, String)> {
        let told = |offered: &Arc<Offered>| (offered.name().to_owned(), offered.description().to_owned());
        self.lock().values().map(told).collect()
    }

    pub(crate) fn status(&self) -> Vec<ExportStatus> {
        let status = |offered: &Arc<Offered>| ExportStatus {
            name: offered.name().to_owned(),
            description: offered.description().to_owned(),
            writable: offered.writable(),
            clients: offered.users().len(),
        };
        self.lock().values().map(status).collect()
    }

    /// Begins to use the export, unless it was removed meanwhile: removal and this exclude each other.
    pub(crate) fn enter(&self, offered: &Arc<Offered>, number: u64, socket: &Arc<Socket>) -> Option<Use> {
        let exports = self.lock();
        let found = exports.get(offered.name()).filter(|found| Arc::ptr_eq(found, offered))?;
        found.users().insert(number, Arc::clone(socket));
        Some(Use { offered: Arc::clone(found), number })
    }
}

/// A connection's use of an export.
#[derive(Debug)]
pub(crate) struct Use {
    offered: Arc<Offered>,
    number: u64,
}

impl std::ops::Deref for Use {
    type Target = Offered;

    fn deref(&self) -> &Offered {
        &self.offered
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.offered.users().remove(&self.number);
    }
}
