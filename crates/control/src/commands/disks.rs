//! The daemon and its disks.

use serde::Deserialize;
use serde_json::json;

use super::{Arguments, Caller, Command, Outcome, nothing, typed, value};
use crate::blocks;
use crate::error::CommandError;

pub(super) const COMMANDS: &[Command] = &[
    ("query-status", run_state),
    ("query-frazil", query_frazil),
    ("query-block", query_block),
    ("query-named-block-nodes", query_nodes),
    ("block_resize", resize),
    ("cont", resume),
];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Resize {
    device: Option<String>,
    node_name: Option<String>,
    size: u64,
}

fn run_state(caller: &Caller<'_>, _: Arguments) -> Outcome {
    let running = caller.service.disks().iter().any(|disk| disk.connected);
    Ok(json!({ "running": running, "status": if running { "running" } else { "prelaunch" } }))
}

fn query_frazil(caller: &Caller<'_>, _: Arguments) -> Outcome {
    let mut status = value(&caller.service.status())?;
    status["disks"] = value(&caller.service.disks())?;
    Ok(status)
}

fn query_block(caller: &Caller<'_>, _: Arguments) -> Outcome {
    value(&caller.service.disks().iter().map(blocks::block_info).collect::<Vec<_>>())
}

fn query_nodes(caller: &Caller<'_>, _: Arguments) -> Outcome {
    value(&caller.service.disks().iter().flat_map(blocks::nodes).collect::<Vec<_>>())
}

fn resize(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Resize { device, node_name, size } = typed(arguments)?;
    let device = match (device, node_name) {
        (Some(device), None) => device,
        (None, Some(node)) => blocks::device_of(&caller.service.disks(), &node)?,
        _ => return Err(CommandError::generic("Exactly one of 'device' and 'node-name' must be given")),
    };
    caller.service.resize(&device, size)?;
    nothing()
}

fn resume(caller: &Caller<'_>, _: Arguments) -> Outcome {
    caller.service.resume();
    nothing()
}
