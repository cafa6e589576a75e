//! Front-ends that go, come and change their mind while a cut is under way: it ends, and they are served.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use frazil_tests::FrontEnd;
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use crate::ledger::{Clock, Cut, Ledger, prove};
use crate::load::{Load, Mix};
use crate::served::{Served, Wanted};

const WANTED: Wanted =
    Wanted { format: "raw", cache: "writeback", disks: 2, queues: 2, bytes: 2 * 64 * 4096 };

/// Long enough for a request that could be taken to be taken.
const MOMENT: Duration = Duration::from_millis(4);
const PATIENCE: Duration = Duration::from_secs(20);

/// What a front-end does while the cut is held.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Goes,
    GoesAndComes,
    StopsItsRing,
    ChangesItsMemory,
}

/// How the hold ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Release,
    Abort,
    Lease,
}

fn connect(served: &Served) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&served.sockets[1], 1, 0).unwrap();
    front_end.set_memory(2).unwrap();
    front_end.start(0).unwrap();
    front_end
}

/// Offers a write of a sector full of `byte`.
fn offer(front_end: &mut FrontEnd, byte: u8) {
    front_end.header(FrontEnd::DATA, 1, 0);
    front_end.memory().write_slice(&[byte; 512], GuestAddress(FrontEnd::DATA + 0x1000)).unwrap();
    let chain = [
        (FrontEnd::DATA, 16, FrontEnd::NEXT, 1),
        (FrontEnd::DATA + 0x1000, 512, FrontEnd::NEXT, 2),
        (FrontEnd::DATA + 0x800, 1, FrontEnd::WRITE, 0),
    ];
    front_end.descriptors(FrontEnd::table(0), 0, &chain);
    front_end.offer(0, 0);
}

fn is_done(front_end: &mut FrontEnd) {
    assert_eq!(front_end.used(0, PATIENCE), Some((0, 1)));
    assert_eq!(front_end.memory().read_obj::<u8>(GuestAddress(FrontEnd::DATA + 0x800)).unwrap(), 0);
}

fn waits(front_end: &mut FrontEnd) {
    assert_eq!(front_end.used(0, MOMENT), None, "a request was taken through a closed gate");
}

/// Does it, with a request of 2s that waits; whoever is connected then has a request of 3s that waits.
fn hold(served: &Served, mut front_end: FrontEnd, deed: Deed) -> Option<FrontEnd> {
    offer(&mut front_end, 2);
    waits(&mut front_end);
    match deed {
        Deed::Goes => return None,
        Deed::GoesAndComes => {
            drop(front_end);
            front_end = connect(served);
        }
        Deed::StopsItsRing => {
            assert_eq!(front_end.stop(0).unwrap(), 1, "the request of before the hold, and no other");
            front_end.rewind();
            front_end.start(0).unwrap();
        }
        Deed::ChangesItsMemory => {
            front_end.set_memory(1).unwrap();
            front_end.set_memory(2).unwrap();
            front_end.stop(0).unwrap();
            front_end.rewind();
            front_end.start(0).unwrap();
        }
    }
    offer(&mut front_end, 3);
    waits(&mut front_end);
    Some(front_end)
}

/// Ends the hold; the cut, if there was one.
fn end(served: &Served, name: &str, asked: u64, clock: &Clock, end: End) -> Option<Cut> {
    match end {
        End::Release => {
            served.ask("snapshot-release", json!({ "name": name }));
            return Some(Cut { name: name.to_owned(), asked, answered: clock.now() });
        }
        End::Abort => drop(served.ask("snapshot-abort", json!({ "name": name }))),
        End::Lease => {
            let deadline = Instant::now() + PATIENCE;
            while served.ask("query-frazil", json!({})).get("prepared").is_some_and(|held| !held.is_null()) {
                assert!(Instant::now() < deadline, "the lease does not end");
                thread::sleep(Duration::from_millis(10));
            }
            // It is being undone: what comes next waits for that, and is refused then.
            served.refusal("snapshot-release", json!({ "name": name }));
        }
    }
    None
}

/// Another disk of the group is under load all the while.
fn drill(deed: Deed) {
    let served = Served::start(WANTED);
    let clock = Arc::new(Clock::new());
    let ledgers = vec![(0..2).map(|queue| Ledger::new(4096, queue, 2, 64)).collect()];
    let load = Load::connect(&served.sockets[..1], ledgers, Mix::Discards, &clock);
    let mut cuts = Vec::new();
    for (number, how) in [End::Release, End::Abort, End::Lease, End::Release].into_iter().enumerate() {
        let mut front_end = connect(&served);
        offer(&mut front_end, 1);
        is_done(&mut front_end);
        let (name, asked) = (format!("held{number}"), clock.now());
        let lease = if matches!(how, End::Lease) { 150 } else { 20_000 };
        served.ask("snapshot-prepare", json!({ "name": name, "lease": lease }));
        let front_end = hold(&served, front_end, deed);
        let cut = end(&served, &name, asked, &clock, how);
        // What waited is served, and whoever comes now is as well.
        front_end.into_iter().for_each(|mut front_end| is_done(&mut front_end));
        let mut next = connect(&served);
        offer(&mut next, 4);
        is_done(&mut next);
        assert_eq!(served.names().contains(&name), cut.is_some());
        cuts.extend(cut);
    }
    let ledgers = load.finish();
    for cut in &cuts {
        prove(cut, &[(served.export(&cut.name, "vd0"), ledgers[0].iter().collect())]);
        assert!(served.export(&cut.name, "vd1")[..512] == [1; 512], "{cut:?}");
    }
}

#[test]
fn a_front_end_that_goes_does_not_hold_the_cut_up() {
    drill(Deed::Goes);
}

#[test]
fn a_front_end_that_goes_and_comes_waits_like_the_others() {
    drill(Deed::GoesAndComes);
}

#[test]
fn a_ring_that_is_stopped_is_answered_and_goes_on_after_the_cut() {
    drill(Deed::StopsItsRing);
}

#[test]
fn memory_that_changes_is_taken_note_of_in_mid_cut() {
    drill(Deed::ChangesItsMemory);
}

/// Front-ends leave with requests in flight, at whatever step the cut is in.
#[test]
fn front_ends_that_leave_at_any_time_leave_exact_snapshots() {
    let served = Arc::new(Served::start(WANTED));
    let clock = Arc::new(Clock::new());
    let asker = {
        let (served, clock) = (Arc::clone(&served), Arc::clone(&clock));
        thread::spawn(move || (0..15).map(|number| served.snapshot(&format!("s{number}"), &clock)).collect())
    };
    let new = |queue| Ledger::new(4096, queue, 2, 64);
    let mut ledgers: Vec<Vec<Ledger>> = vec![(0..2).map(new).collect(); 2];
    let mut round = 0;
    while !asker.is_finished() || round < 15 {
        let load = Load::connect(&served.sockets, ledgers, Mix::Discards, &clock);
        thread::sleep(Duration::from_millis(round * 5 % 17));
        ledgers = load.leave();
        for (disk, ledgers) in ledgers.iter_mut().enumerate() {
            let image = served.read(disk);
            ledgers.iter_mut().for_each(|ledger| ledger.settle(&image, clock.now()));
        }
        round += 1;
    }
    let cuts: Vec<Cut> = asker.join().unwrap();
    for cut in &cuts {
        let images = served.export_all(&cut.name).into_iter();
        let disks: Vec<_> = images.zip(&ledgers).map(|(image, all)| (image, all.iter().collect())).collect();
        prove(cut, &disks);
    }
}
