//! Events on their way from the cut to whoever listens.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::cut::Events;
use crate::model::Event;

/// Is told of each event by who makes it, while that may hold locks: it neither waits nor asks for anything.
type Listener = Box<dyn Fn(&Event) + Send>;

/// Hands each event to every listener before the one who makes it goes on, all in the same order.
#[derive(Default)]
pub(crate) struct Bus(Mutex<Vec<Listener>>);

impl Bus {
    pub(crate) fn subscribe(&self, listener: Listener) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(listener);
    }
}

impl Events for Bus {
    fn emit(&self, event: Event) {
        let listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.iter().for_each(|listener| listener(&event));
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus").finish_non_exhaustive()
    }
}
