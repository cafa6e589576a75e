//! A guest's memory of any content, and a worker with a disk in memory.

use std::cell::RefCell;
use std::sync::Arc;

use block::testing::{Input, MemStorage};
use block::{RawDisk, Storage};
use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::guest::{AVAIL, MAX_SIZE, MEMORY, Model, REGIONS, SERIAL, USED};
use crate::allowance::Allowance;
use crate::cache::CacheMode;
use crate::dirty::Dirty;
use crate::floor::Claim;
use crate::guest::Memory;
use crate::inflight::Records;
use crate::maps::Maps;
use crate::queue_state::QueueState;
use crate::vring::Vring;
use crate::worker::{Parts, Worker};

/// Bytes of the disk.
const DISK: usize = 16 << 10;

/// Turns that a guest gets which keeps its ring busy by itself.
const TURNS: usize = 2;

/// Turns in which the last requests of a ring that is stopped are answered: of a turn's last batch some may be left.
const LAST_TURNS: usize = 100;

/// A worker, its guest and its disk. Used again by all inputs: to make a ring takes longer than to work one off.
struct Rig {
    worker: Worker,
    vring: Vring,
    state: Arc<QueueState>,
    guest: Memory,
    storage: Arc<MemStorage>,
}

impl Rig {
    fn new(read_only: bool) -> Self {
        let guest = Memory::from_ranges(&REGIONS.map(|(addr, len)| (GuestAddress(addr), len))).unwrap();
        let maps = Arc::new(Maps::new(Allowance::share(1)).unwrap());
        maps.announce(guest.iter().map(GuestMemoryRegion::len)).unwrap();
        maps.publish(&guest).unwrap();
        let memory = maps.current();
        let storage = Arc::new(MemStorage::new(DISK));
        let disk = Arc::new(RawDisk::new(Arc::clone(&storage) as _, read_only).unwrap());
        let state = Arc::new(QueueState::new().unwrap());
        let worker = Worker::new(Parts {
            name: "fuzzed".to_owned(),
            queue: 0,
            disk,
            serial: SERIAL,
            gate: Arc::default(),
            pulse: Arc::default(),
            parking: Arc::default(),
            on_failure: Arc::new(|_| {}),
            cache: Arc::new(CacheMode::new(Arc::default())),
            dirty: Arc::new(Dirty::new(1)),
            claim: Arc::new(Claim::new(&Arc::default())),
            maps,
            records: Records::default(),
            state: Arc::clone(&state),
        });
        let vring = Vring::new(memory, 1024).unwrap();
        vring.set_enabled(true);
        Self { worker: worker.unwrap(), vring, state, guest, storage }
    }

    /// Works off a ring that is at these places, from its beginning on.
    fn run(&mut self, memory: &[u8], size: u16, [table, avail, used]: [u64; 3], event_idx: bool) {
        self.write(memory);
        self.vring.set_queue_ready(false);
        self.vring.set_queue_next_avail(0);
        self.vring.set_queue_size(size);
        // Places that are not aligned are refused, and the ring is where it was before.
        let _ = self.vring.set_queue_info(table, avail, used);
        self.vring.set_queue_event_idx(event_idx);
        self.vring.set_queue_ready(true);
        (0..TURNS).for_each(|_| self.worker.turn(&self.vring));
        self.vring.set_queue_ready(false);
        for _ in 0..LAST_TURNS {
            if self.state.in_flight() == 0 {
                return;
            }
            self.worker.turn(&self.vring);
        }
        panic!("{} requests were not answered", self.state.in_flight());
    }

    fn write(&self, memory: &[u8]) {
        let mut rest = memory;
        for (addr, len) in REGIONS {
            let (now, after) = rest.split_at(len);
            self.guest.write_slice(now, GuestAddress(addr)).unwrap();
            rest = after;
        }
        let content: Vec<u8> = (0..DISK).map(|at| (at / 3 + at / 512) as u8).collect();
        self.storage.write_at(&content, 0).unwrap();
    }

    fn read(&self) -> Vec<u8> {
        let part = |(addr, len): (u64, usize)| {
            let mut bytes = vec![0; len];
            self.guest.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
            bytes
        };
        REGIONS.map(part).concat()
    }
}

thread_local! {
    /// The one's disk may be written, the other's not.
    static RIGS: RefCell<[Rig; 2]> = RefCell::new([Rig::new(false), Rig::new(true)]);
}

/// Whatever a guest's memory holds, what becomes of it and of the disk is what a plain reading of the specification says:
/// so nothing outside of either is touched, and each byte of a chain counts as one thing only. A ring that is anywhere, of
/// any size, is worked off without harm.
pub fn virtio_requests(data: &[u8]) {
    let mut input = Input(data);
    let mode = input.byte();
    let read_only = mode & 1 != 0;
    RIGS.with_borrow_mut(|rigs| {
        let rig = &mut rigs[usize::from(read_only)];
        if mode & 2 != 0 {
            let (size, places) = (1 << (input.byte() % 11), [0; 3].map(|_| place(&mut input)));
            return rig.run(&image(input), size, places, mode & 4 != 0);
        }
        let (size, memory) = (1 << (mode >> 2 & 3).min(2), image(input));
        assert!(size <= MAX_SIZE);
        rig.write(&memory);
        let mut model = Model::new(memory, rig.storage.bytes(), read_only, size);
        let ends = model.run();
        let before = image(input);
        rig.run(&before, size, [0, AVAIL, USED], false);
        if ends {
            let found = rig.read();
            let differs = |at: &usize| found[*at] != model.memory[*at];
            let first = (0..MEMORY).find(differs);
            assert!(first.is_none(), "the guest's memory differs from {first:#x?} on");
            assert!(rig.storage.bytes() == model.disk, "the disk differs");
        }
    });
}

/// The guest's memory: these bytes, and zeroes behind them.
fn image(input: Input<'_>) -> Vec<u8> {
    let mut memory = input.0.to_vec();
    memory.resize(MEMORY, 0);
    memory
}

/// Mostly somewhere in memory, aligned.
fn place(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        0..=0xef => input.number(2) % 0x6000 / 16 * 16,
        _ => input.number(8),
    }
}
