//! Jobs: begun, watched, steered.

use block::ErrorKind;
use serde::Deserialize;
use snapshot::{CommitRequest, StreamRequest};

use super::{Arguments, Caller, Command, Outcome, nothing, typed, value};
use crate::error::{CommandError, ErrorClass};

pub(super) const COMMANDS: &[Command] = &[
    ("block-commit", commit),
    ("block-stream", stream),
    ("query-jobs", |caller, _| value(&caller.service.jobs())),
    ("job-pause", |caller, id| of_job(id, |id| caller.service.pause_job(id))),
    ("job-resume", |caller, id| of_job(id, |id| caller.service.resume_job(id))),
    ("job-cancel", |caller, id| of_job(id, |id| caller.service.cancel_job(id))),
    ("job-dismiss", |caller, id| of_job(id, |id| caller.service.dismiss_job(id))),
    ("block-job-set-speed", set_speed),
];

#[derive(Deserialize)]
struct Id {
    id: String,
}

#[derive(Deserialize)]
struct Speed {
    device: String,
    speed: u64,
}

fn commit(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    caller.service.commit(typed::<CommitRequest>(arguments)?)?;
    nothing()
}

fn stream(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    caller.service.stream(typed::<StreamRequest>(arguments)?)?;
    nothing()
}

/// A command that names a job and nothing else. QEMU's class for a job that is not there is `GenericError`.
fn of_job(arguments: Arguments, ask: impl Fn(&str) -> block::Result<()>) -> Outcome {
    let Id { id } = typed(arguments)?;
    ask(&id).map_err(|error| CommandError::generic(error.to_string()))?;
    nothing()
}

fn set_speed(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Speed { device, speed } = typed(arguments)?;
    caller.service.set_job_speed(&device, speed).map_err(|error| {
        let class = match error.kind() {
            ErrorKind::NotFound => ErrorClass::DeviceNotActive,
            _ => ErrorClass::GenericError,
        };
        CommandError { class, desc: error.to_string() }
    })?;
    nothing()
}
