//! How long a worker that has nothing to do looks for more before it sleeps.

use std::time::{Duration, Instant};

/// The longest look, that of QEMU's I/O threads. Waking a sleeper takes nearly as long on many machines, and the
/// driver pays for the kick too: in a virtual machine, with an exit.
const LOOK: Duration = Duration::from_micros(32);

/// Rests in a row, at most, that are not preceded by a look.
const MAX_SKIPPED: u32 = 256;

/// Looks for work before a rest, as long as that pays.
///
/// After a look in vain the next rests come without one, twice as many each time; after one that found something each
/// rest is preceded by a look again. So a busy queue is served without sleeping, and a queue with a request now and
/// then costs a look in some hundred requests. An idle one costs nothing: it is looked at once, and then the worker
/// sleeps.
#[derive(Debug)]
pub(crate) struct Patience {
    /// Rests still to come without a look.
    skip: u32,
    /// What `skip` will be after the next look in vain.
    penalty: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self { skip: 0, penalty: 1 }
    }
}

impl Patience {
    /// Asks `found` again and again; `false` if it is time to sleep.
    pub(crate) fn wait(&mut self, mut found: impl FnMut() -> bool) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        let start = Instant::now();
        loop {
            if found() {
                self.penalty = 1;
                return true;
            }
            if start.elapsed() >= LOOK {
                self.skip = self.penalty;
                self.penalty = (self.penalty * 2).min(MAX_SKIPPED);
                return false;
            }
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rests until the next look, counting it.
    fn rests_to_next_look(patience: &mut Patience, result: bool) -> u32 {
        let mut rests = 1;
        loop {
            let mut looked = false;
            patience.wait(|| {
                looked = true;
                result
            });
            if looked {
                return rests;
            }
            rests += 1;
        }
    }

    #[test]
    fn looks_in_vain_get_rare_and_one_success_brings_them_back() {
        let mut patience = Patience::default();
        let vain: Vec<u32> = (0..5).map(|_| rests_to_next_look(&mut patience, false)).collect();
        assert_eq!(vain, [1, 2, 3, 5, 9]);
        assert_eq!(rests_to_next_look(&mut patience, true), 17);
        assert_eq!(rests_to_next_look(&mut patience, true), 1);
        let _: u32 = (0..20).map(|_| rests_to_next_look(&mut patience, false)).sum();
        assert_eq!(rests_to_next_look(&mut patience, false), MAX_SKIPPED + 1);
    }

    #[test]
    fn a_look_ends() {
        let start = Instant::now();
        assert!(!Patience::default().wait(|| false));
        assert!(start.elapsed() >= LOOK);
    }
}
