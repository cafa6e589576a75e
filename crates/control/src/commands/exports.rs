//! The NBD server and its exports, as QEMU has them.

use backup::{ExportOptions, ServerOptions, TlsCredentials};
use serde::Deserialize;
use serde_json::Value;

use super::{Arguments, Caller, Command, Outcome, done, typed, value};

pub(super) const COMMANDS: &[Command] = &[
    ("object-add", add_object),
    ("object-del", |caller, arguments| done(caller.service.remove_credentials(&typed::<Id>(arguments)?.id))),
    ("nbd-server-start", |caller, arguments| {
        done(caller.service.start_server(typed::<ServerOptions>(arguments)?))
    }),
    ("nbd-server-add", add_named),
    ("nbd-server-remove", |caller, arguments| {
        let Named { name, mode } = typed(arguments)?;
        done(caller.service.remove_export_named(&name, mode == Mode::Hard))
    }),
    ("nbd-server-stop", |caller, _| done(caller.service.stop_server())),
    ("block-export-add", |caller, arguments| {
        done(caller.service.add_export(typed::<ExportOptions>(arguments)?))
    }),
    ("block-export-del", |caller, arguments| {
        let Export { id, mode } = typed(arguments)?;
        done(caller.service.remove_export(&id, mode == Mode::Hard))
    }),
    ("query-block-exports", |caller, _| value(&caller.service.exports())),
];

#[derive(Deserialize)]
struct Id {
    id: String,
}

/// How an export is removed that is in use.
#[derive(Clone, Copy, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    #[default]
    Safe,
    Hard,
}

#[derive(Deserialize)]
struct Export {
    id: String,
    #[serde(default)]
    mode: Mode,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    #[serde(default)]
    mode: Mode,
}

/// `qom-type` can be one only, as the schema has it.
fn add_object(caller: &Caller<'_>, arguments: Arguments) -> Outcome {
    done(caller.service.add_credentials(&typed::<TlsCredentials>(arguments)?))
}

/// The older form of `block-export-add`: the name that clients ask for is the id, and there is one bitmap at most.
fn add_named(caller: &Caller<'_>, mut arguments: Arguments) -> Outcome {
    let device = arguments.remove("device").unwrap_or_default();
    let name = arguments.get("name").cloned().unwrap_or_else(|| device.clone());
    let bitmaps = arguments.remove("bitmap").into_iter().collect::<Vec<Value>>();
    arguments.insert("id".to_owned(), name.clone());
    arguments.insert("name".to_owned(), name);
    arguments.insert("node-name".to_owned(), device);
    arguments.insert("bitmaps".to_owned(), Value::Array(bitmaps));
    done(caller.service.add_export(typed::<ExportOptions>(arguments)?))
}
