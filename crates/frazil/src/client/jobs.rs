//! `frazil job`, and waiting for the jobs that other commands begin.

use std::thread::sleep;
use std::time::Duration;

use serde_json::json;
use snapshot::{JobInfo, JobOptions, JobStatus};

use super::print::{decode, print, show_or_json};
use super::progress::Progress;
use super::table;
use super::via::{Connection, Via};
use crate::cli::{Job, JobFlags};
use crate::failure::{Exit, Failure};

/// How often a job is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// `frazil job …`.
pub(crate) fn job(command: Job) -> Result<(), Failure> {
    match command {
        Job::List { daemon, output } => {
            let list = Connection::open(&daemon)?.ask("list the jobs", "query-jobs", json!({}))?;
            show_or_json(output, &list, |jobs: &Vec<_>| table::jobs(jobs))
        }
        Job::Pause { id, daemon } => {
            Connection::open(&daemon)?.ask(&format!("pause job {id}"), "job-pause", json!({ "id": id }))?;
            print(&format!("paused {id}\n"))
        }
        Job::Resume { id, daemon } => {
            Connection::open(&daemon)?.ask(&format!("resume job {id}"), "job-resume", json!({ "id": id }))?;
            print(&format!("resumed {id}\n"))
        }
        Job::Speed { id, speed, daemon } => {
            let arguments = json!({ "device": id, "speed": speed });
            Connection::open(&daemon)?.ask(&format!("limit job {id}"), "block-job-set-speed", arguments)?;
            print(&format!("{id} copies at {}\n", table::speed(speed)))
        }
        Job::Cancel { id, daemon } => {
            Connection::open(&daemon)?.ask(&format!("cancel job {id}"), "job-cancel", json!({ "id": id }))?;
            print(&format!("cancelled {id}\n"))
        }
        Job::Wait { id, daemon } => {
            let mut via = Via::Control(Connection::open(&daemon)?);
            if !via.jobs()?.iter().any(|job| job.id == id) {
                let failure =
                    Failure::new(Exit::Failed, format!("wait for job {id}"), "there is no such job");
                return Err(failure.hint("`frazil job list` shows those there are"));
            }
            wait(&mut via, &id, false)?;
            print(&format!("{id} is over\n"))
        }
    }
}

/// What is asked of a job. A daemon's goes from the list by itself, for whoever waits may be gone by then; one that this
/// process carries out stays, to be seen how it ended.
pub(super) fn options(via: &Via, flags: &JobFlags) -> JobOptions {
    JobOptions {
        job_id: flags.job_id.clone(),
        speed: flags.speed,
        auto_dismiss: matches!(via, Via::Control(_)),
        ..JobOptions::default()
    }
}

/// Waits for a job that was just begun, or only says that it was; `done` is what to say at its end.
pub(super) fn follow(via: &mut Via, id: &str, flags: &JobFlags, done: &str) -> Result<(), Failure> {
    if flags.no_wait {
        return print(&format!("{id}\n"));
    }
    let is_own = matches!(via, Via::Control(_));
    wait(via, id, is_own)?;
    print(&format!("{done}\n"))
}

/// Waits until a job is over, with a bar where somebody watches. One that dismisses itself is over when it is gone; how it
/// ended is told to who began it (`is_own`), by an event that comes before.
fn wait(via: &mut Via, id: &str, is_own: bool) -> Result<(), Failure> {
    let bar = Progress::new(id);
    let mut ended = None;
    loop {
        let job = via.jobs()?.into_iter().find(|job| job.id == id);
        ended = via.take_end(id).or(ended);
        match job {
            Some(job) if job.status == JobStatus::Concluded => {
                ended = Some(job.error.map_or(Ok(()), Err));
                // It may be about to go by itself.
                let _ = via.dismiss(id);
            }
            Some(job) => bar.report(job.current_progress, job.total_progress),
            None => break,
        }
        sleep(LOOK);
    }
    let not_told = || Err("it is over, but how it ended was not told: the daemon's log says so".to_owned());
    let ended = ended.unwrap_or_else(|| if is_own { not_told() } else { Ok(()) });
    ended.map_err(|error| Failure::new(Exit::Failed, format!("run job {id}"), error))
}

/// An answer to `query-jobs`.
pub(super) fn decode_list(value: &serde_json::Value) -> Result<Vec<JobInfo>, Failure> {
    decode("list the jobs", value)
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::thread;

    use serde_json::{Deserializer, Value};
    use snapshot::DeleteRequest;

    use super::*;
    use crate::cli::Daemon;

    /// A daemon for one client, whose jobs are over before it says that they have begun: with this event.
    fn serve(listener: &UnixListener, event: &Value) {
        let (mut stream, _) = listener.accept().unwrap();
        writeln!(stream, "{}", json!({ "QMP": {} })).unwrap();
        let commands = BufReader::new(stream.try_clone().unwrap());
        for command in Deserializer::from_reader(commands).into_iter::<Value>() {
            let answer = match command.unwrap()["execute"].as_str().unwrap() {
                "snapshot-delete" => {
                    writeln!(stream, "{event}").unwrap();
                    json!({ "job-id": "quick" })
                }
                "query-jobs" => json!([]),
                _ => json!({}),
            };
            writeln!(stream, "{}", json!({ "return": answer })).unwrap();
        }
    }

    /// The event was thrown away with all that came before the answer to the command, and ten seconds later the job was told to
    /// have failed.
    #[test]
    fn a_job_that_ends_before_its_command_is_answered_is_heard_of() {
        let data = json!({ "device": "quick" });
        let failed = json!({ "device": "quick", "error": "no room" });
        for (event, data, story) in [
            ("BLOCK_JOB_COMPLETED", &data, None),
            ("BLOCK_JOB_COMPLETED", &failed, Some("no room")),
            ("BLOCK_JOB_CANCELLED", &data, Some("it was cancelled")),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let socket = folder.path().join("control");
            let listener = UnixListener::bind(&socket).unwrap();
            let event = json!({ "event": event, "data": data });
            let daemon = thread::spawn(move || serve(&listener, &event));
            let mut via = Via::Control(Connection::open(&Daemon { control: Some(socket) }).unwrap());
            let options = JobOptions::default();
            let id = via.delete(DeleteRequest { name: "one".to_owned(), options }).unwrap();
            let failure = wait(&mut via, &id, true).err().map(|failure| failure.to_string());
            assert_eq!(failure, story.map(|story| format!("frazil: run job quick: {story}")));
            drop(via);
            daemon.join().unwrap();
        }
    }
}
