//! Who is connected.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use snapshot::ClientId;

use crate::events::Line;
use crate::outbox::Delivery;
use crate::session::Session;

/// How many clients may be connected at once; one more is turned away before the greeting.
pub const MAX_CLIENTS: usize = 64;

/// The clients of a server.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    sessions: Mutex<BTreeMap<ClientId, Arc<Session>>>,
    pub(crate) left: Condvar,
}

impl Clients {
    pub(crate) fn lock(&self) -> MutexGuard<'_, BTreeMap<ClientId, Arc<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a client, unless there are too many.
    pub(crate) fn enter(self: &Arc<Self>, number: ClientId, stream: UnixStream) -> Option<Place> {
        let mut sessions = self.lock();
        if sessions.len() >= MAX_CLIENTS {
            return None;
        }
        let session = Arc::new(Session::new(number, stream));
        sessions.insert(number, Arc::clone(&session));
        Some(Place { clients: Arc::clone(self), number, session })
    }

    /// Sends an event to its addressee if that is still there, else to all.
    pub(crate) fn send(&self, Line { addressee, text: line }: &Line) {
        let sessions = self.lock();
        let addressee = addressee.filter(|client| sessions.contains_key(client));
        let told =
            sessions.iter().filter(|(client, _)| addressee.is_none_or(|addressee| addressee == **client));
        for (_, session) in told {
            if session.outbox().event(line) == Delivery::Overflow {
                tracing::warn!("cut off a control client that does not read its events");
                session.cut();
            }
        }
    }

    /// Lets all end what they do, for as long as `grace`, and cuts off those that are left.
    pub(crate) fn stop(&self, grace: Duration) {
        let sessions = self.lock();
        sessions.values().for_each(|session| session.stop());
        let (sessions, _) = self
            .left
            .wait_timeout_while(sessions, grace, |sessions| !sessions.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        sessions.values().for_each(|session| session.cut());
    }
}

/// A client's place among [`Clients`], given up on drop.
pub(crate) struct Place {
    clients: Arc<Clients>,
    number: ClientId,
    pub(crate) session: Arc<Session>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.lock().remove(&self.number);
        self.clients.left.notify_all();
    }
}
