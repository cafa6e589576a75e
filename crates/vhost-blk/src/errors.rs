//! What becomes of requests that the host could not carry out, and who is told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Error, ErrorKind, WriteErrors};

use crate::complaint::Complaints;
use crate::request::Op;

/// A request that the host could not carry out: what QEMU tells in its event `BLOCK_IO_ERROR`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IoFailure {
    /// Whether it was to change the disk, or a flush; else a read.
    pub write: bool,
    /// Whether it is parked; else the guest was told.
    pub parked: bool,
    /// Whether for want of room.
    pub no_space: bool,
    /// The failure in words.
    pub reason: String,
}

/// Who is told of failures, from a worker's thread: it must not wait.
pub type OnFailure = Arc<dyn Fn(IoFailure) + Send + Sync>;

/// At most one event a second of each kind from each worker, as QEMU has it.
const EVERY: Duration = Duration::from_secs(1);

/// One worker's failures.
pub(crate) struct Errors {
    policy: WriteErrors,
    complaints: Complaints,
    on_failure: OnFailure,
    /// When the last one was told: of reads, of changes reported, of changes parked.
    told: [Option<Instant>; 3],
}

impl Errors {
    pub(crate) fn new(policy: WriteErrors, complaints: Complaints, on_failure: OnFailure) -> Self {
        Self { policy, complaints, on_failure, told: [None; 3] }
    }

    /// Whether a request is to be parked.
    pub(crate) fn parks(&self, op: Option<&Op>, error: &Error) -> bool {
        is_change(op) && self.policy.parks(error.kind())
    }

    /// A request is parked.
    pub(crate) fn parked(&mut self, op: Option<&Op>, error: &Error) {
        self.complaints.request_parked(op, error);
        self.tell(op, error, true);
    }

    /// A request is answered with an error.
    pub(crate) fn reported(&mut self, op: Option<&Op>, error: &Error) {
        self.complaints.request_failed(op, error);
        if is_hosts(error.kind()) {
            self.tell(op, error, false);
        }
    }

    fn tell(&mut self, op: Option<&Op>, error: &Error, parked: bool) {
        let write = is_change(op);
        let Some(told) = self.told.get_mut(usize::from(write) + usize::from(write && parked)) else { return };
        if told.is_some_and(|told| told.elapsed() < EVERY) {
            return;
        }
        *told = Some(Instant::now());
        let no_space = error.kind() == ErrorKind::NoSpace;
        (self.on_failure)(IoFailure { write, parked, no_space, reason: error.to_string() });
    }
}

/// Whether the request is one that QEMU's `werror` is about.
fn is_change(op: Option<&Op>) -> bool {
    match op {
        Some(Op::Write(_) | Op::Flush | Op::Discard(_) | Op::WriteZeroes { .. }) => true,
        Some(Op::Read(_) | Op::Id | Op::Refuse(_)) | None => false,
    }
}

/// Whether such a failure is the host's or the image's, and not of the guest's own making.
pub(crate) fn is_hosts(kind: ErrorKind) -> bool {
    !matches!(
        kind,
        ErrorKind::OutOfRange | ErrorKind::ReadOnly | ErrorKind::InvalidInput | ErrorKind::Unsupported
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    use block::ByteRange;

    #[test]
    fn the_first_of_each_kind_is_told_and_no_mistake_of_the_guest() {
        let (sender, told) = mpsc::channel();
        let complaints = Complaints::new("vda".to_owned(), 0);
        let on_failure = move |failure| sender.send(failure).unwrap();
        let mut errors = Errors::new(WriteErrors::Enospc, complaints, Arc::new(on_failure));
        let range = ByteRange { offset: 0, len: 512 };
        let (read, write) = (Some(&Op::Read(range)), Some(&Op::Write(range)));
        let full = Error::new(ErrorKind::NoSpace, "full");
        assert!(errors.parks(write, &full) && errors.parks(Some(&Op::Flush), &full));
        assert!(!errors.parks(read, &full));
        (0..100).for_each(|_| errors.parked(write, &full));
        errors.reported(write, &Error::new(ErrorKind::Io, "broken"));
        errors.reported(read, &full);
        errors.reported(read, &Error::new(ErrorKind::OutOfRange, "past the end"));
        let all: Vec<_> = told.try_iter().map(|told| (told.write, told.parked, told.no_space)).collect();
        assert_eq!(all, [(true, true, true), (true, false, false), (false, false, true)]);
    }
}
