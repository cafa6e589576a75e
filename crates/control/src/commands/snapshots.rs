//! Snapshots: taken at once or in two phases, read, reverted to, deleted.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use backup::{ServeRequest, Serving};
use serde::Deserialize;
use serde_json::json;
use snapshot::{CreateRequest, DeleteRequest, FreezePolicy, ImageFormat};

use super::{Arguments, Caller, Command, Outcome, nothing, typed, value};
use crate::error::CommandError;

/// The event that only the client that exports receives.
pub(crate) const EXPORT_PROGRESS: &str = "FRAZIL_EXPORT_PROGRESS";

/// The event by which the client that asked for it hears that a snapshot is being served.
pub(crate) const EXPORT_READY: &str = "FRAZIL_EXPORT_READY";

/// How long a prepared snapshot may hold the guest's I/O unless told otherwise, in milliseconds. Windows thaws itself
/// after 10 s, a Linux guest complains of hung tasks after 120 s.
const LEASE: u64 = 5_000;

pub(super) const COMMANDS: &[Command] = &[
    ("snapshot-create", |caller, arguments| value(&caller.service.create(typed(arguments)?)?)),
    ("snapshot-prepare", prepare),
    ("snapshot-release", |caller, arguments| {
        value(&caller.service.release(&typed::<Name>(arguments)?.name)?)
    }),
    ("snapshot-abort", abort),
    ("query-snapshots", |caller, _| value(&caller.service.list())),
    ("query-snapshot", query_snapshot),
    ("snapshot-delete", delete),
    ("snapshot-revert", revert),
    ("snapshot-export", export),
    ("snapshot-serve", serve),
];

#[derive(Deserialize)]
struct Name {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Prepare {
    name: String,
    disks: Option<Vec<String>>,
    freeze: Option<FreezePolicy>,
    lease: Option<u64>,
}

#[derive(Deserialize)]
struct Query {
    name: String,
    #[serde(default)]
    probe: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Revert {
    name: String,
    #[serde(default)]
    discard_newer: bool,
}

#[derive(Deserialize)]
struct Export {
    name: String,
    disk: String,
    target: PathBuf,
    format: ImageFormat,
}

fn prepare(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Prepare { name, disks, freeze, lease } = typed(arguments)?;
    let lease = Duration::from_millis(lease.unwrap_or(LEASE));
    caller.service.prepare(CreateRequest { name, disks, freeze }, lease)?;
    nothing()
}

fn abort(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    caller.service.abort(&typed::<Name>(arguments)?.name)?;
    nothing()
}

fn query_snapshot(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Query { name, probe } = typed(arguments)?;
    let mut found = json!({ "snapshot": value(&caller.service.show(&name)?)? });
    if probe {
        found["probe"] = value(&caller.service.probe(&name)?)?;
    }
    Ok(found)
}

fn delete(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let mut request: DeleteRequest = typed(arguments)?;
    request.options.client = Some(caller.client);
    let id = caller.service.delete(request)?;
    Ok(json!({ "job-id": id }))
}

fn revert(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Revert { name, discard_newer } = typed(arguments)?;
    caller.service.revert(&name, discard_newer)?;
    nothing()
}

fn export(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Export { name, disk, target, format } = typed(arguments)?;
    absolute(&target)?;
    let progress = |offset: u64, len: u64| {
        let data = json!({ "name": name, "disk": disk, "offset": offset, "len": len });
        (caller.progress)(EXPORT_PROGRESS, data)
    };
    caller.service.export(&name, &disk, &target, format, &progress)?;
    nothing()
}

/// Serves until the client has gone: so an export lasts as long as the program that asked for it.
fn serve(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let request: ServeRequest = typed(arguments)?;
    let tell = |serving: Serving| match serving {
        Serving::Ready(address) => {
            let data = json!({ "name": request.name, "disk": request.disk, "address": address });
            (caller.progress)(EXPORT_READY, data)
        }
        Serving::GoOn if (caller.is_gone)() => ControlFlow::Break(()),
        Serving::GoOn => ControlFlow::Continue(()),
    };
    caller.service.serve(&request, &tell)?;
    nothing()
}

/// The daemon's working directory means nothing to a client.
fn absolute(path: &Path) -> Result<(), CommandError> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(CommandError::generic("Parameter 'target' expects an absolute path")),
    }
}
