//! The thread that pays what is owed to the guest.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::freezer::Freezer;

/// Thaws until it is confirmed, with growing pauses: after a freeze of unknown fate, a thaw that failed, or a debt that an
/// earlier run of the daemon left. Asleep otherwise.
///
/// Dropping it ends the thread, after at most one try's limits; the record stays for the next run.
pub struct Collector {
    freezer: Arc<Freezer>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    /// Starts it; what is owed already is tried at once.
    pub fn start(freezer: Arc<Freezer>) -> io::Result<Self> {
        freezer.stop_collecting(false);
        let works_for = Arc::clone(&freezer);
        let thread = thread::Builder::new().name("thaw-collector".to_owned()).spawn(move || {
            while works_for.wait_for_debt() {
                while let Some(pause) = works_for.collect() {
                    if !works_for.wait_for_retry(pause) {
                        return;
                    }
                }
            }
        })?;
        Ok(Self { freezer, thread: Some(thread) })
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.freezer.stop_collecting(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the collector of owed thaws had panicked");
        }
    }
}
