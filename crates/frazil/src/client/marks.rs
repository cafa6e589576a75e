//! `frazil checkpoint` and `frazil changes`.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use snapshot::CheckpointRequest;

use super::print::{decode, print, show_or_json};
use super::table;
use super::via::{Via, of_state, to_value};
use crate::cli::{Changes, Checkpoint};
use crate::failure::Failure;

/// Ranges that are asked for at once.
const PAGE: u64 = 8192;

/// `frazil checkpoint …`.
pub(crate) fn checkpoint(command: Checkpoint) -> Result<(), Failure> {
    match command {
        Checkpoint::Create { what, snapshot, place, output } => {
            let doing = format!("create checkpoint {}", what.name);
            let request =
                CheckpointRequest { name: what.name, disks: what.disks, freeze: what.freeze, snapshot };
            let made = match Via::open(&place)? {
                Via::Control(mut connection) => {
                    connection.ask(&doing, "checkpoint-create", to_value(&doing, &request)?)?
                }
                Via::State(service) => {
                    let made = service.checkpoint_create(request);
                    to_value(&doing, &made.map_err(|error| of_state(&doing, &error))?)?
                }
            };
            show_or_json(output, &made, |made| table::checkpoints(std::slice::from_ref(made)))
        }
        Checkpoint::List { place, output } => {
            let what = "list the checkpoints";
            let list = match Via::open(&place)? {
                Via::Control(mut connection) => connection.ask(what, "query-checkpoints", json!({}))?,
                Via::State(service) => to_value(what, &service.checkpoints())?,
            };
            show_or_json(output, &list, |list: &Vec<_>| table::checkpoints(list))
        }
        Checkpoint::Delete { name, place } => {
            let what = format!("delete checkpoint {name}");
            match Via::open(&place)? {
                Via::Control(mut connection) => {
                    connection.ask(&what, "checkpoint-delete", json!({ "name": name })).map(drop)
                }
                Via::State(service) => {
                    service.checkpoint_delete(&name).map_err(|error| of_state(&what, &error))
                }
            }?;
            print(&format!("deleted checkpoint {name}\n"))
        }
    }
}

/// What changed, as it is shown.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Found {
    pub(super) capacity: u64,
    pub(super) granularity: u64,
    pub(super) ranges: Vec<Range>,
    /// Of a part: where the next one begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<u64>,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// `frazil changes …`.
pub(crate) fn changes(asked: &Changes) -> Result<(), Failure> {
    let what = format!("list the changes of disk {}", asked.disk);
    let found = match Via::open(&asked.place)? {
        Via::Control(mut connection) => {
            let mut page = |offset| {
                let returned = connection.ask(&what, "query-changes", question(asked, offset))?;
                decode::<Found>(&what, &returned)
            };
            let mut found = page(0)?;
            while let Some(offset) = found.next {
                let more = page(offset)?;
                found.ranges.extend(more.ranges);
                // A guest that writes on could keep an answer from coming to its end, but not a disk's.
                found.next = more.next.filter(|next| *next > offset);
            }
            found
        }
        Via::State(service) => {
            let to = asked.to.as_deref();
            let changes = service.changes(&asked.disk, &asked.from, to, asked.granularity);
            let changes = changes.map_err(|error| of_state(&what, &error))?;
            let ranges = changes.ranges().map(|range| Range { offset: range.offset, length: range.len });
            let ranges = ranges.collect();
            Found { capacity: changes.capacity(), granularity: changes.granularity(), ranges, next: None }
        }
    };
    show_or_json(asked.output, &to_value(&what, &found)?, table::changes)
}

fn question(asked: &Changes, offset: u64) -> Value {
    let mut question = json!({ "disk": asked.disk, "from": asked.from, "offset": offset, "limit": PAGE });
    let given =
        [("to", asked.to.clone().map(Value::from)), ("granularity", asked.granularity.map(Value::from))];
    for (name, value) in given {
        if let Some(value) = value {
            question[name] = value;
        }
    }
    question
}
