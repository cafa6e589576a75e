//! A turn: some pieces, copied by several threads at once.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::ends::Ends;
use super::{CopyFailure, Piece};

/// Threads that copy, the caller's among them. More would help a device that wants many requests at once, and take the
/// processors away from guests.
pub(super) const WORKERS: usize = 2;

/// After so long no more pieces are begun: who pauses a job or calls it off waits for this and one piece of each thread.
const LONGEST: Duration = Duration::from_millis(20);

/// Pieces, and what has become of them.
pub(super) struct Turn {
    state: Mutex<State>,
    /// Bytes of one piece of data, at most.
    longest: u64,
    /// No more pieces are begun once so many bytes are.
    most: u64,
    until: Instant,
}

struct State {
    pieces: VecDeque<Piece>,
    begun: u64,
    copied: u64,
    failed: Vec<(Piece, CopyFailure)>,
}

impl Turn {
    pub(super) fn new(pieces: VecDeque<Piece>, longest: u64, most: u64) -> Self {
        let state = State { pieces, begun: 0, copied: 0, failed: Vec::new() };
        Self { state: Mutex::new(state), longest, most, until: Instant::now() + LONGEST }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies, each thread with a buffer of its own. Returns how many bytes were copied, what is still to be, and why the
    /// first piece of that could not.
    pub(super) fn take(
        self,
        ends: &Ends,
        buffers: &mut [Vec<u8>; WORKERS],
    ) -> (u64, VecDeque<Piece>, Option<CopyFailure>) {
        let data: u64 =
            self.state().pieces.iter().filter(|piece| !piece.is_zero).map(|piece| piece.range.len).sum();
        let [own, others @ ..] = buffers;
        thread::scope(|scope| {
            for buffer in others.iter_mut().filter(|_| data.min(self.most) > self.longest) {
                let worker = thread::Builder::new().name("copy".to_owned());
                // One that can not be started is done without.
                let _ = worker.spawn_scoped(scope, || self.work(ends, buffer));
            }
            self.work(ends, own);
        });
        let State { mut pieces, copied, mut failed, .. } =
            self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        // All are tried again, the first one first; of the others it is not told until then.
        failed.sort_by_key(|(piece, _)| std::cmp::Reverse(piece.range.offset));
        let mut first = None;
        for (piece, failure) in failed {
            pieces.push_front(piece);
            first = Some(failure);
        }
        (copied, pieces, first)
    }

    fn work(&self, ends: &Ends, buffer: &mut Vec<u8>) {
        while let Some(piece) = self.next() {
            let copied = ends.copy(piece, buffer);
            let mut state = self.state();
            match copied {
                Ok(()) => state.copied += piece.range.len,
                Err(failure) => state.failed.push((piece, failure)),
            }
        }
    }

    fn next(&self) -> Option<Piece> {
        let mut state = self.state();
        let is_over = state.begun > 0
            && (state.begun >= self.most || !state.failed.is_empty() || Instant::now() > self.until);
        if is_over {
            return None;
        }
        let piece = Piece::next_of(&mut state.pieces, self.longest)?;
        state.begun += piece.range.len;
        Some(piece)
    }
}
