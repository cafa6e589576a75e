//! A disk that grows while it is served.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use block::testing::MemStorage;
use block::{Disk, RawDisk};
use frazil_tests::{Driver, FrontEnd, Request};
use vhost::vhost_user::VhostUserFrontend;

use super::served::{MIB, Served};

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, version 1, no payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

fn growing() -> (Served, Arc<RawDisk>) {
    let disk = Arc::new(RawDisk::new(Arc::new(MemStorage::new(MIB)), false).unwrap());
    (Served::disk(Arc::clone(&disk) as _, 1), disk)
}

fn capacity(front_end: &mut FrontEnd) -> u64 {
    let sectors = front_end.config(0, 8).unwrap();
    u64::from_le_bytes(sectors.try_into().unwrap()) * 512
}

#[test]
fn the_front_end_is_told_and_reads_the_new_size() {
    let (served, disk) = growing();
    let notifier = served.server.notifier();
    assert!(!notifier.resized(), "nobody is connected");
    for round in 1..=3_u64 {
        let before = disk.capacity();
        let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
        assert_eq!(capacity(&mut front_end), before);
        let (mut channel, theirs) = UnixStream::pair().unwrap();
        channel.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        front_end.messages().set_backend_request_fd(&theirs).unwrap();
        drop(theirs);
        let size = before + round * MIB as u64;
        disk.grow(size).unwrap();
        assert!(notifier.resized(), "round {round}");
        let mut told = [0; 12];
        channel.read_exact(&mut told).unwrap();
        assert_eq!(told.to_vec(), CONFIG_CHANGE.map(u32::to_ne_bytes).concat());
        assert_eq!(capacity(&mut front_end), size);
        drop(front_end);
        served.wait_sessions(round as usize);
        assert!(!notifier.resized(), "the session is over");
    }
}

/// `virtio-driver` gives no channel: it reads the size when it connects.
#[test]
fn a_front_end_without_a_channel_reads_the_new_end_all_the_same() {
    let (served, disk) = growing();
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    let end = MIB as u64;
    assert_eq!(driver.queues[0].ask(Request::Read(end)), -5);
    disk.grow(2 * end).unwrap();
    assert!(!served.server.notifier().resized());
    assert_eq!(driver.queues[0].ask(Request::Read(end)), 0);
    assert_eq!(driver.queues[0].bytes(0), [0; 4096]);
    driver.queues[0].fill(0, &[5; 4096]);
    assert_eq!(driver.queues[0].ask(Request::Write(2 * end - 4096)), 0);
    drop(driver);
    let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
    assert_eq!(driver.capacity().unwrap(), 2 * end);
    assert_eq!(driver.queues[0].ask(Request::Read(2 * end - 4096)), 0);
    assert_eq!(driver.queues[0].bytes(0), [5; 4096]);
}

/// One that does not read what it is told must not hold up who tells it.
#[test]
fn a_channel_that_is_full_is_no_obstacle() {
    let (served, _) = growing();
    let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
    let (_channel, theirs) = UnixStream::pair().unwrap();
    front_end.messages().set_backend_request_fd(&theirs).unwrap();
    let notifier = served.server.notifier();
    let told = (0..1_000_000).take_while(|_| notifier.resized()).count();
    assert!((1..1_000_000).contains(&told));
    assert_eq!(capacity(&mut front_end), MIB as u64);
}
