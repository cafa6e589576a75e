//! What waits to be written to one client: bounded, and never in the way of anybody else.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// How many bytes may wait before the client counts as too slow: thousands of events. The kernel's socket buffer
/// comes on top.
pub(crate) const LIMIT: usize = 1 << 20;

/// The lines that wait. One thread takes them out and writes them.
///
/// Replies wait for room, which holds up only the client's own next command. Events cannot wait, so a client that
/// does not read loses its connection: a client that silently lost an event would be wrong without knowing.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Arc<[u8]>>,
    bytes: usize,
    /// The client has negotiated, and been told so.
    listening: bool,
    end: End,
}

#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
enum End {
    #[default]
    Open,
    /// Nothing comes any more; what waits is still to be written.
    Finished,
    /// What waits is lost, too.
    Aborted,
}

/// What became of an event.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Delivery {
    /// It waits to be written, or the client does not listen.
    Done,
    /// The client is too slow. The outbox is aborted; close the connection.
    Overflow,
}

impl Outbox {
    /// Adds a reply, once there is room. The reply that tells of the end of the negotiation has `listening`: no event
    /// comes before it. `false` if the client is gone.
    pub(crate) fn reply(&self, line: Vec<u8>, listening: bool) -> bool {
        let full = |state: &mut State| state.bytes >= LIMIT && state.end != End::Aborted;
        let mut state = self.changed.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        if state.end != End::Open {
            return false;
        }
        state.listening |= listening;
        self.push(&mut state, line.into());
        true
    }

    /// Adds an event, if the client listens.
    pub(crate) fn event(&self, line: &Arc<[u8]>) -> Delivery {
        let mut state = self.lock();
        if state.end != End::Open || !state.listening {
            return Delivery::Done;
        }
        if state.bytes >= LIMIT {
            self.end(state, End::Aborted);
            return Delivery::Overflow;
        }
        self.push(&mut state, Arc::clone(line));
        Delivery::Done
    }

    /// Adds an event that may as well be lost, unless others wait already.
    pub(crate) fn offer(&self, line: Vec<u8>) {
        let mut state = self.lock();
        if state.end == End::Open && state.listening && state.lines.is_empty() {
            self.push(&mut state, line.into());
        }
    }

    /// Takes the next line out, waiting for it; `None` when there will be none.
    pub(crate) fn take(&self) -> Option<Arc<[u8]>> {
        let idle = |state: &mut State| state.lines.is_empty() && state.end == End::Open;
        let mut state = self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        let line = state.lines.pop_front()?;
        state.bytes -= line.len();
        self.changed.notify_all();
        Some(line)
    }

    /// Nothing is added any more.
    pub(crate) fn finish(&self) {
        self.end(self.lock(), End::Finished);
    }

    /// Nothing is added any more, and what waits is dropped.
    pub(crate) fn abort(&self) {
        self.end(self.lock(), End::Aborted);
    }

    fn end(&self, mut state: MutexGuard<'_, State>, end: End) {
        if end == End::Aborted {
            state.lines.clear();
            state.bytes = 0;
        }
        state.end = state.end.max(end);
        self.changed.notify_all();
    }

    fn push(&self, state: &mut State, line: Arc<[u8]>) {
        state.bytes += line.len();
        state.lines.push_back(line);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn taken(outbox: &Outbox) -> Vec<Vec<u8>> {
        outbox.finish();
        std::iter::from_fn(|| outbox.take()).map(|line| line.to_vec()).collect()
    }

    #[test]
    fn no_event_comes_before_the_reply_to_the_negotiation() {
        let outbox = Outbox::default();
        assert!(outbox.reply(b"greeting".to_vec(), false));
        assert_eq!(outbox.event(&Arc::from(*b"early")), Delivery::Done);
        assert!(outbox.reply(b"negotiated".to_vec(), true));
        assert_eq!(outbox.event(&Arc::from(*b"event")), Delivery::Done);
        assert_eq!(taken(&outbox), [&b"greeting"[..], b"negotiated", b"event"]);
    }

    #[test]
    fn events_that_nobody_reads_end_the_connection_and_their_memory_is_given_back() {
        let outbox = Outbox::default();
        outbox.reply(Vec::new(), true);
        let line: Arc<[u8]> = Arc::from(vec![0; LIMIT / 4]);
        for _ in 0..4 {
            assert_eq!(outbox.event(&line), Delivery::Done);
        }
        assert_eq!(outbox.event(&line), Delivery::Overflow);
        assert_eq!(Arc::strong_count(&line), 1);
        assert_eq!(outbox.event(&line), Delivery::Done);
        assert_eq!(outbox.take(), None);
        assert!(!outbox.reply(Vec::new(), false));
    }

    #[test]
    fn a_reply_waits_for_room() {
        let outbox = Outbox::default();
        assert!(outbox.reply(vec![0; LIMIT], true));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| outbox.reply(b"next".to_vec(), false));
            thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            assert_eq!(outbox.take().map(|line| line.len()), Some(LIMIT));
            assert!(waiting.join().unwrap());
        });
        assert!(outbox.reply(vec![0; LIMIT], true));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| outbox.reply(b"last".to_vec(), false));
            outbox.abort();
            assert!(!waiting.join().unwrap());
        });
    }

    #[test]
    fn an_offered_event_does_not_queue_up() {
        let outbox = Outbox::default();
        outbox.offer(b"too early".to_vec());
        outbox.reply(b"negotiated".to_vec(), true);
        outbox.offer(b"in the way".to_vec());
        outbox.take();
        outbox.offer(b"sent".to_vec());
        outbox.offer(b"one too many".to_vec());
        assert_eq!(taken(&outbox), [&b"sent"[..]]);
    }
}
