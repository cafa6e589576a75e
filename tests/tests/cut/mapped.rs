//! A front-end that has ever more mapped, of a file that takes no room.

use std::fs::File;
use std::os::fd::AsRawFd;

use frazil_tests::{Driver, FrontEnd, Request};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;

use crate::faults::{CHUNK, wanted, write};
use crate::full::in_memory;
use crate::served::Served;

/// Bytes of a piece of memory.
const PIECE: u64 = 4 << 40;

#[test]
fn a_disk_of_two_has_half_of_what_may_be_mapped_and_the_daemon_serves_on() {
    let served = Served::start_in(in_memory(), wanted(2, "raw"), "");
    let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(PIECE).unwrap();
    let mut neighbour = Driver::connect(&served.sockets[1], 1, 1, CHUNK).unwrap();
    let had = served.held();
    for _ in 0..3 {
        let mut front_end = FrontEnd::connect(&served.sockets[0], 1, 0).unwrap();
        let adds = |index: &u64| {
            let at = index * PIECE;
            let piece = VhostUserMemoryRegionInfo {
                guest_phys_addr: at,
                memory_size: PIECE,
                userspace_addr: at,
                mmap_offset: 0,
                mmap_handle: file.as_raw_fd(),
            };
            front_end.messages().add_mem_region(&piece).is_ok()
        };
        assert_eq!((0..40).take_while(adds).count(), 14, "of 112 TiB");
        assert_eq!(neighbour.queues[0].ask(Request::Write(0)), 0);
        drop(front_end);
        served.lets_go(had);
    }
    write(&served, 0, 0..1, 7);
}
