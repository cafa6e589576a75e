//! The commands: name, parameters, what they do.

use std::path::{Path, PathBuf};
use std::time::Duration;

use block::ErrorKind;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use snapshot::{CommitRequest, CreateRequest, DeleteRequest, FreezePolicy, ImageFormat, StreamRequest};

use crate::error::{CommandError, ErrorClass};
use crate::message::{Request, version};
use crate::params::{Kind, Param, check, optional, required};
use crate::{Service, blocks};

/// The command that ends the negotiation, and works only in it.
const NEGOTIATE: &str = "qmp_capabilities";

/// The event that only the client that exports receives.
pub(crate) const EXPORT_PROGRESS: &str = "FRAZIL_EXPORT_PROGRESS";

/// How long a prepared snapshot may hold the guest's I/O: unless told otherwise, and at most. In milliseconds. Windows
/// thaws itself after 10 s, a Linux guest complains of hung tasks after 120 s.
const LEASE_DEFAULT: u64 = 5_000;
const LEASE_MAX: u64 = snapshot::MAX_LEASE.as_millis() as u64;

/// Where a command comes from.
pub(crate) struct Caller<'a> {
    /// What it acts on.
    pub(crate) service: &'a dyn Service,
    /// Sends an event to this client alone, or drops it if the client is slow.
    pub(crate) progress: &'a dyn Fn(&str, Value),
}

type Outcome = Result<Value, CommandError>;

/// A command.
pub(crate) struct Command {
    pub(crate) name: &'static str,
    pub(crate) params: &'static [Param],
    /// The arguments have passed [`check`].
    run: fn(&Caller<'_>, Map<String, Value>) -> Outcome,
}

const FREEZE: Kind = Kind::Enum(&["require", "prefer", "never"]);
const FORMAT: Kind = Kind::Enum(&["raw", "qcow2"]);
const CAPABILITY: Kind = Kind::Enum(&["oob"]);
const NAME: &[Param] = &[required("name", Kind::Str)];
const ID: &[Param] = &[required("id", Kind::Str)];
const SPEED: Kind = Kind::Int { min: 0, max: i64::MAX as u64 };

/// All of them. The schema, `docs/qapi/frazil.json`, has the same; a test compares the two.
pub(crate) const COMMANDS: &[Command] = &[
    Command { name: NEGOTIATE, params: &[optional("enable", Kind::List(&CAPABILITY))], run: capabilities },
    Command { name: "query-version", params: &[], run: |_, _| Ok(version()) },
    Command { name: "query-commands", params: &[], run: |_, _| Ok(names()) },
    // Frazil does not know what the guest is called, so QEMU's optional member stays away.
    Command { name: "query-name", params: &[], run: |_, _| Ok(json!({})) },
    Command { name: "query-status", params: &[], run: run_state },
    Command {
        name: "block_resize",
        params: &[
            optional("device", Kind::Str),
            optional("node-name", Kind::Str),
            required("size", Kind::Int { min: 0, max: i64::MAX as u64 }),
        ],
        run: resize,
    },
    Command { name: "cont", params: &[], run: resume },
    Command { name: "query-block", params: &[], run: query_block },
    Command { name: "query-named-block-nodes", params: &[], run: query_nodes },
    Command { name: "query-frazil", params: &[], run: query_frazil },
    Command {
        name: "snapshot-create",
        params: &[
            required("name", Kind::Str),
            optional("disks", Kind::List(&Kind::Str)),
            optional("freeze", FREEZE),
        ],
        run: create,
    },
    Command {
        name: "snapshot-prepare",
        params: &[
            required("name", Kind::Str),
            optional("disks", Kind::List(&Kind::Str)),
            optional("freeze", FREEZE),
            optional("lease", Kind::Int { min: 1, max: LEASE_MAX }),
        ],
        run: prepare,
    },
    Command { name: "snapshot-release", params: NAME, run: release },
    Command { name: "snapshot-abort", params: NAME, run: abort },
    Command { name: "query-snapshots", params: &[], run: |caller, _| value(&caller.service.list()) },
    Command {
        name: "query-snapshot",
        params: &[required("name", Kind::Str), optional("probe", Kind::Bool)],
        run: query_snapshot,
    },
    Command {
        name: "snapshot-delete",
        params: &[
            required("name", Kind::Str),
            optional("job-id", Kind::Str),
            optional("speed", SPEED),
            optional("auto-dismiss", Kind::Bool),
        ],
        run: delete,
    },
    Command {
        name: "snapshot-revert",
        params: &[required("name", Kind::Str), optional("discard-newer", Kind::Bool)],
        run: revert,
    },
    Command {
        name: "snapshot-export",
        params: &[
            required("name", Kind::Str),
            required("disk", Kind::Str),
            required("target", Kind::Str),
            required("format", FORMAT),
        ],
        run: export,
    },
    Command {
        name: "block-commit",
        params: &[
            optional("job-id", Kind::Str),
            required("device", Kind::Str),
            optional("base-node", Kind::Str),
            optional("base", Kind::Str),
            optional("top-node", Kind::Str),
            optional("top", Kind::Str),
            optional("speed", SPEED),
            optional("auto-dismiss", Kind::Bool),
        ],
        run: commit,
    },
    Command {
        name: "block-stream",
        params: &[
            optional("job-id", Kind::Str),
            required("device", Kind::Str),
            optional("base", Kind::Str),
            optional("base-node", Kind::Str),
            optional("speed", SPEED),
            optional("auto-dismiss", Kind::Bool),
        ],
        run: stream,
    },
    Command { name: "query-jobs", params: &[], run: |caller, _| value(&caller.service.jobs()) },
    Command {
        name: "job-pause",
        params: ID,
        run: |caller, id| of_job(id, |id| caller.service.pause_job(id)),
    },
    Command {
        name: "job-resume",
        params: ID,
        run: |caller, id| of_job(id, |id| caller.service.resume_job(id)),
    },
    Command {
        name: "job-cancel",
        params: ID,
        run: |caller, id| of_job(id, |id| caller.service.cancel_job(id)),
    },
    Command {
        name: "job-dismiss",
        params: ID,
        run: |caller, id| of_job(id, |id| caller.service.dismiss_job(id)),
    },
    Command {
        name: "block-job-set-speed",
        params: &[required("device", Kind::Str), required("speed", SPEED)],
        run: set_speed,
    },
    Command { name: "quit", params: &[], run: quit },
];

/// Runs a request. `negotiated` is whether the client has left the negotiation, and becomes true when it does.
pub(crate) fn dispatch(caller: &Caller<'_>, negotiated: &mut bool, request: Request) -> Outcome {
    let Request { execute: name, arguments } = request;
    match (*negotiated, name == NEGOTIATE) {
        (false, false) => {
            Err(CommandError::command_not_found("Expecting capabilities negotiation with 'qmp_capabilities'"))
        }
        (true, true) => Err(CommandError::command_not_found(
            "Capabilities negotiation is already complete, command ignored",
        )),
        _ => {
            let outcome = run(caller, &name, arguments)?;
            *negotiated = true;
            Ok(outcome)
        }
    }
}

fn run(caller: &Caller<'_>, name: &str, arguments: Map<String, Value>) -> Outcome {
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        return Err(CommandError::command_not_found(format!("The command {name} has not been found")));
    };
    check(command.params, &arguments)?;
    (command.run)(caller, arguments)
}

/// The arguments as a type; they have been checked, so this fails only where the type is narrower than the check.
fn typed<T: DeserializeOwned>(arguments: Map<String, Value>) -> Result<T, CommandError> {
    serde_json::from_value(Value::Object(arguments))
        .map_err(|error| CommandError::generic(format!("Invalid arguments: {error}")))
}

fn value(result: &impl Serialize) -> Outcome {
    serde_json::to_value(result).map_err(|error| CommandError::generic(format!("Cannot be told: {error}")))
}

fn nothing() -> Outcome {
    Ok(json!({}))
}

#[derive(Deserialize)]
struct Name {
    name: String,
}

#[derive(Deserialize)]
struct Id {
    id: String,
}

#[derive(Deserialize)]
struct Speed {
    device: String,
    speed: u64,
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

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Resize {
    device: Option<String>,
    node_name: Option<String>,
    size: u64,
}

fn capabilities(_: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    match arguments.get("enable").and_then(Value::as_array) {
        // The only capability there is in QEMU, and it is not offered.
        Some(enable) if !enable.is_empty() => Err(CommandError::generic("Capability oob not available")),
        _ => nothing(),
    }
}

fn names() -> Value {
    COMMANDS.iter().map(|command| json!({ "name": command.name })).collect()
}

fn run_state(caller: &Caller<'_>, _: Map<String, Value>) -> Outcome {
    let running = caller.service.disks().iter().any(|disk| disk.connected);
    Ok(json!({ "running": running, "status": if running { "running" } else { "prelaunch" } }))
}

fn resize(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    let Resize { device, node_name, size } = typed(arguments)?;
    let device = match (device, node_name) {
        (Some(device), None) => device,
        (None, Some(node)) => blocks::device_of(&caller.service.disks(), &node)?,
        _ => return Err(CommandError::generic("Exactly one of 'device' and 'node-name' must be given")),
    };
    caller.service.resize(&device, size)?;
    nothing()
}

fn resume(caller: &Caller<'_>, _: Map<String, Value>) -> Outcome {
    caller.service.resume();
    nothing()
}

fn query_block(caller: &Caller<'_>, _: Map<String, Value>) -> Outcome {
    value(&caller.service.disks().iter().map(blocks::block_info).collect::<Vec<_>>())
}

fn query_nodes(caller: &Caller<'_>, _: Map<String, Value>) -> Outcome {
    value(&caller.service.disks().iter().flat_map(blocks::nodes).collect::<Vec<_>>())
}

fn query_frazil(caller: &Caller<'_>, _: Map<String, Value>) -> Outcome {
    let mut status = value(&caller.service.status())?;
    status["disks"] = value(&caller.service.disks())?;
    Ok(status)
}

fn create(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    value(&caller.service.create(typed(arguments)?)?)
}

fn prepare(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    let Prepare { name, disks, freeze, lease } = typed(arguments)?;
    let lease = Duration::from_millis(lease.unwrap_or(LEASE_DEFAULT));
    caller.service.prepare(CreateRequest { name, disks, freeze }, lease)?;
    nothing()
}

fn release(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    value(&caller.service.release(&typed::<Name>(arguments)?.name)?)
}

fn abort(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    caller.service.abort(&typed::<Name>(arguments)?.name)?;
    nothing()
}

fn query_snapshot(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    let Query { name, probe } = typed(arguments)?;
    let mut found = json!({ "snapshot": value(&caller.service.show(&name)?)? });
    if probe {
        found["probe"] = value(&caller.service.probe(&name)?)?;
    }
    Ok(found)
}

fn delete(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    let id = caller.service.delete(typed::<DeleteRequest>(arguments)?)?;
    Ok(json!({ "job-id": id }))
}

fn commit(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    caller.service.commit(typed::<CommitRequest>(arguments)?)?;
    nothing()
}

fn stream(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    caller.service.stream(typed::<StreamRequest>(arguments)?)?;
    nothing()
}

/// A command that names a job and nothing else. QEMU's class for a job that is not there is `GenericError`.
fn of_job(arguments: Map<String, Value>, ask: impl Fn(&str) -> block::Result<()>) -> Outcome {
    let Id { id } = typed(arguments)?;
    ask(&id).map_err(|error| CommandError::generic(error.to_string()))?;
    nothing()
}

fn set_speed(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
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

fn revert(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    let Revert { name, discard_newer } = typed(arguments)?;
    caller.service.revert(&name, discard_newer)?;
    nothing()
}

fn export(caller: &Caller<'_>, arguments: Map<String, Value>) -> Outcome {
    let Export { name, disk, target, format } = typed(arguments)?;
    absolute(&target)?;
    let progress = |offset: u64, len: u64| {
        let data = json!({ "name": name, "disk": disk, "offset": offset, "len": len });
        (caller.progress)(EXPORT_PROGRESS, data);
    };
    caller.service.export(&name, &disk, &target, format, &progress)?;
    nothing()
}

/// The daemon's working directory means nothing to a client.
fn absolute(path: &Path) -> Result<(), CommandError> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(CommandError::generic("Parameter 'target' expects an absolute path")),
    }
}

fn quit(caller: &Caller<'_>, _: Map<String, Value>) -> Outcome {
    caller.service.quit();
    nothing()
}

#[cfg(test)]
mod schema;
#[cfg(test)]
mod tests;
