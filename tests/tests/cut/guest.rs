//! A guest that outlives the daemon: its rings and its in-flight record stay when the connection goes, as QEMU keeps them.
//!
//! It asks for changes and for what it has written, a request a place at a time, and takes each answer as it comes: there
//! must be one to each request, however often the daemon is killed in between, none with an error, and what is read must
//! be what was written last.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use frazil_tests::FrontEnd;
use vm_memory::{Bytes, GuestAddress};

use crate::ledger::{Clock, Ledger};
use crate::load::Mix;

/// Requests in flight of one ring: each takes three descriptors of its own.
const DEPTH: usize = 16;

/// Where a ring's requests are, and one's header, status, range and data.
const RING: u64 = 0x4_0000;
const SLOT: u64 = 0x2000;
const STATUS: u64 = 0x10;
const RANGE: u64 = 0x20;
const DATA: u64 = 0x1000;

/// The kinds of requests (virtio 1.3, section 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// After so long without an answer it asks whether the daemon is there.
const QUIET: Duration = Duration::from_millis(10);

/// No request takes so long, whatever happens to the daemon meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest under way, with a ring for each ledger.
pub(crate) struct Guest {
    thread: JoinHandle<Vec<Ledger>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// When the first answer came after each time that the daemon had gone.
    back: Mutex<Vec<Instant>>,
}

impl Guest {
    pub(crate) fn start(socket: &Path, ledgers: Vec<Ledger>, mix: Mix, clock: &Arc<Clock>) -> Self {
        let shared = Arc::new(Shared::default());
        let mut front_end = FrontEnd::connect(socket, ledgers.len(), 0).unwrap();
        front_end.track().unwrap();
        front_end.set_memory(2).unwrap();
        (0..ledgers.len()).for_each(|ring| front_end.start(ring).unwrap());
        let rings = ledgers.into_iter().map(|ledger| Ring { ledger, asked: Default::default() }).collect();
        let (clock, socket) = (Arc::clone(clock), socket.to_owned());
        let mut writer = Writer {
            front_end,
            socket,
            rings,
            mix,
            clock,
            shared: Arc::clone(&shared),
            turn: 0,
            gone: false,
        };
        let thread = thread::spawn(move || {
            writer.run();
            writer.rings.into_iter().map(|ring| ring.ledger).collect()
        });
        Self { thread, shared }
    }

    /// When it had its first answers after the daemon had gone.
    pub(crate) fn back(&self) -> Vec<Instant> {
        assert!(!self.thread.is_finished(), "the guest has failed");
        self.shared.back.lock().unwrap().clone()
    }

    /// Ends it with every request answered.
    pub(crate) fn finish(self) -> Vec<Ledger> {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

/// What a request is about.
#[derive(Clone, Debug)]
enum Asked {
    Change(usize),
    /// What is expected there.
    Read(usize, Vec<u8>),
    Flush,
}

struct Ring {
    ledger: Ledger,
    /// By the number of the request's descriptors.
    asked: [Option<Asked>; DEPTH],
}

impl Ring {
    fn is_busy(&self, place: usize) -> bool {
        let about = |asked: &Asked| matches!(asked, Asked::Change(at) | Asked::Read(at, _) if *at == place);
        self.asked.iter().flatten().any(about)
    }
}

struct Writer {
    front_end: FrontEnd,
    socket: PathBuf,
    rings: Vec<Ring>,
    mix: Mix,
    clock: Arc<Clock>,
    shared: Arc<Shared>,
    turn: usize,
    gone: bool,
}

impl Writer {
    fn run(&mut self) {
        let mut last = Instant::now();
        loop {
            let stop = self.shared.stop.load(Ordering::SeqCst);
            if stop && self.rings.iter().all(|ring| ring.asked.iter().all(Option::is_none)) {
                return;
            }
            let mut any = false;
            for ring in 0..self.rings.len() {
                while let Some((head, _)) = self.front_end.used(ring, Duration::ZERO) {
                    self.answered(ring, head as usize / 3);
                    any = true;
                }
                if !stop && !self.gone {
                    self.submit(ring);
                }
            }
            if any {
                last = Instant::now();
            } else if last.elapsed() > QUIET {
                self.look_after();
                thread::sleep(Duration::from_millis(1));
            } else {
                thread::sleep(Duration::from_micros(50));
            }
            assert!(last.elapsed() < PATIENCE, "requests do not come back: {:?}", self.rings[0].asked);
        }
    }

    /// Connects again if the daemon has gone.
    fn look_after(&mut self) {
        use vhost::VhostBackend;
        if !self.gone && self.front_end.messages().get_features().is_err() {
            self.gone = true;
        }
        if self.gone && self.front_end.reconnect(&self.socket).is_ok() {
            self.gone = false;
            // What was in flight comes back by itself. Something is asked for in any case.
            (0..self.rings.len()).for_each(|ring| self.submit(ring));
            let deadline = Instant::now() + PATIENCE;
            let mut back = None;
            while back.is_none() {
                assert!(Instant::now() < deadline, "nothing was answered after the daemon came back");
                back = self.front_end.used(0, QUIET);
                if back.is_none() && self.front_end.messages().get_features().is_err() {
                    self.gone = true;
                    return;
                }
            }
            self.shared.back.lock().unwrap().push(Instant::now());
            back.into_iter().for_each(|(head, _)| self.answered(0, head as usize / 3));
        }
    }

    fn answered(&mut self, ring: usize, slot: usize) {
        let at = at(ring, slot);
        let status: u8 = self.front_end.memory().read_obj(GuestAddress(at + STATUS)).unwrap();
        let Ring { ledger, asked } = &mut self.rings[ring];
        let asked = asked[slot].take().unwrap_or_else(|| panic!("request {slot} was answered twice"));
        assert_eq!(status, 0, "{asked:?}");
        match asked {
            Asked::Change(place) => ledger.answered(place, self.clock.now()),
            Asked::Read(place, expected) => {
                let mut found = vec![0; expected.len()];
                self.front_end.memory().read_slice(&mut found, GuestAddress(at + DATA)).unwrap();
                assert!(found == expected, "place {place} is not what was written: {:?}", &found[..16]);
            }
            Asked::Flush => {}
        }
    }

    fn submit(&mut self, ring: usize) {
        for slot in 0..DEPTH {
            if self.rings[ring].asked[slot].is_some() {
                continue;
            }
            self.turn += 1;
            let place = self.turn * 7919 % self.rings[ring].ledger.places();
            if !self.rings[ring].is_busy(place) {
                let asked = self.ask(ring, slot, place);
                self.rings[ring].asked[slot] = Some(asked);
                self.front_end.offer(ring, 3 * slot as u16);
            }
        }
    }

    /// Puts a request into the ring's table.
    fn ask(&mut self, ring: usize, slot: usize, place: usize) -> Asked {
        let (at, memory, ledger) = (at(ring, slot), self.front_end.memory(), &mut self.rings[ring].ledger);
        let (offset, size, now) = (ledger.offset(place), ledger.size() as u32, self.clock.now());
        let zero = |kind, unmap: u32| {
            let range = [(offset / 512) as u32, 0, size / 512, unmap];
            memory.write_slice(&range.map(u32::to_le_bytes).concat(), GuestAddress(at + RANGE)).unwrap();
            (kind, 0, Some((at + RANGE, 16, FrontEnd::NEXT)))
        };
        let data = |flags| Some((at + DATA, size, FrontEnd::NEXT | flags));
        let mut asked = Asked::Change(place);
        let (kind, sector, data) = match (self.mix, self.turn % 7) {
            (Mix::Discards, 0) => zero(DISCARD, 0),
            (Mix::Discards | Mix::Zeroes, 2) => zero(WRITE_ZEROES, 1),
            (Mix::Discards | Mix::Zeroes, 4) => zero(WRITE_ZEROES, 0),
            (_, 5) => {
                asked = Asked::Read(place, ledger.content(place));
                (IN, offset / 512, data(FrontEnd::WRITE))
            }
            (_, 6) if self.turn.is_multiple_of(5) => {
                asked = Asked::Flush;
                (FLUSH, 0, None)
            }
            _ => {
                let bytes = ledger.stamp(place, now);
                memory.write_slice(&bytes, GuestAddress(at + DATA)).unwrap();
                (OUT, offset / 512, data(0))
            }
        };
        if !matches!(kind, IN | OUT | FLUSH) {
            ledger.zero(place, now);
        }
        memory.write_obj(u8::MAX, GuestAddress(at + STATUS)).unwrap();
        self.front_end.header(at, kind, sector);
        let first = 3 * slot as u16;
        let status = (at + STATUS, 1, FrontEnd::WRITE, 0);
        let table = FrontEnd::table(ring);
        match data {
            Some((addr, len, flags)) => {
                let chain = [(at, 16, FrontEnd::NEXT, first + 1), (addr, len, flags, first + 2), status];
                self.front_end.descriptors(table, first, &chain);
            }
            None => self.front_end.descriptors(table, first, &[(at, 16, FrontEnd::NEXT, first + 1), status]),
        }
        asked
    }
}

fn at(ring: usize, slot: usize) -> u64 {
    FrontEnd::DATA + ring as u64 * RING + slot as u64 * SLOT
}
