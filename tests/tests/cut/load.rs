//! Load that keeps a ledger.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use frazil_tests::{Driver, DriverQueue, Request};

use crate::ledger::{Clock, Ledger};

/// Requests in flight of one queue.
const DEPTH: usize = 8;

/// How often a writer looks whether it should end.
const LOOK: Duration = Duration::from_millis(5);

/// No request takes so long, whatever happens to the daemon meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the writers ask for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Mix {
    /// Stamps, and now and then a flush.
    Stamps,
    /// Zeroes as well, with and without unmap.
    Zeroes,
    /// And discards: only for blocks of whole subclusters, for a discard of less may change nothing.
    Discards,
}

/// One disk's writers-to-be: its driver, and a ledger a queue.
pub(crate) struct Disk {
    pub(crate) driver: Driver,
    pub(crate) ledgers: Vec<Ledger>,
}

/// Writers under way, a thread a queue.
pub(crate) struct Load {
    threads: Vec<Vec<JoinHandle<Ledger>>>,
    orders: Arc<Orders>,
}

#[derive(Default)]
struct Orders {
    /// Submit no more.
    stop: AtomicBool,
    /// Wait for nothing: the device is gone.
    leave: AtomicBool,
}

impl Load {
    pub(crate) fn start(disks: Vec<Disk>, mix: Mix, clock: &Arc<Clock>) -> Self {
        let orders = Arc::new(Orders::default());
        let spawn = |(queue, ledger)| {
            let (orders, clock) = (Arc::clone(&orders), Arc::clone(clock));
            std::thread::spawn(move || Writer::new(queue, ledger, mix).run(&orders, &clock))
        };
        let threads = disks.into_iter().map(|mut disk| {
            std::mem::take(&mut disk.driver.queues).into_iter().zip(disk.ledgers).map(spawn).collect()
        });
        Self { threads: threads.collect(), orders: Arc::clone(&orders) }
    }

    /// Connects a driver to each socket and starts.
    pub(crate) fn connect(
        sockets: &[std::path::PathBuf],
        ledgers: Vec<Vec<Ledger>>,
        mix: Mix,
        clock: &Arc<Clock>,
    ) -> Self {
        let connect = |(socket, ledgers): (&std::path::PathBuf, Vec<Ledger>)| {
            let driver = Driver::connect(socket, ledgers.len(), DEPTH, ledgers[0].size()).unwrap();
            Disk { driver, ledgers }
        };
        Self::start(sockets.iter().zip(ledgers).map(connect).collect(), mix, clock)
    }

    /// Ends it with every request answered; the ledgers, by disk and queue.
    pub(crate) fn finish(self) -> Vec<Vec<Ledger>> {
        self.orders.stop.store(true, Ordering::SeqCst);
        self.join()
    }

    /// Ends it with whatever was in flight in the balance: the device is gone, or goes with the drivers.
    pub(crate) fn leave(self) -> Vec<Vec<Ledger>> {
        self.orders.leave.store(true, Ordering::SeqCst);
        self.join()
    }

    fn join(self) -> Vec<Vec<Ledger>> {
        let join = |threads: Vec<JoinHandle<Ledger>>| {
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        };
        self.threads.into_iter().map(join).collect()
    }
}

struct Writer {
    queue: DriverQueue,
    ledger: Ledger,
    mix: Mix,
    /// Each buffer's place; `None` for a flush.
    at: [Option<usize>; DEPTH],
    free: Vec<usize>,
    turn: usize,
}

impl Writer {
    fn new(queue: DriverQueue, ledger: Ledger, mix: Mix) -> Self {
        Self { queue, ledger, mix, at: [None; DEPTH], free: (0..DEPTH).collect(), turn: 0 }
    }

    fn run(mut self, orders: &Orders, clock: &Clock) -> Ledger {
        let (mut back, mut last) = (Vec::new(), Instant::now());
        while !orders.leave.load(Ordering::SeqCst) {
            if !orders.stop.load(Ordering::SeqCst) {
                self.submit(clock);
            } else if self.queue.in_flight() == 0 {
                break;
            }
            self.queue.kick().unwrap();
            self.queue.wait_for(&mut back, LOOK).unwrap();
            if !back.is_empty() {
                last = Instant::now();
            }
            assert!(last.elapsed() < PATIENCE, "{} requests do not come back", self.queue.in_flight());
            for (buffer, status) in back.drain(..) {
                assert_eq!(status, 0);
                if let Some(place) = self.at[buffer].take() {
                    self.ledger.answered(place, clock.now());
                }
                self.free.push(buffer);
            }
        }
        self.ledger
    }

    fn submit(&mut self, clock: &Clock) {
        while let Some(buffer) = self.free.pop() {
            self.turn += 1;
            if self.turn.is_multiple_of(97) {
                self.queue.queue(buffer, Request::Flush).unwrap();
                continue;
            }
            // A stride that has no factor in common with a number of places that is a power of two.
            let place = self.turn * 7919 % self.ledger.places();
            if self.at.contains(&Some(place)) {
                self.free.push(buffer);
                return;
            }
            let request = self.next(buffer, place, clock);
            self.at[buffer] = Some(place);
            self.queue.queue(buffer, request).unwrap();
        }
    }

    fn next(&mut self, buffer: usize, place: usize, clock: &Clock) -> Request {
        let (offset, len) = (self.ledger.offset(place), self.ledger.size() as u64);
        let zero = match (self.mix, self.turn % 7) {
            (Mix::Discards, 0) => Some(Request::Discard(offset, len)),
            (Mix::Discards | Mix::Zeroes, 2) => Some(Request::WriteZeroes(offset, len, true)),
            (Mix::Discards | Mix::Zeroes, 4) => Some(Request::WriteZeroes(offset, len, false)),
            _ => None,
        };
        match zero {
            Some(request) => {
                self.ledger.zero(place, clock.now());
                request
            }
            None => {
                let bytes = self.ledger.stamp(place, clock.now());
                self.queue.fill(buffer, &bytes);
                Request::Write(offset)
            }
        }
    }
}
