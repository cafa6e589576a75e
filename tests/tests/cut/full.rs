//! Disks that are full: the guest's writes fail, or wait, nothing else does, and once there is room again they succeed.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use control::client::Client;
use frazil_tests::{Driver, Request};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};

use crate::images::{check_sound, qemu_img, same};
use crate::ledger::Clock;
use crate::served::{Served, Wanted};

const BLOCK: u64 = 4096;
/// Of an overlay: a block in each is new room.
const CLUSTER: u64 = 128 << 10;
const CLUSTERS: u64 = 64;
const EIO: i32 = -5;

fn wanted(format: &'static str) -> Wanted {
    Wanted { format, cache: "writeback", disks: 1, queues: 1, bytes: CLUSTERS * CLUSTER }
}

/// What a guest knows of its blocks: the byte that fills the block at the start of each cluster.
struct Guest {
    driver: Driver,
    acknowledged: Vec<u8>,
}

impl Guest {
    fn write(&mut self, cluster: u64, byte: u8) -> i32 {
        let queue = &mut self.driver.queues[0];
        queue.fill(0, &[byte; BLOCK as usize]);
        let status = queue.ask(Request::Write(cluster * CLUSTER));
        if status == 0 {
            self.acknowledged[cluster as usize] = byte;
        }
        status
    }

    /// Every write that was acknowledged is there, and of those that failed nothing.
    fn verify(&mut self) {
        for (cluster, byte) in (0..).zip(&self.acknowledged) {
            let queue = &mut self.driver.queues[0];
            assert_eq!(queue.ask(Request::Read(cluster * CLUSTER)), 0);
            assert!(queue.bytes(0) == [*byte; BLOCK as usize], "cluster {cluster}");
        }
    }

    fn flush(&mut self) -> i32 {
        self.driver.queues[0].ask(Request::Flush)
    }
}

/// Runs out of room by `fill`, gets it back by `free`.
fn drill(mut served: Served, fill: impl FnOnce(&Served), free: impl FnOnce(&Served)) {
    let clock = Clock::new();
    served.snapshot("before", &clock);
    let driver = Driver::connect(&served.sockets[0], 1, 1, BLOCK as usize).unwrap();
    let mut guest = Guest { driver, acknowledged: vec![0; CLUSTERS as usize] };
    (0..8).for_each(|cluster| assert_eq!(guest.write(cluster, 1), 0));
    assert_eq!(guest.flush(), 0);
    fill(&served);
    // What has room already is still written.
    (0..8).for_each(|cluster| assert_eq!(guest.write(cluster, 2), 0));
    let statuses: Vec<_> = (8..CLUSTERS).map(|cluster| guest.write(cluster, 2)).collect();
    assert!(statuses.iter().all(|status| [0, EIO].contains(status)), "{statuses:?}");
    assert!(statuses.contains(&EIO), "there was room after all");
    guest.verify();
    // Whether these succeed depends on what little room they take. They answer.
    let _ = guest.flush();
    let mut client: Client = served.qmp();
    let taken = client.execute("snapshot-create", json!({ "name": "full" }), |_, _| {}).is_ok();
    assert_eq!(served.names().contains(&"full".to_owned()), taken);
    guest.verify();

    free(&served);
    (0..CLUSTERS).for_each(|cluster| assert_eq!(guest.write(cluster, 3), 0, "cluster {cluster}"));
    assert_eq!(guest.flush(), 0);
    guest.verify();
    served.snapshot("after", &clock);
    drop(guest);
    assert!(served.export("before", "vd0").iter().all(|byte| *byte == 0));
    let export = served.export_file("after", "vd0");
    served.stop();
    let layers = served.layers("vd0");
    layers.iter().filter(|(_, format)| format == "qcow2").for_each(|(path, _)| check_sound(path));
    same(&export, &layers.last().unwrap().0, "qcow2");
}

/// What `query-block` says of the disk's requests.
fn io_status(served: &Served) -> String {
    served.ask("query-block", json!({}))[0]["io-status"].as_str().unwrap().to_owned()
}

/// Runs out of room by `fill`, with writes in flight that then wait, and gets it back by `free`.
fn wait_for_room(mut served: Served, fill: impl FnOnce(&Served), free: impl FnOnce(&Served)) {
    const WRITES: usize = 32;
    let clock = Clock::new();
    served.snapshot("before", &clock);
    let mut driver = Driver::connect(&served.sockets[0], 1, WRITES + 1, BLOCK as usize).unwrap();
    let queue = &mut driver.queues[0];
    assert_eq!(queue.ask(Request::Write(0)), 0);
    assert_eq!(queue.ask(Request::Flush), 0);
    let mut events = served.qmp();
    fill(&served);
    for index in 0..WRITES {
        queue.fill(index, &[index as u8 + 1; BLOCK as usize]);
        queue.queue(index, Request::Write((CLUSTERS - 1 - index as u64) * CLUSTER)).unwrap();
    }
    queue.kick().unwrap();
    let mut back = Vec::new();
    while io_status(&served) == "ok" || queue.in_flight() == WRITES {
        queue.wait_for(&mut back, Duration::from_millis(50)).unwrap();
        if io_status(&served) == "nospace" {
            break;
        }
    }
    let waiting = queue.in_flight();
    assert!(waiting > 0 && back.iter().all(|(_, status)| *status == 0), "{back:?}");
    let (mut told, deadline) = (Vec::<(String, Value)>::new(), Instant::now() + Duration::from_secs(10));
    let (event, data) = loop {
        let found = told.iter().find(|(event, _)| event == "BLOCK_IO_ERROR");
        if let Some(found) = found {
            break found;
        }
        assert!(Instant::now() < deadline, "nobody was told: {told:?}");
        let tell = |event: &str, data: &Value| told.push((event.to_owned(), data.clone()));
        events.execute("query-status", json!({}), tell).unwrap();
    };
    let expected = json!({ "device": "vd0", "operation": "write", "action": "stop", "nospace": true });
    let expected = expected.as_object().unwrap();
    assert!(expected.iter().all(|(key, value)| data[key] == *value), "{event} {data}");
    // Reads go on, and whether a snapshot is taken or not, nothing waits for the room.
    queue.queue(WRITES, Request::Read(0)).unwrap();
    queue.kick().unwrap();
    let before = back.len();
    while back.len() == before {
        queue.wait_for(&mut back, Duration::from_millis(50)).unwrap();
    }
    assert_eq!(back.last(), Some(&(WRITES, 0)));
    let taken = served.qmp().execute("snapshot-create", json!({ "name": "full" }), |_, _| {}).is_ok();
    assert_eq!(served.names().contains(&"full".to_owned()), taken);

    free(&served);
    served.ask("cont", json!({}));
    while queue.in_flight() > 0 {
        queue.wait_for(&mut back, Duration::from_millis(50)).unwrap();
    }
    assert!(back.iter().all(|(_, status)| *status == 0), "{back:?}");
    for index in 0..WRITES {
        assert_eq!(queue.ask(Request::Read((CLUSTERS - 1 - index as u64) * CLUSTER)), 0);
        assert!(queue.bytes(0) == [index as u8 + 1; BLOCK as usize], "write {index}");
    }
    assert_eq!(queue.ask(Request::Flush), 0);
    assert_eq!(io_status(&served), "ok");
    drop(driver);
    served.stop();
    let layers = served.layers("vd0");
    layers.iter().filter(|(_, format)| format == "qcow2").for_each(|(path, _)| check_sound(path));
}

/// No file may become longer: as on a full disk, and needs no privilege.
pub(crate) fn limit(served: &Served, bytes: Option<u64>) {
    let limit = Rlimit { current: bytes, maximum: None };
    prlimit(Pid::from_raw(served.pid().cast_signed()), Resource::Fsize, limit).unwrap();
}

#[test]
fn files_that_may_not_grow_fail_writes_and_nothing_else() {
    for format in ["raw", "qcow2"] {
        let served = Served::start_in(in_memory(), wanted(format), ",werror=report");
        drill(served, |served| limit(served, Some(20 * CLUSTER)), |served| limit(served, None));
    }
}

#[test]
fn files_that_may_not_grow_make_writes_wait_and_nothing_else() {
    for format in ["raw", "qcow2"] {
        let served = Served::start_in(in_memory(), wanted(format), "");
        wait_for_room(served, |served| limit(served, Some(20 * CLUSTER)), |served| limit(served, None));
    }
}

/// A dirty bitmap of QEMU's that can not be saved is lost, and said to be: the snapshot is taken all the same, and no flush
/// of the guest's fails for it.
#[test]
fn a_dirty_bitmap_that_finds_no_room_costs_no_snapshot() {
    let folder = in_memory();
    let base = folder.path().join("vd0.qcow2");
    let path = base.to_str().unwrap();
    let size = (CLUSTERS * CLUSTER).to_string();
    for words in [&["create", "-q", "-f", "qcow2", path, &size][..], &["bitmap", "--add", path, "lost"]] {
        assert!(qemu_img(words).status.success());
    }
    let mut served = Served::over(folder, std::slice::from_ref(&base), wanted("qcow2"), "");
    let driver = Driver::connect(&served.sockets[0], 1, 1, BLOCK as usize).unwrap();
    let mut guest = Guest { driver, acknowledged: vec![0; CLUSTERS as usize] };
    (0..CLUSTERS).for_each(|cluster| assert_eq!(guest.write(cluster, 1), 0));
    assert_eq!(guest.flush(), 0);
    // Room for the overlay, and none behind the end of the base.
    limit(&served, Some(std::fs::metadata(&base).unwrap().len()));
    served.snapshot("one", &Clock::new());
    limit(&served, None);
    assert_eq!(guest.write(0, 2), 0);
    assert_eq!(guest.flush(), 0);
    guest.verify();
    drop(guest);
    served.stop();
    check_sound(&base);
    let info = qemu_img(&["info", "-f", "qcow2", path]);
    assert!(String::from_utf8_lossy(&info.stdout).contains("in-use"), "{info:?}");
}

pub(crate) fn in_memory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    tempfile::tempdir_in(if memory.is_dir() { memory } else { Path::new(env!("CARGO_TARGET_TMPDIR")) })
        .unwrap()
}

/// A small file system of its own; it is unmounted when this is dropped.
pub(crate) struct Mount(tempfile::TempDir);

impl Mount {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=16M", "tmpfs"]).arg(folder.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        assert!(mounted, "no tmpfs can be mounted here: are you root?");
        Self(folder)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Room for so many MiB in all.
    pub(crate) fn resize(&self, mib: u64) {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,size={mib}M")]).arg(self.path());
        assert!(mount.status().unwrap().success());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// Takes all that is left.
fn fill(filler: &Path) {
    let mut file = std::fs::File::create(filler).unwrap();
    while file.write_all(&[1; BLOCK as usize]).is_ok() {}
}

#[test]
#[ignore = "needs root, to mount a tmpfs"]
fn a_full_file_system_fails_writes_and_nothing_else() {
    let mount = Mount::new();
    for format in ["raw", "qcow2"] {
        let folder = tempfile::tempdir_in(mount.0.path()).unwrap();
        let served = Served::start_in(folder, wanted(format), ",werror=report");
        let filler = mount.0.path().join("filler");
        drill(served, |_| fill(&filler), |_| std::fs::remove_file(&filler).unwrap());
    }
}

#[test]
#[ignore = "needs root, to mount a tmpfs"]
fn a_full_file_system_makes_writes_wait_and_nothing_else() {
    let mount = Mount::new();
    for format in ["raw", "qcow2"] {
        let served = Served::start_in(tempfile::tempdir_in(mount.0.path()).unwrap(), wanted(format), "");
        let filler = mount.0.path().join("filler");
        wait_for_room(served, |_| fill(&filler), |_| std::fs::remove_file(&filler).unwrap());
    }
}
