//! The protocol itself: negotiation, what there is, the end.

use serde_json::{Value, json};

use super::{Arguments, Caller, Command, NEGOTIATE, Outcome, all, nothing};
use crate::error::CommandError;
use crate::message::version;
use crate::schema::{SCHEMA, introspect};

pub(super) const COMMANDS: &[Command] = &[
    (NEGOTIATE, capabilities),
    ("query-version", |_, _| Ok(version())),
    ("query-commands", |_, _| Ok(all().map(|(name, _)| json!({ "name": name })).collect())),
    ("query-qmp-schema", |_, _| Ok(introspect(&SCHEMA))),
    // Frazil does not know what the guest is called, so QEMU's optional member stays away.
    ("query-name", |_, _| Ok(json!({}))),
    // Disks and nothing else: clients that look at what is in the machine before a backup find no TPM.
    ("query-tpm", |_, _| Ok(json!([]))),
    ("quit", quit),
];

fn capabilities(_: &Caller<'_>, arguments: Arguments) -> Outcome {
    match arguments.get("enable").and_then(Value::as_array) {
        // The only capability there is in QEMU, and it is not offered.
        Some(enable) if !enable.is_empty() => Err(CommandError::generic("Capability oob not available")),
        _ => nothing(),
    }
}

fn quit(caller: &Caller<'_>, _: Arguments) -> Outcome {
    caller.service.quit();
    nothing()
}
