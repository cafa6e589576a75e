//! Events on their way to the clients.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use snapshot::{ClientId, Event};

use crate::clients::Clients;
use crate::message::{self, encode};
use crate::throttle::Throttle;

/// Tells the clients of a server what happens.
///
/// Whoever makes an event puts it into the clients' outboxes himself, and never waits. So it comes before the answer to the
/// command that caused it, and a job's before any answer that knows of them, as in QEMU.
#[derive(Clone, Debug, Default)]
pub struct Announcer {
    pub(crate) clients: Arc<Clients>,
    held: Arc<Held>,
}

/// What comes too often.
#[derive(Debug, Default)]
struct Held {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    throttle: Throttle<Line>,
    ended: bool,
}

/// An event, ready to be sent.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) addressee: Option<ClientId>,
    pub(crate) text: Arc<[u8]>,
}

impl Announcer {
    /// Tells all clients that have negotiated, or the one that it is for.
    pub fn tell(&self, event: &Event) {
        let Some(line) = line(event) else { return };
        // Held while it is sent, so that all clients have the same order.
        let mut state = self.held.lock();
        let due = state.throttle.next();
        if let Some(line) = state.throttle.offer(event.name(), line, Instant::now()) {
            self.clients.send(&line);
        }
        if state.throttle.next() != due {
            self.held.changed.notify_all();
        }
    }

    /// Tells all that was held back, and then this.
    pub(crate) fn tell_last(&self, event: &Event) {
        self.held.lock().throttle.waiting().iter().for_each(|line| self.clients.send(line));
        self.tell(event);
    }

    /// Sends what was held back when its time has come, until [`end`](Self::end).
    pub(crate) fn release(&self) {
        let Held { changed, .. } = &*self.held;
        let mut state = self.held.lock();
        while !state.ended {
            state = match state.throttle.next() {
                None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(due) => {
                    let left = due.saturating_duration_since(Instant::now());
                    changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.throttle.due(Instant::now()).iter().for_each(|line| self.clients.send(line));
        }
    }

    /// Ends [`release`](Self::release).
    pub(crate) fn end(&self) {
        self.held.lock().ended = true;
        self.held.changed.notify_all();
    }
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn line(event: &Event) -> Option<Line> {
    let data = serde_json::to_value(event)
        .inspect_err(|error| tracing::error!(%error, event = event.name(), "an event cannot be told"))
        .ok()?;
    let text = encode(&message::event(event.name(), data, SystemTime::now())).into();
    Some(Line { addressee: event.addressee(), text })
}
