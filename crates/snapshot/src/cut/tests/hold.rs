//! Real gates and threads: the hold of two phases, the lease, and the instant of a group.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::Waker;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use block::{ErrorKind, Gate, Lane, Result};

use super::super::*;
use super::world::World;
use crate::{Event, FreezeOwner, FreezePolicy, SnapshotDisk, SnapshotRecord};

/// Two disks, each a number: the newest write that it holds.
#[derive(Default)]
struct Disks {
    gates: [Arc<Gate>; 2],
    newest: [AtomicU64; 2],
    stop: AtomicBool,
    /// What the pivot found.
    cut: Mutex<Option<[u64; 2]>>,
}

impl Disks {
    /// A guest that writes `n` to the first disk, waits for the answer, and then writes it to the second.
    fn write(self: &Arc<Self>) -> JoinHandle<()> {
        let disks = Arc::clone(self);
        let lanes: Vec<Lane> = self.gates.iter().map(|gate| gate.lane(Waker::noop().clone())).collect();
        thread::spawn(move || {
            for number in 1.. {
                for (lane, newest) in lanes.iter().zip(&disks.newest) {
                    while !lane.enter() {
                        if disks.stop.load(Ordering::Relaxed) {
                            return;
                        }
                        thread::yield_now();
                    }
                    newest.store(number, Ordering::Relaxed);
                    lane.leave(1);
                }
                if disks.stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        })
    }

    fn newest(&self) -> [u64; 2] {
        [0, 1].map(|disk| self.newest[disk].load(Ordering::SeqCst))
    }

    fn cut(self: &Arc<Self>, limits: Limits) -> Cut {
        let mut plan = World::plan(FreezePolicy::Never, FreezeOwner::Frazil);
        plan.limits = limits;
        let ports = CutPorts {
            gates: Box::new(GateGroup::new(self.gates.to_vec())),
            freezer: None,
            clock: Arc::new(SystemClock),
            events: Arc::new(Deaf),
        };
        Cut::new(plan, ports)
    }

    fn layers(self: &Arc<Self>) -> Box<DiskLayers> {
        Box::new(DiskLayers(Arc::clone(self)))
    }
}

struct Deaf;

impl Events for Deaf {
    fn emit(&self, _event: Event) {}
}

struct DiskLayers(Arc<Disks>);

impl Layers for DiskLayers {
    fn prepare(self: Box<Self>) -> Result<Box<dyn PreparedLayers>> {
        Ok(self)
    }
}

impl PreparedLayers for DiskLayers {
    fn undo(self: Box<Self>) -> Result<()> {
        Ok(())
    }

    fn pivot(self: Box<Self>) -> Box<dyn PivotedLayers> {
        *self.0.cut.lock().unwrap() = Some(self.0.newest());
        self
    }
}

impl PivotedLayers for DiskLayers {
    fn disks(&self) -> Vec<SnapshotDisk> {
        Vec::new()
    }

    fn record(&mut self, _record: &SnapshotRecord) -> Result<()> {
        Ok(())
    }

    fn seal(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Whoever waits for the first disk's answer before writing to the second must find that order in every snapshot.
#[test]
fn a_group_is_cut_at_one_instant() {
    let disks = Arc::new(Disks::default());
    let writer = disks.write();
    for _ in 0..200 {
        disks.cut(Limits::default()).take(disks.layers()).unwrap();
        let [first, second] = disks.cut.lock().unwrap().take().unwrap();
        assert!(first == second || first == second + 1, "cut between {first} and {second}");
    }
    disks.stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
}

#[test]
fn nothing_is_written_while_held_and_all_goes_on_when_the_lease_ends() {
    let disks = Arc::new(Disks::default());
    let writer = disks.write();
    let held = disks.cut(Limits::default()).prepare(disks.layers()).unwrap();
    let before = disks.newest();
    // The one who holds the lease: release or the end of the lease, whichever comes first.
    let (release, released) = mpsc::channel::<()>();
    let keeper = thread::spawn(move || {
        let lease = Duration::from_millis(50);
        assert!(released.recv_timeout(lease).is_err(), "nobody releases in this test");
        held.abort("its lease has ended").unwrap();
    });
    thread::sleep(Duration::from_millis(20));
    assert_eq!(disks.newest(), before);
    keeper.join().unwrap();
    drop(release);
    let opened = Instant::now();
    while disks.newest() == before {
        assert!(opened.elapsed() < Duration::from_secs(10), "the writer does not go on");
        thread::yield_now();
    }
    disks.stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    assert_eq!(*disks.cut.lock().unwrap(), None);
}

#[test]
fn a_request_that_hangs_ends_the_cut_at_its_deadline_with_open_gates() {
    let disks = Arc::new(Disks::default());
    let lane = disks.gates[1].lane(Waker::noop().clone());
    assert!(lane.enter());
    let limits = Limits { drain: Duration::from_millis(20), ..Limits::default() };
    let error = disks.cut(limits).prepare(disks.layers()).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(disks.gates.iter().all(|gate| !gate.is_closed()));
    lane.leave(1);
}

#[test]
fn the_longest_wait_before_the_gates_is_measured() {
    let disks = Arc::new(Disks::default());
    let lane = disks.gates[0].lane(Waker::noop().clone());
    let held = disks.cut(Limits::default()).prepare(disks.layers()).unwrap();
    assert!(!lane.enter());
    thread::sleep(Duration::from_millis(5));
    let timing = held.release().unwrap().timing;
    assert!(timing.longest_wait >= 5.0 && timing.longest_wait <= timing.gate_closed, "{timing:?}");
}
