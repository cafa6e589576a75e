use super::*;

use block::RawDisk;
use block::testing::MemStorage;
use vm_memory::GuestAddress;

const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const SIZE: u16 = 16;

fn worker() -> (Worker, Vring, Memory) {
    let guest = Memory::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
    let memory = SharedMemory::new(guest.clone());
    let worker = Worker::new(Parts {
        name: "vda".to_owned(),
        queue: 0,
        disk: Arc::new(RawDisk::new(Arc::new(MemStorage::new(4096)), false).unwrap()),
        serial: [0; ID_LEN],
        gate: Arc::default(),
        pulse: Arc::default(),
        parking: Arc::default(),
        on_failure: Arc::new(|_| {}),
        cache: Arc::new(CacheMode::new()),
        memory: memory.clone(),
        state: Arc::new(QueueState::new().unwrap()),
    });
    let vring = Vring::new(memory, 256).unwrap();
    vring.set_queue_size(SIZE);
    vring.set_queue_info(0, AVAIL, USED).unwrap();
    vring.set_queue_event_idx(true);
    vring.set_enabled(true);
    vring.set_queue_ready(true);
    (worker.unwrap(), vring, guest)
}

/// GET_VRING_BASE may be answered between a worker's last look at the ring and its wish for kicks. The guest uses the
/// ring's memory for something else by then.
#[test]
fn a_ring_that_was_stopped_is_not_written_to() {
    let (mut worker, vring, guest) = worker();
    let avail_event = GuestAddress(USED + 4 + 8 * u64::from(SIZE));
    assert_eq!(worker.pop(&vring), Popped::Empty);
    vring.set_queue_ready(false);
    guest.write_obj(0x5555_u16, avail_event).unwrap();
    guest.write_obj(7_u16, GuestAddress(AVAIL + 2)).unwrap();
    assert!(!worker.rearm(&vring));
    assert_eq!(guest.read_obj::<u16>(avail_event).unwrap(), 0x5555);
    vring.set_queue_ready(true);
    assert!(worker.rearm(&vring), "seven requests wait");
    assert_eq!(guest.read_obj::<u16>(avail_event).unwrap(), 0);
}
