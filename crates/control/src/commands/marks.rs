//! Checkpoints, and what changed since.

use block::ByteRange;
use serde::{Deserialize, Serialize};
use snapshot::Changes;

use super::{Arguments, Caller, Command, Outcome, nothing, typed, value};

/// Ranges in one reply unless told otherwise.
const LIMIT: usize = 1024;

/// And at most: a reply waits in memory for its client, less than 1 MiB of it.
const MAX_LIMIT: u64 = 16_384;

pub(super) const COMMANDS: &[Command] = &[
    ("checkpoint-create", |caller, arguments| value(&caller.service.checkpoint_create(typed(arguments)?)?)),
    ("checkpoint-delete", delete),
    ("query-checkpoints", |caller, _| value(&caller.service.checkpoints())),
    ("query-changes", query_changes),
];

#[derive(Deserialize)]
struct Name {
    name: String,
}

#[derive(Deserialize)]
struct Query {
    disk: String,
    from: String,
    to: Option<String>,
    granularity: Option<u64>,
    #[serde(default)]
    offset: u64,
    limit: Option<u64>,
}

/// A part of the changes.
#[derive(Serialize)]
struct Page {
    capacity: u64,
    granularity: u64,
    ranges: Vec<Range>,
    /// Where the next part begins, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<u64>,
}

#[derive(Serialize)]
struct Range {
    offset: u64,
    length: u64,
}

fn delete(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    caller.service.checkpoint_delete(&typed::<Name>(arguments)?.name)?;
    nothing()
}

fn query_changes(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Query { disk, from, to, granularity, offset, limit } = typed(arguments)?;
    let changes = caller.service.changes(&disk, &from, to.as_deref(), granularity)?;
    let limit = limit.map_or(LIMIT, |limit| limit.clamp(1, MAX_LIMIT) as usize);
    value(&page(&changes, offset, limit))
}

fn page(changes: &Changes, offset: u64, limit: usize) -> Page {
    let rest = ByteRange { offset, len: changes.capacity().saturating_sub(offset) };
    let mut found = changes.within(rest);
    let told = |range: ByteRange| Range { offset: range.offset, length: range.len };
    let ranges = found.by_ref().take(limit).map(told).collect();
    let next = found.next().map(|range| range.offset);
    Page { capacity: changes.capacity(), granularity: changes.granularity(), ranges, next }
}
