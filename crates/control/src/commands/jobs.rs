//! Jobs: begun, watched, steered.

use block::{Error, ErrorKind};
use serde::Deserialize;
use snapshot::{CommitRequest, JobVerb, StreamRequest};

use super::{Arguments, Caller, Command, Outcome, done, nothing, typed, value};
use crate::error::{CommandError, ErrorClass};

pub(super) const COMMANDS: &[Command] = &[
    ("block-commit", commit),
    ("block-stream", stream),
    ("query-jobs", |caller, _| value(&caller.service.jobs())),
    ("query-block-jobs", |caller, _| value(&caller.service.block_jobs())),
    ("job-pause", |caller, id| of_job(caller, id, JobVerb::Pause)),
    ("job-resume", |caller, id| of_job(caller, id, JobVerb::Resume)),
    ("job-cancel", |caller, id| of_job(caller, id, JobVerb::Cancel)),
    ("job-complete", |caller, id| of_job(caller, id, JobVerb::Complete)),
    ("job-finalize", |caller, id| of_job(caller, id, JobVerb::Finalize)),
    ("job-dismiss", |caller, id| of_job(caller, id, JobVerb::Dismiss)),
    ("block-job-pause", |caller, device| of_block_job(caller, device, JobVerb::Pause)),
    ("block-job-resume", |caller, device| of_block_job(caller, device, JobVerb::Resume)),
    ("block-job-cancel", cancel),
    ("block-job-complete", |caller, device| of_block_job(caller, device, JobVerb::Complete)),
    ("block-job-finalize", |caller, id| of_block_job(caller, id, JobVerb::Finalize)),
    ("block-job-dismiss", |caller, id| of_block_job(caller, id, JobVerb::Dismiss)),
    ("block-job-set-speed", set_speed),
];

#[derive(Deserialize)]
struct Id {
    id: String,
}

#[derive(Deserialize)]
struct Device {
    #[serde(alias = "id")]
    device: String,
}

#[derive(Deserialize)]
struct Cancel {
    device: String,
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize)]
struct Speed {
    device: String,
    speed: u64,
}

/// As in QEMU, and only here, a disk that is not there has a class of its own: libvirt tells by it what can be done.
fn commit(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let mut request: CommitRequest = typed(arguments)?;
    request.options.client = Some(caller.client);
    caller.service.commit(request)?;
    nothing()
}

fn stream(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let mut request: StreamRequest = typed(arguments)?;
    request.options.client = Some(caller.client);
    done(caller.service.stream(request).map(drop))
}

/// A command that names a job by its id. QEMU's class for a job that is not there is `GenericError`.
fn of_job(caller: &Caller<'_>, arguments: Arguments, verb: JobVerb) -> Outcome {
    let Id { id } = typed(arguments)?;
    done(caller.service.ask_job(&id, verb))
}

/// An older command, most of which call the id `device`. QEMU has a class of its own for these.
fn of_block_job(caller: &Caller<'_>, arguments: Arguments, verb: JobVerb) -> Outcome {
    let Device { device } = typed(arguments)?;
    caller.service.ask_job(&device, verb).map_err(|error| not_active(&device, &error))?;
    nothing()
}

/// A job that still copies something when it is called off leaves that if it is called off once more: `force` is that at
/// once.
fn cancel(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Cancel { device, force } = typed(arguments)?;
    let ask = || caller.service.ask_job(&device, JobVerb::Cancel);
    ask().map_err(|error| not_active(&device, &error))?;
    if force {
        // It may have ended since.
        let _ = ask();
    }
    nothing()
}

fn set_speed(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Speed { device, speed } = typed(arguments)?;
    caller.service.set_job_speed(&device, speed).map_err(|error| not_active(&device, &error))?;
    nothing()
}

fn not_active(device: &str, error: &Error) -> CommandError {
    match error.kind() {
        ErrorKind::NotFound => CommandError {
            class: ErrorClass::DeviceNotActive,
            desc: format!("Block job '{device}' not found"),
        },
        _ => CommandError::generic(error.to_string()),
    }
}
