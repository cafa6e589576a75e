//! Events on their way from the cut to whoever listens.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use crate::cut::Events;
use crate::model::Event;

/// How many events may wait for one listener; it misses what comes while so many do.
const MAX_WAITING: usize = 1024;

/// Hands each event to every listener, and waits for none.
#[derive(Debug, Default)]
pub(crate) struct Bus(Mutex<Vec<SyncSender<Event>>>);

impl Bus {
    pub(crate) fn subscribe(&self) -> Receiver<Event> {
        let (sender, receiver) = sync_channel(MAX_WAITING);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        receiver
    }
}

impl Events for Bus {
    fn emit(&self, event: Event) {
        use std::sync::mpsc::TrySendError::Disconnected;
        let mut listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| !matches!(listener.try_send(event.clone()), Err(Disconnected(_))));
    }
}
