//! The daemon and its disks.

use serde::Deserialize;
use serde_json::json;
use snapshot::{BitmapInfo, DiskStatus};

use super::{Arguments, Caller, Command, Outcome, done, nothing, typed, value};
use crate::blocks;
use crate::error::CommandError;
use crate::stats::block_stats;

pub(super) const COMMANDS: &[Command] = &[
    ("query-status", run_state),
    ("query-frazil", query_frazil),
    ("query-block", query_block),
    ("query-named-block-nodes", query_nodes),
    ("query-blockstats", query_stats),
    ("block_resize", resize),
    ("change-backing-file", rename_backing),
    ("stop", stop),
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
    let status = match (caller.service.is_stopped(), running) {
        (true, _) => "paused",
        (false, true) => "running",
        (false, false) => "prelaunch",
    };
    let sandbox = caller.service.status().sandbox;
    Ok(json!({ "running": status == "running", "status": status, "sandbox": sandbox }))
}

fn query_frazil(caller: &Caller<'_>, _: Arguments) -> Outcome {
    let mut status = value(&caller.service.status())?;
    status["disks"] = value(&caller.service.disks())?;
    Ok(status)
}

fn query_block(caller: &Caller<'_>, _: Arguments) -> Outcome {
    let info = |disk: DiskStatus| blocks::block_info(&disk, bitmaps(caller, &disk));
    value(&caller.service.disks().into_iter().map(info).collect::<Vec<_>>())
}

/// The bitmaps of a disk; none while its images are closed for a revert.
fn bitmaps(caller: &Caller<'_>, disk: &DiskStatus) -> Vec<BitmapInfo> {
    caller.service.bitmaps(&disk.id).unwrap_or_default()
}

/// The disks, their layers, and what was added. Nodes do not hold others here, so `flat` makes no difference.
fn query_nodes(caller: &Caller<'_>, _: Arguments) -> Outcome {
    let mut nodes = Vec::new();
    for disk in caller.service.disks() {
        nodes.extend(blocks::whole(&disk, bitmaps(caller, &disk)));
        nodes.extend(blocks::nodes(&disk));
    }
    nodes.extend(caller.service.nodes().into_iter().map(blocks::added));
    value(&nodes)
}

/// Disks are the only nodes that count, so `query-nodes` makes no difference.
fn query_stats(caller: &Caller<'_>, _: Arguments) -> Outcome {
    let stats = caller.service.stats();
    value(&stats.into_iter().map(|(id, stats)| block_stats(id, &stats)).collect::<Vec<_>>())
}

fn resize(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Resize { device, node_name, size } = typed(arguments)?;
    let device = match (device, node_name) {
        (Some(device), None) => Ok(device),
        (None, Some(node)) => blocks::device_of(&caller.service.disks(), &node),
        _ => return Err(CommandError::generic("Exactly one of 'device' and 'node-name' must be given")),
    };
    done(device.and_then(|device| caller.service.resize(&device, size)))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Backing {
    device: String,
    image_node_name: String,
    backing_file: String,
}

fn rename_backing(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Backing { device, image_node_name, backing_file } = typed(arguments)?;
    done(caller.service.rename_backing(&device, &image_node_name, &backing_file))
}

fn stop(caller: &Caller<'_>, _: Arguments) -> Outcome {
    caller.service.stop()?;
    nothing()
}

fn resume(caller: &Caller<'_>, _: Arguments) -> Outcome {
    caller.service.resume();
    nothing()
}
