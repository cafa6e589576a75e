//! The commands: what each does. What it takes and returns is in the schema, and has been checked before it runs.

mod blockdev;
mod disabled;
mod disks;
mod exports;
mod jobs;
mod marks;
mod protocol;
mod snapshots;

use std::ops::ControlFlow;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use snapshot::ClientId;

use crate::Service;
use crate::error::CommandError;
use crate::message::Request;
use crate::schema::SCHEMA;

#[cfg(test)]
pub(crate) use snapshots::{EXPORT_PROGRESS, EXPORT_READY};

/// The command that ends the negotiation, and works only in it.
const NEGOTIATE: &str = "qmp_capabilities";

/// Where a command comes from.
pub(crate) struct Caller<'a> {
    /// What it acts on.
    pub(crate) service: &'a dyn Service,
    /// Who asks.
    pub(crate) client: ClientId,
    /// Sends an event to this client alone, or drops it if the client is slow. A break if the client is gone: what is done
    /// for it alone shall end.
    pub(crate) progress: &'a dyn Fn(&str, Value) -> ControlFlow<()>,
    /// Whether the client has gone.
    pub(crate) is_gone: &'a dyn Fn() -> bool,
}

#[cfg(any(test, feature = "fuzzing"))]
impl<'a> Caller<'a> {
    /// A client that follows no progress, and has gone once anybody looks.
    pub(crate) fn alone(service: &'a dyn Service) -> Self {
        Self { service, client: 1, progress: &|_, _| ControlFlow::Continue(()), is_gone: &|| true }
    }
}

type Arguments = Map<String, Value>;
type Outcome = Result<Value, CommandError>;

/// A command's name, and what it does with arguments that conform to the schema.
pub(crate) type Command = (&'static str, fn(&Caller<'_>, Arguments) -> Outcome);

/// All of them. The schema has the same; a test compares the two.
pub(crate) fn all() -> impl Iterator<Item = &'static Command> {
    [
        protocol::COMMANDS,
        disks::COMMANDS,
        snapshots::COMMANDS,
        marks::COMMANDS,
        jobs::COMMANDS,
        blockdev::COMMANDS,
        exports::COMMANDS,
    ]
    .into_iter()
    .flatten()
}

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

pub(crate) fn run(caller: &Caller<'_>, name: &str, arguments: Arguments) -> Outcome {
    if let Some(refusal) = disabled::refusal(name, &arguments) {
        return Err(refusal);
    }
    let known = all().find(|(command, _)| *command == name).zip(SCHEMA.commands.get(name));
    let Some(((_, run), signature)) = known else {
        return Err(CommandError::command_not_found(format!("The command {name} has not been found")));
    };
    SCHEMA.check(&signature.arguments, &arguments)?;
    run(caller, arguments)
}

/// The arguments as a type. They have been checked, so this fails only where the type is narrower than the schema.
fn typed<T: DeserializeOwned>(arguments: Arguments) -> Result<T, CommandError> {
    serde_json::from_value(Value::Object(arguments))
        .map_err(|error| CommandError::generic(format!("Invalid arguments: {error}")))
}

fn value(result: &impl Serialize) -> Outcome {
    serde_json::to_value(result).map_err(|error| CommandError::generic(format!("Cannot be told: {error}")))
}

fn nothing() -> Outcome {
    Ok(json!({}))
}

/// The end of a command of QEMU's block layer: its class for a disk or node that is not there is `GenericError`, as for all
/// else that can go wrong.
fn done(outcome: block::Result<()>) -> Outcome {
    outcome.map_err(|error| CommandError::generic(error.to_string()))?;
    nothing()
}

#[cfg(test)]
mod tests;
