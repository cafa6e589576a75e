//! What can only be seen from inside: each test opens with what went wrong.

#![allow(clippy::unwrap_used, reason = "a failed step of a test ends it")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{ErrorKind, read_disk};

use super::*;
use crate::bench::{Bench, SIZE, snapshot, stamp};
use crate::manager::Manager;
use crate::naming::Naming;

fn content(manager: &Manager) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    read_disk(&**manager.chain("vda").unwrap(), 0, &mut bytes).unwrap();
    bytes
}

/// Deletes a snapshot, and waits for it; the job's error if it fails.
fn delete(manager: &Manager, name: &str) -> Result<(), String> {
    let options = JobOptions { auto_dismiss: false, ..JobOptions::default() };
    let id = manager.delete(DeleteRequest { name: name.to_owned(), options }).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let job = manager.jobs().into_iter().find(|job| job.id == id).unwrap();
        if job.status == JobStatus::Concluded {
            manager.ask_job(&id, JobVerb::Dismiss).unwrap();
            return job.error.map_or(Ok(()), Err);
        }
        assert!(Instant::now() < deadline, "{job:?} does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The last flush of a job failed, and what it had copied was lost: the next cut noted the layer as on stable storage, and
/// its tables went on naming what was lost.
#[test]
fn a_layer_that_a_job_could_not_sync_never_counts_as_sealed_and_shows_nothing_of_the_job() {
    let bench = Bench::new();
    let manager = bench.open();
    stamp(&manager, 0, 1);
    snapshot(&manager, "zero");
    stamp(&manager, 1 << 20, 2);
    snapshot(&manager, "one");
    // Much more than in the layer beneath, so that is copied up into this one.
    (2..8).for_each(|place| stamp(&manager, place << 20, 3));
    snapshot(&manager, "two");
    let before = content(&manager);
    let target = manager.chain("vda").unwrap().layers()[2].clone();
    let is_sealed = |manager: &Manager| manager.store.manifest().disk("vda").unwrap().layers[2].sealed;
    assert!(is_sealed(&manager));

    target.begin_writing_in_vain("vda", manager.store.journals());
    let error = delete(&manager, "one").unwrap_err();
    assert!(error.contains("injected: a sync failed"), "{error}");
    assert!(content(&manager) == before, "the job's copy is seen");
    let note = manager.store.journals().failure_note("vda", target.entry.number);
    assert!(note.is_there().unwrap(), "the next process would not know");
    snapshot(&manager, "three");
    assert!(!is_sealed(&manager), "a failed sync is final");
    // Nor is more written to it.
    let error = delete(&manager, "one").unwrap_err();
    assert!(error.contains("has failed"), "{error}");
    assert!(!is_sealed(&manager));
    manager.shut_down().unwrap();
    assert!(!is_sealed(&manager));
    drop((manager, target));

    let manager = bench.open();
    assert!(content(&manager) == before);
    assert!(!note.is_there().unwrap());
    delete(&manager, "one").unwrap();
    assert!(content(&manager) == before);
}

/// Clients had as many jobs as may be on the list, and never dismissed them: chains grew without end.
#[test]
fn jobs_that_nobody_dismisses_keep_out_those_of_clients_and_no_automatic_ones() {
    let bench = Bench::new();
    let manager = bench.open_with(Some(1));
    let enter = |number: u32| {
        manager.enter_job(HostedJob {
            // One has the name that an automatic job would have.
            id: if number == 0 { "merge-vda".to_owned() } else { format!("job-{number}") },
            kind: JobType::Backup,
            speed: 0,
            auto_finalize: true,
            auto_dismiss: false,
            client: None,
            group: None,
        })
    };
    let seats: Vec<_> = (0..256).map(|number| enter(number).unwrap()).collect();
    assert_eq!(enter(256).err().unwrap().kind(), ErrorKind::Busy);
    for name in ["one", "two", "three"] {
        snapshot(&manager, name);
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while manager.chain("vda").unwrap().layers().len() > 2 {
        assert!(Instant::now() < deadline, "{:?}", manager.jobs());
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(enter(256).is_err());
    drop(seats);
    enter(256).unwrap();
}

/// Between a job's change of a header and the next flush the daemon was killed, and the next one took what the sync had lost
/// for safe.
#[test]
fn a_header_that_could_not_be_synced_is_known_to_the_next_process() {
    let bench = Bench::new();
    let manager = bench.open();
    ["one", "two"].iter().for_each(|name| snapshot(&manager, name));
    let target = manager.chain("vda").unwrap().layers()[1].clone();
    let note = manager.store.journals().failure_note("vda", target.entry.number);
    target.begin_writing_in_vain("vda", manager.store.journals());
    assert!(Naming::of_own(Arc::clone(&target)).write(Some(("base.raw", "raw"))).is_err());
    assert!(target.has_failed() && note.is_there().unwrap());
}
