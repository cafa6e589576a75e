//! What a job is told: to pause, to go on, to be slower, to end; and that it goes on after a restart.

use std::time::Duration;

use block::ErrorKind;
use snapshot::{CommitRequest, Event, JobOptions, JobStatus, JobVerb, Manager};

use super::bench::{Bench, chain, delete, finish, snapshot, stamp};
use super::{begin_delete, chain_of, content, kept, nodes, wait_for};

#[test]
fn a_job_can_be_paused_slowed_resumed_and_told_of() {
    let (_bench, manager) = chain_of(3);
    let events = crate::bench::events(&manager);
    // Slow enough not to end before it is told to.
    let id = begin_delete(&manager, "s1", 4096);
    wait_for(&manager, &id, JobStatus::Running);
    manager.ask_job(&id, JobVerb::Pause).unwrap();
    wait_for(&manager, &id, JobStatus::Paused);
    assert!(manager.ask_job(&id, JobVerb::Pause).unwrap_err().to_string().contains("already paused"));
    let at_rest = manager.jobs();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(manager.jobs(), at_rest);
    assert_eq!(manager.ask_job(&id, JobVerb::Dismiss).unwrap_err().kind(), ErrorKind::Busy);
    manager.set_job_speed(&id, 0).unwrap();
    manager.ask_job(&id, JobVerb::Resume).unwrap();
    finish(&manager, &id).unwrap();
    assert!(manager.jobs().is_empty());
    let told: Vec<_> = events
        .try_iter()
        .filter_map(|event| match event {
            Event::Job { status, .. } => Some(status),
            _ => None,
        })
        .collect();
    use JobStatus::{Concluded, Created, Null, Paused, Pending, Running, Waiting};
    assert_eq!(told, [Created, Running, Paused, Running, Waiting, Pending, Concluded, Null]);
}

#[test]
fn a_job_that_is_called_off_leaves_a_disk_that_reads_the_same() {
    let (bench, manager) = chain_of(3);
    let before = content(&manager);
    let id = begin_delete(&manager, "s1", 4096);
    wait_for(&manager, &id, JobStatus::Running);
    std::thread::sleep(Duration::from_millis(20));
    manager.ask_job(&id, JobVerb::Cancel).unwrap();
    assert_eq!(finish(&manager, &id).unwrap_err(), "Operation canceled");
    assert!(content(&manager) == before);
    assert_eq!(bench.export(&manager, "s0", "vda")[4096], 0);
    assert_eq!(bench.export(&manager, "s2", "vda")[4096], 2);
    delete(&manager, "s1").unwrap();
    assert!(content(&manager) == before);
    assert_eq!(nodes(&manager).len(), 3);
}

#[test]
fn a_job_goes_on_after_a_restart_as_it_was_told() {
    let (bench, manager) = chain_of(3);
    let before = content(&manager);
    let id = begin_delete(&manager, "s1", 4096);
    wait_for(&manager, &id, JobStatus::Running);
    manager.ask_job(&id, JobVerb::Pause).unwrap();
    drop(manager);
    let manager = bench.open();
    assert!(content(&manager) == before);
    wait_for(&manager, &id, JobStatus::Paused);
    manager.set_job_speed(&id, 0).unwrap();
    manager.ask_job(&id, JobVerb::Resume).unwrap();
    finish(&manager, &id).unwrap();
    assert!(content(&manager) == before);
    assert_eq!(manager.show("s1").unwrap_err().kind(), ErrorKind::NotFound);
    drop(manager);
    assert!(content(&bench.open()) == before);
}

#[test]
fn jobs_of_one_disk_take_turns() {
    let (_bench, manager) = chain_of(4);
    let first = begin_delete(&manager, "s1", 4096);
    let second = begin_delete(&manager, "s2", 0);
    wait_for(&manager, &first, JobStatus::Running);
    std::thread::sleep(Duration::from_millis(20));
    wait_for(&manager, &second, JobStatus::Created);
    assert_eq!(manager.revert("s0", true).unwrap_err().kind(), ErrorKind::Busy);
    // What waits can be called off as well, and then leaves no trace.
    let third = begin_delete(&manager, "s3", 0);
    manager.ask_job(&third, JobVerb::Cancel).unwrap();
    assert!(finish(&manager, &third).is_err());
    manager.set_job_speed(&first, 0).unwrap();
    finish(&manager, &first).unwrap();
    finish(&manager, &second).unwrap();
    assert_eq!(manager.list().len(), 2);
}

/// A disk that a guest writes to an overlay, with no snapshot.
fn on_an_overlay() -> (Bench, Manager) {
    let (bench, manager) = chain_of(1);
    chain(&manager, "vda").set_connected(true);
    delete(&manager, "s0").unwrap();
    stamp(&manager, "vda", 0, 9);
    (bench, manager)
}

/// Of all that it has.
fn begin_commit(manager: &Manager, options: JobOptions) -> String {
    let device = "vda".to_owned();
    manager.commit(CommitRequest { device, options, ..CommitRequest::default() }).unwrap()
}

#[test]
fn a_commit_of_the_active_layer_is_ready_until_a_client_completes_it() {
    let (_bench, manager) = on_an_overlay();
    let (before, events) = (content(&manager), crate::bench::events(&manager));
    let id = begin_commit(&manager, kept());
    wait_for(&manager, &id, JobStatus::Ready);
    assert!(manager.block_jobs()[0].ready);
    let is_it = |event: &Event| matches!(event, Event::JobReady { end, .. } if end.device == id && end.len == end.offset);
    assert_eq!(events.try_iter().filter(is_it).count(), 1);
    manager.ask_job(&id, JobVerb::Pause).unwrap();
    wait_for(&manager, &id, JobStatus::Standby);
    let words = format!("Job '{id}' in state 'standby' cannot accept command verb 'complete'");
    assert_eq!(manager.ask_job(&id, JobVerb::Complete).unwrap_err().to_string(), words);
    manager.ask_job(&id, JobVerb::Resume).unwrap();
    wait_for(&manager, &id, JobStatus::Ready);
    let at_rest = nodes(&manager);
    manager.ask_job(&id, JobVerb::Complete).unwrap();
    finish(&manager, &id).unwrap();
    assert!(nodes(&manager).len() < at_rest.len());
    assert!(content(&manager) == before);
}

#[test]
fn a_commit_that_is_ready_is_so_again_after_a_restart_and_can_be_called_off() {
    let (bench, manager) = on_an_overlay();
    let before = content(&manager);
    let id = begin_commit(&manager, kept());
    wait_for(&manager, &id, JobStatus::Ready);
    drop(manager);
    let manager = bench.open();
    wait_for(&manager, &id, JobStatus::Ready);
    // Others' cuts do not wait for whoever is to complete it.
    snapshot(&manager, "meanwhile");
    stamp(&manager, "vda", 4096, 8);
    let events = crate::bench::events(&manager);
    manager.ask_job(&id, JobVerb::Cancel).unwrap();
    finish(&manager, &id).unwrap();
    assert!(events.try_iter().any(|event| matches!(event, Event::JobCancelled { .. })));
    assert_eq!(content(&manager)[..4096], before[..4096]);
    assert!(bench.export(&manager, "meanwhile", "vda") == before);
}

#[test]
fn a_job_that_is_finalized_by_hand_holds_nobody_up() {
    let (bench, manager) = on_an_overlay();
    let (before, events) = (content(&manager), crate::bench::events(&manager));
    let id = begin_commit(&manager, JobOptions { auto_finalize: false, ..kept() });
    wait_for(&manager, &id, JobStatus::Ready);
    manager.ask_job(&id, JobVerb::Complete).unwrap();
    wait_for(&manager, &id, JobStatus::Pending);
    assert!(events.try_iter().any(|event| matches!(event, Event::JobPending { .. })));
    snapshot(&manager, "meanwhile");
    manager.ask_job(&id, JobVerb::Finalize).unwrap();
    finish(&manager, &id).unwrap();
    assert!(content(&manager) == before);
    assert!(bench.export(&manager, "meanwhile", "vda") == before);
}
