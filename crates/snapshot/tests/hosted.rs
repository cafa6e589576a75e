//! Jobs that do others' work: steered and told of like those that merge layers.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step of a test ends it")]

mod bench;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use block::{Error, ErrorKind};
use snapshot::{Event, Halt, HostedJob, Job, JobGroup, JobStatus, JobType, JobVerb, Labor, Manager, Seat};

use bench::Bench;

/// Work that ends as it is told, and tells when it has put away what it began.
struct Errand {
    ends: Receiver<Result<(), Error>>,
    over: Sender<()>,
}

impl Labor for Errand {
    fn makes(&self) -> String {
        "nothing".to_owned()
    }

    fn run(self: Box<Self>, job: &Job) -> Result<(), Halt> {
        job.set_total(10);
        let worked = loop {
            match self.ends.recv_timeout(Duration::from_millis(1)) {
                Ok(end) => break end.map_err(Halt::from),
                Err(_) => {
                    if let Err(halt) = job.pause_point(Duration::ZERO) {
                        break Err(halt);
                    }
                }
            }
        };
        let worked = worked.and_then(|()| {
            job.copied(10);
            job.finalize_point()
        });
        let _ = self.over.send(());
        worked
    }
}

fn asked(id: &str) -> HostedJob {
    HostedJob {
        id: id.to_owned(),
        kind: JobType::Backup,
        speed: 0,
        auto_finalize: true,
        auto_dismiss: false,
        client: Some(7),
        group: None,
    }
}

/// A job of that id that runs, with the ways to end it and to hear that it has.
fn start(manager: &Manager, asked: HostedJob) -> (Sender<Result<(), Error>>, Receiver<()>) {
    begin(manager.enter_job(asked).unwrap())
}

fn begin(seat: Seat) -> (Sender<Result<(), Error>>, Receiver<()>) {
    let ((end, ends), (over, heard)) = (channel(), channel());
    seat.start(Box::new(Errand { ends, over })).unwrap();
    (end, heard)
}

fn wait_for(manager: &Manager, id: &str, status: JobStatus) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while manager.jobs().iter().find(|job| job.id == id).unwrap().status != status {
        assert!(std::time::Instant::now() < deadline, "{:?}", manager.jobs());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_hosted_job_is_told_of_to_who_began_it_and_waits_to_be_dismissed() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let events = bench::events(&manager);
    let (end, _over) = start(&manager, asked("b"));
    wait_for(&manager, "b", JobStatus::Running);
    assert_eq!(manager.enter_job(asked("b")).err().unwrap().to_string(), "Job ID 'b' already in use");
    end.send(Ok(())).unwrap();
    wait_for(&manager, "b", JobStatus::Concluded);
    let info = manager.block_jobs().remove(0);
    assert_eq!((info.device.as_str(), info.offset, info.len, info.error), ("b", 10, 10, None));
    manager.ask_job("b", JobVerb::Dismiss).unwrap();
    assert!(manager.jobs().is_empty());
    let ended: Vec<_> = events.try_iter().filter(|event| event.addressee() == Some(7)).collect();
    assert!(matches!(&ended[..], [Event::JobCompleted { end, .. }] if end.error.is_none()), "{ended:?}");
}

#[test]
fn a_hosted_job_that_fails_or_is_called_off_says_so() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let events = bench::events(&manager);
    let (end, _over) = start(&manager, asked("failing"));
    end.send(Err(Error::new(ErrorKind::NoSpace, "no room"))).unwrap();
    wait_for(&manager, "failing", JobStatus::Concluded);
    let (_end, over) = start(&manager, asked("cancelled"));
    manager.ask_job("cancelled", JobVerb::Cancel).unwrap();
    over.recv().unwrap();
    wait_for(&manager, "cancelled", JobStatus::Concluded);
    let errors: Vec<_> = manager.jobs().into_iter().map(|job| job.error.unwrap()).collect();
    assert_eq!(errors, ["no room", "Operation canceled"]);
    let ended: Vec<_> = events.try_iter().filter(|event| event.addressee() == Some(7)).collect();
    match &ended[..] {
        [Event::JobCompleted { end, .. }, Event::JobCancelled { .. }] => {
            assert_eq!(end.error.as_deref(), Some("no room"));
        }
        other => panic!("{other:?}"),
    }
}

/// Work that has something to do when it is called off, and can not.
struct Hampered;

impl Labor for Hampered {
    fn makes(&self) -> String {
        "nothing".to_owned()
    }

    fn run(self: Box<Self>, job: &Job) -> Result<(), Halt> {
        while job.pause_point(Duration::from_secs(3600)).is_ok() {}
        Err(Error::new(ErrorKind::NoSpace, "no room").into())
    }
}

/// A backup with `sync: none` whose target could not be synced was told of as one that was whole.
#[test]
fn a_job_that_fails_after_it_was_called_off_says_so() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let events = bench::events(&manager);
    manager.enter_job(asked("b")).unwrap().start(Box::new(Hampered)).unwrap();
    manager.ask_job("b", JobVerb::Cancel).unwrap();
    wait_for(&manager, "b", JobStatus::Concluded);
    let ended: Vec<_> = events.try_iter().filter(|event| event.addressee() == Some(7)).collect();
    match &ended[..] {
        [Event::JobCompleted { end, .. }] => assert_eq!(end.error.as_deref(), Some("no room")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_last_step_waits_for_a_client_if_it_was_asked_to() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let events = bench::events(&manager);
    let (end, over) = start(&manager, HostedJob { auto_finalize: false, ..asked("b") });
    end.send(Ok(())).unwrap();
    wait_for(&manager, "b", JobStatus::Pending);
    assert!(over.recv_timeout(Duration::from_millis(50)).is_err(), "it went on by itself");
    assert!(events.try_iter().any(|event| matches!(event, Event::JobPending { .. })));
    manager.ask_job("b", JobVerb::Finalize).unwrap();
    wait_for(&manager, "b", JobStatus::Concluded);
}

#[test]
fn a_job_that_never_begins_leaves_no_trace_and_one_that_runs_ends_with_the_daemon() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    drop(manager.enter_job(asked("never")).unwrap());
    assert!(manager.jobs().is_empty());
    let (_end, over) = start(&manager, asked("b"));
    manager.shut_down().unwrap();
    over.recv().unwrap();
    drop(manager);
    assert!(bench.open().jobs().is_empty());
}

#[test]
fn a_job_that_fails_calls_off_those_that_it_would_have_ended_with() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let events = bench::events(&manager);
    let group = Arc::new(JobGroup::new());
    let member = |id| HostedJob { group: Some(Arc::clone(&group)), ..asked(id) };
    let seats = ["done", "working", "failing"].map(|id| manager.enter_job(member(id)).unwrap());
    let (alone, _over) = start(&manager, asked("alone"));
    let begun = seats.map(begin);
    begun[0].0.send(Ok(())).unwrap();
    wait_for(&manager, "done", JobStatus::Waiting);
    begun[2].0.send(Err(Error::new(ErrorKind::NoSpace, "no room"))).unwrap();
    for (id, error) in
        [("done", "Operation canceled"), ("working", "Operation canceled"), ("failing", "no room")]
    {
        wait_for(&manager, id, JobStatus::Concluded);
        let job = manager.jobs().into_iter().find(|job| job.id == id).unwrap();
        assert_eq!(job.error.as_deref(), Some(error), "{id}");
    }
    let ended = events.try_iter().filter(|event| event.addressee() == Some(7));
    let cancelled = ended.filter(|event| matches!(event, Event::JobCancelled { .. })).count();
    assert_eq!(cancelled, 2);
    alone.send(Ok(())).unwrap();
    wait_for(&manager, "alone", JobStatus::Concluded);
    assert_eq!(manager.jobs().into_iter().find(|job| job.id == "alone").unwrap().error, None);
}

/// Work that takes its time to put away what it began.
struct Slow {
    ended: Sender<()>,
    goes: Receiver<()>,
}

impl Labor for Slow {
    fn makes(&self) -> String {
        "nothing".to_owned()
    }

    fn run(self: Box<Self>, job: &Job) -> Result<(), Halt> {
        let ended = job.finalize_point();
        let _ = self.ended.send(());
        let _ = self.goes.recv();
        ended
    }
}

/// One that waited for the others was called off, and before it was over the last of them came, found all there, and did its
/// last step.
#[test]
fn none_does_its_last_step_while_one_that_was_called_off_still_puts_things_away() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let group = Arc::new(JobGroup::new());
    let member = |id| HostedJob { group: Some(Arc::clone(&group)), ..asked(id) };
    let [slow, last] = ["slow", "last"].map(|id| manager.enter_job(member(id)).unwrap());
    let ((ended, has_ended), (go, goes)) = (channel(), channel());
    slow.start(Box::new(Slow { ended, goes })).unwrap();
    let (end, _over) = begin(last);
    wait_for(&manager, "slow", JobStatus::Waiting);
    manager.ask_job("slow", JobVerb::Cancel).unwrap();
    has_ended.recv().unwrap();
    end.send(Ok(())).unwrap();
    wait_for(&manager, "last", JobStatus::Concluded);
    go.send(()).unwrap();
    wait_for(&manager, "slow", JobStatus::Concluded);
    let errors: Vec<_> = manager.jobs().into_iter().map(|job| job.error).collect();
    assert_eq!(errors, [Some("Operation canceled".to_owned()), Some("Operation canceled".to_owned())]);
}

#[test]
fn jobs_that_end_together_do_their_last_step_when_all_have_come_to_it() {
    let bench = Bench::new(&["vda"]);
    let manager = bench.open();
    let group = Arc::new(JobGroup::new());
    let member = |id| HostedJob { group: Some(Arc::clone(&group)), ..asked(id) };
    let seats = ["a", "b"].map(|id| manager.enter_job(member(id)).unwrap());
    let [a, b] = seats.map(begin);
    a.0.send(Ok(())).unwrap();
    assert!(a.1.recv_timeout(Duration::from_millis(50)).is_err(), "it went on by itself");
    b.0.send(Ok(())).unwrap();
    for id in ["a", "b"] {
        wait_for(&manager, id, JobStatus::Concluded);
    }
    assert!(manager.jobs().iter().all(|job| job.error.is_none()));
    // One that ends with the daemon does not leave others behind that wait for it.
    let group = Arc::new(JobGroup::new());
    let seats = ["c", "d"].map(|id| {
        let asked = HostedJob { group: Some(Arc::clone(&group)), ..asked(id) };
        manager.enter_job(asked).unwrap()
    });
    let begun = seats.map(begin);
    begun[0].0.send(Ok(())).unwrap();
    wait_for(&manager, "c", JobStatus::Waiting);
    manager.shut_down().unwrap();
}
