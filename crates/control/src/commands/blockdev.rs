//! Nodes, bitmaps and backups, as QEMU's block layer has them.

use backup::{Action, CompletionMode, ImageOptions, NodeOptions};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Arguments, Caller, Command, Outcome, done, nothing, typed};
use crate::error::CommandError;

pub(super) const COMMANDS: &[Command] = &[
    ("blockdev-add", add),
    ("blockdev-create", create),
    ("blockdev-del", remove),
    ("qom-set", set_property),
    ("blockdev-backup", |caller, arguments| single(caller, arguments, Action::BlockdevBackup)),
    ("drive-backup", |caller, arguments| single(caller, arguments, Action::DriveBackup)),
    ("block-dirty-bitmap-add", |caller, arguments| single(caller, arguments, Action::BlockDirtyBitmapAdd)),
    ("block-dirty-bitmap-remove", |caller, arguments| {
        single(caller, arguments, Action::BlockDirtyBitmapRemove)
    }),
    ("block-dirty-bitmap-clear", |caller, arguments| {
        single(caller, arguments, Action::BlockDirtyBitmapClear)
    }),
    ("block-dirty-bitmap-enable", |caller, arguments| {
        single(caller, arguments, Action::BlockDirtyBitmapEnable)
    }),
    ("block-dirty-bitmap-disable", |caller, arguments| {
        single(caller, arguments, Action::BlockDirtyBitmapDisable)
    }),
    ("block-dirty-bitmap-merge", |caller, arguments| {
        single(caller, arguments, Action::BlockDirtyBitmapMerge)
    }),
    ("transaction", transaction),
];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Node {
    node_name: String,
}

#[derive(Deserialize)]
struct Property {
    path: String,
    property: String,
    value: Value,
}

#[derive(Deserialize)]
struct Transaction {
    actions: Vec<Action>,
    #[serde(default)]
    properties: Properties,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Properties {
    #[serde(default)]
    completion_mode: CompletionMode,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Creation {
    job_id: String,
    options: ImageOptions,
}

fn add(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    done(caller.service.add_node(typed::<NodeOptions>(arguments)?))
}

fn create(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Creation { job_id, options } = typed(arguments)?;
    done(caller.service.create_image(job_id, options, caller.client))
}

fn remove(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Node { node_name } = typed(arguments)?;
    done(caller.service.remove_node(&node_name))
}

fn set_property(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Property { path, property, value } = typed(arguments)?;
    match (property.as_str(), &value) {
        ("drive", Value::String(node)) => {
            caller.service.set_drive(&path, node)?;
            nothing()
        }
        ("drive", _) => Err(CommandError::generic("Invalid parameter type for 'drive', expected: string")),
        (property, _) => Err(CommandError::generic(format!("Property '{path}.{property}' not found"))),
    }
}

/// A command that is a transaction of one action.
fn single<T: DeserializeOwned>(
    caller: &Caller<'_>,
    arguments: Arguments,
    action: fn(T) -> Action,
) -> Outcome {
    let action = action(typed(arguments)?);
    done(caller.service.transaction(vec![action], CompletionMode::Individual, caller.client))
}

fn transaction(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    let Transaction { actions, properties } = typed(arguments)?;
    done(caller.service.transaction(actions, properties.completion_mode, caller.client))
}
