//! Whose rings a disk serves: those of one front-end at a time.
//!
//! Two front-ends may be connected at once, so that a guest can be moved from one QEMU to another on this host: the second
//! asks for features and configuration while the first one's guest still runs. It may start its rings too, but none of
//! their requests is looked at before the first has given the disk up.
//!
//! ```text
//!   free ──▶ a session's first ring is served ──▶ held ──▶ gone, or all its rings stopped while it logs ──▶ free
//! ```
//! To stop all rings is not enough: a guest that is paused stops them, and goes on later with what it knows of the disk.
//! One that is being moved stops them with the log of dirty pages on, and goes on elsewhere. Should the move fail in
//! that instant, it takes the disk again like any other, unless the other guest has it by then.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::wake::Bell;

/// The floor of one disk.
#[derive(Debug, Default)]
pub(crate) struct Floor(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The session that has it, and its rings that are served, by bit.
    held: Option<(u64, u64)>,
    /// Workers that may not have it yet, with their sessions.
    waiting: Vec<(u64, Arc<Bell>)>,
    /// The next session's number.
    next: u64,
}

/// A session at the floor; it gives it up when it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    floor: Arc<Floor>,
    session: u64,
}

impl Claim {
    /// A new session's.
    pub(crate) fn new(floor: &Arc<Floor>) -> Self {
        let mut state = floor.lock();
        state.next += 1;
        Self { floor: Arc::clone(floor), session: state.next }
    }

    /// The session's number: no other has it.
    pub(crate) fn session(&self) -> u64 {
        self.session
    }

    /// Asks to serve ring `ring`; if `false`, `bell` is rung when it is worth asking again.
    pub(crate) fn take(&self, ring: usize, bell: &Arc<Bell>) -> bool {
        let mut state = self.floor.lock();
        let (holder, rings) = state.held.unwrap_or((self.session, 0));
        if holder != self.session {
            if !state.waiting.iter().any(|(_, waiting)| Arc::ptr_eq(waiting, bell)) {
                state.waiting.push((self.session, Arc::clone(bell)));
            }
            return false;
        }
        state.held = Some((holder, rings | 1 << ring));
        true
    }

    /// Ring `ring` has been stopped, with nothing of it in flight. If that was the last one of a guest that is being
    /// moved, the floor is free.
    pub(crate) fn stopped(&self, ring: usize, moved: bool) {
        let mut state = self.floor.lock();
        if let Some((holder, rings)) = &mut state.held
            && *holder == self.session
        {
            *rings &= !(1 << ring);
            if *rings == 0 && moved {
                state.free();
            }
        }
    }

    /// The session has ended, and nothing of it is in flight. Its workers wait no more: their bells are descriptors, of
    /// which one who comes and goes would leave ever more.
    pub(crate) fn give_up(&self) {
        let mut state = self.floor.lock();
        state.waiting.retain(|(session, _)| *session != self.session);
        if state.held.is_some_and(|(holder, _)| holder == self.session) {
            state.free();
        }
    }

    /// Whether another session has the floor.
    pub(crate) fn is_refused(&self) -> bool {
        self.floor.lock().held.is_some_and(|(holder, _)| holder != self.session)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl State {
    fn free(&mut self) {
        self.held = None;
        self.waiting.drain(..).for_each(|(_, bell)| bell.ring());
    }
}

impl Floor {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_waits_until_the_other_is_moved_or_gone() {
        let floor = Arc::new(Floor::default());
        let (first, second) = (Claim::new(&floor), Claim::new(&floor));
        let bell = Arc::new(Bell::new().unwrap());
        assert!(first.take(0, &bell) && first.take(63, &bell) && !first.is_refused());
        assert!(!second.take(0, &bell) && second.is_refused());
        // A guest that is paused, or reset, keeps its disk.
        first.stopped(0, false);
        first.stopped(63, false);
        assert!(!bell.is_rung() && !second.take(0, &bell));
        // One that is moved gives it up with its last ring.
        assert!(first.take(0, &bell) && first.take(1, &bell));
        first.stopped(1, true);
        assert!(!bell.is_rung() && !second.take(0, &bell));
        first.stopped(0, true);
        assert!(bell.answer() && second.take(0, &bell));
        assert!(!first.take(0, &bell), "the move did not fail");
        // What is said of rings by one who does not have it means nothing.
        first.stopped(0, true);
        assert!(!bell.is_rung() && first.is_refused());
        drop(second);
        assert!(bell.answer() && first.take(0, &bell));
    }

    /// Each left its bells, which are descriptors, for as long as the first one's guest ran.
    #[test]
    fn who_comes_and_goes_while_another_has_the_floor_leaves_nothing() {
        let floor = Arc::new(Floor::default());
        let (first, bell) = (Claim::new(&floor), Arc::new(Bell::new().unwrap()));
        assert!(first.take(0, &bell));
        for _ in 0..3 {
            let second = Claim::new(&floor);
            assert!(!second.take(0, &bell) && Arc::strong_count(&bell) == 2);
            drop(second);
            assert_eq!(Arc::strong_count(&bell), 1);
        }
    }
}
