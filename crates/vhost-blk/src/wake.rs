//! How others wake a worker.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;

use block::{Context, Result};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A worker's bell: an event descriptor in its epoll set. It is rung when the gate opens, when a request that a disk
/// held up is worth asking for again, when the memory map changed, and when the device closes.
#[derive(Debug)]
pub(crate) struct Bell {
    event: EventFd,
    /// Rung and not yet answered: saves the descriptor's system calls when many ring.
    rung: AtomicBool,
}

impl Bell {
    pub(crate) fn new() -> Result<Self> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).context(|| "create an event descriptor")?;
        Ok(Self { event, rung: AtomicBool::new(false) })
    }

    pub(crate) fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            // Only a counter near its end would refuse, and then the descriptor is readable anyway.
            let _ = self.event.write(1);
        }
    }

    /// Takes the event off the descriptor, so that it is no longer readable. An [`answer`](Self::answer) must follow.
    pub(crate) fn silence(&self) {
        let _ = self.event.read();
    }

    /// Whether an answer is due.
    pub(crate) fn is_rung(&self) -> bool {
        self.rung.load(Ordering::SeqCst)
    }

    /// Whether it was rung since the last answer. What it was rung for is looked at after this.
    pub(crate) fn answer(&self) -> bool {
        self.is_rung() && self.rung.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_readable(bell: &Bell) -> bool {
        bell.event.read().is_ok()
    }

    #[test]
    fn many_rings_are_one_event_and_one_answer() {
        let bell = Bell::new().unwrap();
        assert!(!bell.answer());
        bell.ring();
        bell.ring();
        bell.silence();
        assert!(!is_readable(&bell));
        // Rung between the two halves of an answer: no event, but an answer.
        bell.ring();
        assert!(bell.answer());
        assert!(!bell.answer());
        bell.ring();
        assert!(is_readable(&bell));
    }
}
