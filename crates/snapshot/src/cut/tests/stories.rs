//! What is told, and what people get, in the cases that matter most.

use std::sync::Arc;
use std::time::Duration;

use block::ErrorKind;

use super::super::{Collector, Cut, Freezer};
use super::faults::{Call, Fault};
use super::world::{Kind, Overlay, World};
use crate::{Event, FreezeOwner, FreezePolicy, Grade, SnapshotRecord, Step};

/// The calls of a cut without faults, by their place.
const FREEZE: usize = 5;
const DRAIN: usize = 7;
const THAW: usize = 10;
const SEAL: usize = 14;

fn world(kind: Kind, faults: &[(usize, Fault)]) -> (World, Arc<Freezer>) {
    let world = World::new(kind, faults, "a story");
    let freezer = world.freezer();
    (world, freezer)
}

fn cut(world: &World, freezer: &Arc<Freezer>, policy: FreezePolicy) -> Cut {
    let plan = World::plan(policy, FreezeOwner::Frazil);
    Cut::new(plan, world.ports(Some(Arc::clone(freezer))))
}

fn take(world: &World, freezer: &Arc<Freezer>, policy: FreezePolicy) -> block::Result<SnapshotRecord> {
    cut(world, freezer, policy).take(Box::new(world.clone()))
}

fn events(world: &World, name: &str) -> Vec<Event> {
    world.state().events.iter().filter(|event| event.name() == name).cloned().collect()
}

/// The guest's agent hangs in the freeze, the cut goes on without, and later the freeze is carried out after all.
#[test]
fn a_freeze_that_comes_late_is_answered_with_a_thaw() {
    let (world, freezer) = world(Kind::Linux, &[(FREEZE, Fault::Late)]);
    let record = take(&world, &freezer, FreezePolicy::Prefer).unwrap();
    assert_eq!((record.grade, record.frozen_count), (Grade::Crash, None));
    assert!(record.reason.contains("did not answer in time"), "{}", record.reason);
    assert!(world.state().debt && world.state().frozen.is_none());
    assert_eq!(freezer.collect(), Some(Duration::from_millis(100)));
    assert_eq!(freezer.collect(), Some(Duration::from_millis(200)));
    // The agent reads again: it freezes, then answers the connection, then thaws.
    assert_eq!(freezer.collect(), None);
    assert!(!world.state().debt && world.state().frozen.is_none());
    let owed: Vec<_> = events(&world, "FRAZIL_THAW_OWED");
    assert!(matches!(
        owed[..],
        [
            Event::ThawOwed { tries: 0, .. },
            Event::ThawOwed { tries: 1, .. },
            Event::ThawOwed { tries: 2, .. }
        ]
    ));
    assert_eq!(events(&world, "FRAZIL_THAW_CONFIRMED"), [Event::ThawConfirmed { count: 2 }]);
}

#[test]
fn a_new_cut_pays_an_old_debt_before_it_freezes() {
    let old = World::new(Kind::Linux, &[], "a story");
    {
        let mut state = old.state();
        state.debt = true;
        state.frozen = Some(state.start);
    }
    let freezer = old.freezer();
    let record = take(&old, &freezer, FreezePolicy::Require).unwrap();
    assert_eq!(record.grade, Grade::Filesystem, "{}", record.reason);
    assert_eq!(events(&old, "FRAZIL_THAW_CONFIRMED"), [Event::ThawConfirmed { count: 2 }]);
}

#[test]
fn a_debt_that_cannot_be_paid_refuses_a_required_freeze_and_tells_the_rest() {
    let (world, freezer) = world(Kind::Linux, &[(FREEZE, Fault::Late)]);
    take(&world, &freezer, FreezePolicy::Prefer).unwrap();
    world.state().overlay = Overlay::None;
    let error = take(&world, &freezer, FreezePolicy::Require).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("a thaw is still owed"), "{error}");
    let record = take(&world, &freezer, FreezePolicy::Prefer).unwrap();
    assert!(record.reason.contains("a thaw is still owed"), "{}", record.reason);
}

#[test]
fn a_freeze_is_held_by_one_cut_at_a_time() {
    let (world, freezer) = world(Kind::Linux, &[]);
    let held = cut(&world, &freezer, FreezePolicy::Require).prepare(Box::new(world.clone())).unwrap();
    // Another group of disks of the same guest.
    let other = World::new(Kind::Linux, &[], "the other group");
    let error = take(&other, &freezer, FreezePolicy::Require).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let record = take(&other, &freezer, FreezePolicy::Prefer).unwrap();
    assert!(record.reason.contains("frozen for another snapshot"), "{}", record.reason);
    assert_eq!(freezer.collect(), None, "the collector leaves a held freeze alone");
    assert_eq!(held.release().unwrap().grade, Grade::Filesystem);
}

#[test]
fn every_step_is_timed_and_told() {
    let (world, freezer) = world(Kind::Linux, &[]);
    let record = take(&world, &freezer, FreezePolicy::Prefer).unwrap();
    let timing = record.timing;
    // Each call of this world takes 1 ms; the thaw is one of three calls.
    assert_eq!(
        (timing.prepare, timing.pre_sync, timing.freeze, timing.thaw),
        (1.0, Some(1.0), Some(1.0), Some(3.0))
    );
    assert_eq!(
        (timing.gate, timing.drain, timing.pivot, timing.open, timing.seal),
        (1.0, 1.0, 1.0, 1.0, 1.0)
    );
    assert_eq!((timing.gate_closed, timing.frozen, timing.longest_wait), (4.0, Some(8.0), 3.0));
    assert_eq!((record.frozen_count, record.thawed_count, record.sealed), (Some(2), Some(2), true));
    let steps: Vec<_> = events(&world, "FRAZIL_SNAPSHOT_STEP")
        .into_iter()
        .filter_map(|event| if let Event::Step { step, .. } = event { Some(step) } else { None })
        .collect();
    use Step::*;
    assert_eq!(steps, [Prepare, PreSync, Freeze, Gate, Drain, Pivot, Open, Thaw, Seal]);
    assert_eq!(events(&world, "FRAZIL_STALL"), []);
    let last: Vec<_> = world.state().events.iter().rev().take(3).map(Event::name).collect();
    assert_eq!(last, ["FRAZIL_SNAPSHOT_SEALED", "FRAZIL_SNAPSHOT_STEP", "FRAZIL_SNAPSHOT_CREATED"]);
    assert_eq!(world.state().records.iter().map(|record| record.sealed).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn without_a_freeze_its_times_are_absent() {
    let (world, freezer) = world(Kind::Linux, &[]);
    let timing = take(&world, &freezer, FreezePolicy::Never).unwrap().timing;
    assert_eq!((timing.pre_sync, timing.freeze, timing.thaw, timing.frozen), (None, None, None, None));
}

#[test]
fn stalls_are_told() {
    let (world, freezer) = world(Kind::Linux, &[(FREEZE, Fault::Slow), (DRAIN, Fault::Slow)]);
    take(&world, &freezer, FreezePolicy::Prefer).unwrap();
    let stalls: Vec<_> = events(&world, "FRAZIL_STALL")
        .into_iter()
        .filter_map(|event| if let Event::Stall { step, .. } = event { Some(step) } else { None })
        .collect();
    assert_eq!(stalls, [Step::Freeze, Step::Drain, Step::Gate]);
}

#[test]
fn a_freeze_held_too_long_fails_if_required_and_is_told_if_preferred() {
    for kind in [Kind::Linux, Kind::Windows] {
        let (strict, freezer) = world(kind, &[]);
        let held = cut(&strict, &freezer, FreezePolicy::Require).prepare(Box::new(strict.clone())).unwrap();
        strict.pass(Duration::from_secs(11));
        let error = held.release().unwrap_err();
        assert!(error.to_string().contains("the freeze had lasted"), "{error}");
        assert_eq!(strict.state().overlay, Overlay::None);
        assert!(matches!(
            events(&strict, "FRAZIL_SNAPSHOT_FAILED")[..],
            [Event::Failed { step: Step::Pivot, .. }]
        ));

        let (mild, freezer) = world(kind, &[]);
        let held = cut(&mild, &freezer, FreezePolicy::Prefer).prepare(Box::new(mild.clone())).unwrap();
        mild.pass(Duration::from_secs(11));
        let record = held.release().unwrap();
        assert_eq!(record.grade, Grade::Crash);
        assert!(record.reason.contains("the freeze had lasted"), "{}", record.reason);
        assert!(!freezer.is_owed(), "a guest that thawed itself refuses the thaw, and its status settles it");
    }
}

#[test]
fn a_thaw_that_fails_after_the_cut_downgrades_and_stays_owed() {
    let (world, freezer) = world(Kind::Linux, &[(THAW, Fault::Lost)]);
    let record = take(&world, &freezer, FreezePolicy::Require).unwrap();
    assert_eq!((record.grade, record.sealed, record.thawed_count), (Grade::Crash, true, None));
    assert!(record.reason.contains("not confirmed"), "{}", record.reason);
    assert!(world.state().frozen.is_some() && freezer.is_owed());
    assert_eq!(freezer.collect(), None);
    assert!(world.state().frozen.is_none());
}

#[test]
fn a_seal_that_fails_leaves_an_unsealed_snapshot_that_says_why() {
    let (world, freezer) = world(Kind::Linux, &[(SEAL, Fault::Fails)]);
    let record = take(&world, &freezer, FreezePolicy::Require).unwrap();
    assert_eq!((record.grade, record.sealed), (Grade::Filesystem, false));
    assert!(record.reason.contains("not sealed at first"), "{}", record.reason);
    assert_eq!(events(&world, "FRAZIL_SNAPSHOT_SEALED"), []);
}

#[test]
fn a_failure_names_its_step_and_what_could_not_be_undone() {
    // After a failed drain: open, thaw, status, clear, and the undo of the layers.
    let (world, freezer) = world(Kind::Linux, &[(DRAIN, Fault::Fails), (12, Fault::Fails)]);
    let error = take(&world, &freezer, FreezePolicy::Prefer).unwrap_err();
    assert_eq!(world.state().trace[12], Call::UndoLayers);
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("its empty overlays stay behind"), "{error}");
    assert!(matches!(
        events(&world, "FRAZIL_SNAPSHOT_FAILED")[..],
        [Event::Failed { step: Step::Drain, .. }]
    ));
}

#[test]
fn require_without_a_way_to_freeze_fails_before_anything_is_done() {
    let (world, _) = world(Kind::Linux, &[]);
    for owner in [FreezeOwner::Frazil, FreezeOwner::External, FreezeOwner::None] {
        let cut = Cut::new(World::plan(FreezePolicy::Require, owner), world.ports(None));
        let error = cut.take(Box::new(world.clone())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    assert_eq!(world.state().trace, []);
}

#[test]
fn the_collector_pays_in_its_own_thread_and_ends_when_told() {
    let (world, freezer) = world(Kind::Linux, &[(FREEZE, Fault::Late)]);
    let collector = Collector::start(Arc::clone(&freezer)).unwrap();
    take(&world, &freezer, FreezePolicy::Prefer).unwrap();
    for _wait in 0..500 {
        if !freezer.is_owed() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(events(&world, "FRAZIL_THAW_CONFIRMED"), [Event::ThawConfirmed { count: 2 }]);
    drop(collector);
    assert!(!world.state().debt);
}

#[test]
fn a_collector_that_is_told_to_end_leaves_the_record_to_the_next() {
    let world = World::new(Kind::Linux, &[], "a story");
    world.state().debt = true;
    world.state().stuck = u32::MAX;
    let freezer = world.freezer();
    drop(Collector::start(Arc::clone(&freezer)).unwrap());
    assert!(world.state().debt && freezer.is_owed());
    world.state().stuck = 0;
    world.restart();
    let freezer = world.freezer();
    assert_eq!(freezer.collect(), None);
    assert!(!world.state().debt);
}

/// As after a panic in a port: nobody is left who would thaw.
#[test]
fn a_freeze_that_is_let_go_is_owed() {
    let (world, freezer) = world(Kind::Linux, &[]);
    world.state().overlay = Overlay::Prepared;
    drop(freezer.freeze("s1"));
    assert!(world.state().frozen.is_some() && freezer.is_owed());
    assert_eq!(freezer.collect(), None);
    assert!(world.state().frozen.is_none() && !world.state().debt);
}
