//! The schema in `docs/qapi/frazil.json` against the code: it must list every command, event and member, and nothing
//! else, and what the commands return must be what it says.

use std::collections::BTreeMap;
use std::path::PathBuf;

use snapshot::{ErrorAction, Event, IoOperation, JobStatus, Step};
use time::OffsetDateTime;

use super::*;
use crate::stream::Stream;
use crate::testing::Fake;

const TEXT: &str = include_str!("../../../../docs/qapi/frazil.json");

/// The definitions of one kind (`command`, `event`, `struct`, `enum`) by name.
fn definitions(kind: &str) -> BTreeMap<String, Value> {
    let bare: String =
        TEXT.lines().filter(|line| !line.starts_with('#')).flat_map(|line| [line, "\n"]).collect();
    let (mut stream, mut input) = (Stream::default(), bare.as_bytes());
    let all = std::iter::from_fn(|| stream.next(&mut input)).map(Result::unwrap);
    all.filter_map(|value| Some((value.get(kind)?.as_str()?.to_owned(), value))).collect()
}

fn type_name(kind: &Kind) -> Value {
    match kind {
        Kind::Str => json!("str"),
        Kind::Bool => json!("bool"),
        Kind::Int { .. } => json!("int"),
        // An enumeration is known by its words.
        Kind::Enum(words) => {
            let enums = definitions("enum");
            json!(enums.iter().find(|(_, of)| of["data"] == json!(words)).map(|(name, _)| name))
        }
        Kind::List(kind) => json!([type_name(kind)]),
    }
}

/// Whether `value` is of the type `of`, and says where not.
fn conforms(of: &Value, value: &Value, place: &str) {
    if let Some([element]) = of.as_array().map(Vec::as_slice) {
        return value.as_array().unwrap().iter().for_each(|value| conforms(element, value, place));
    }
    let name = of.as_str().unwrap();
    let builtin = match name {
        "str" => Some(value.is_string()),
        "bool" => Some(value.is_boolean()),
        "uint32" | "uint64" => Some(value.is_u64()),
        "number" => Some(value.is_number()),
        _ => None,
    };
    if let Some(right) = builtin {
        return assert!(right, "{place}: {value} is no {name}");
    }
    if let Some(words) = definitions("enum").get(name) {
        return assert!(words["data"].as_array().unwrap().contains(value), "{place}: {value} is no {name}");
    }
    members(&definitions("struct")[name]["data"], value, place);
}

fn members(of: &Value, value: &Value, place: &str) {
    let (of, value) = (of.as_object().unwrap(), value.as_object().unwrap());
    for (name, of) in of {
        let plain = name.trim_start_matches('*');
        match value.get(plain) {
            Some(value) => conforms(of, value, &format!("{place}.{plain}")),
            None => assert!(name.starts_with('*'), "{place} lacks {name}"),
        }
    }
    for name in value.keys() {
        assert!(of.contains_key(name) || of.contains_key(&format!("*{name}")), "{place} has {name}");
    }
}

fn step_event(step: Step) -> Event {
    Event::Step { name: "a".into(), step, milliseconds: 0.5 }
}

#[test]
fn the_commands_and_their_parameters_are_the_documented_ones() {
    let documented = definitions("command");
    let mut names: Vec<_> = COMMANDS.iter().map(|command| command.name.to_owned()).collect();
    names.sort();
    assert_eq!(documented.keys().cloned().collect::<Vec<_>>(), names);
    for command in COMMANDS {
        let params: Map<String, Value> = command
            .params
            .iter()
            .map(|param| {
                (format!("{}{}", if param.optional { "*" } else { "" }, param.name), type_name(&param.kind))
            })
            .collect();
        let data = documented[command.name].get("data").cloned().unwrap_or_else(|| json!({}));
        assert_eq!(data, Value::Object(params), "{}", command.name);
    }
}

#[test]
fn what_commands_return_is_what_is_documented() {
    let (service, _events) = Fake::new();
    let caller = Caller { service: &service, progress: &|_, _| {} };
    let prepare = |name: &str| json!({"name": name});
    let calls = [
        ("query-version", json!({})),
        ("query-commands", json!({})),
        ("query-name", json!({})),
        ("query-status", json!({})),
        ("block_resize", json!({"device": "vda", "size": 1 << 30})),
        ("cont", json!({})),
        ("query-block", json!({})),
        ("query-named-block-nodes", json!({})),
        ("query-frazil", json!({})),
        ("snapshot-create", prepare("a")),
        ("snapshot-prepare", prepare("b")),
        ("query-frazil", json!({})),
        ("snapshot-release", prepare("b")),
        ("snapshot-prepare", prepare("c")),
        ("snapshot-abort", prepare("c")),
        ("query-snapshots", json!({})),
        ("query-snapshot", prepare("a")),
        ("query-snapshot", json!({"name": "a", "probe": true})),
        ("snapshot-export", json!({"name": "a", "disk": "vda", "target": "/x", "format": "raw"})),
        ("snapshot-revert", prepare("b")),
        ("snapshot-delete", json!({"name": "b", "job-id": "j", "speed": 1, "auto-dismiss": false})),
        ("block-commit", json!({"device": "vda", "top": "/images/vda.1.qcow2", "base-node": "vda.0"})),
        ("block-stream", json!({"device": "vda.1", "job-id": "up"})),
        ("job-pause", json!({"id": "j"})),
        ("job-resume", json!({"id": "j"})),
        ("block-job-set-speed", json!({"device": "j", "speed": 0})),
        ("job-cancel", json!({"id": "j"})),
        ("query-jobs", json!({})),
        ("job-dismiss", json!({"id": "j"})),
        ("quit", json!({})),
    ];
    let documented = definitions("command");
    for (name, arguments) in &calls {
        let arguments = arguments.as_object().unwrap().clone();
        let returned = run(&caller, name, arguments).unwrap();
        match documented[*name].get("returns") {
            Some(of) => conforms(of, &returned, name),
            None => assert_eq!(returned, json!({}), "{name}"),
        }
    }
    let called = |name: &String| name == NEGOTIATE || calls.iter().any(|(called, _)| called == name);
    assert!(documented.keys().all(called));
}

#[test]
fn the_events_and_their_data_are_the_documented_ones() {
    let (service, _events) = Fake::new();
    let record = service.create(CreateRequest { name: "a".into(), disks: None, freeze: None }).unwrap();
    assert_eq!(record.time, OffsetDateTime::UNIX_EPOCH);
    let name = || "a".to_owned();
    let mut events = vec![
        Event::Created { snapshot: Box::new(record) },
        Event::Sealed { name: name() },
        Event::Failed { name: name(), step: Step::Freeze, reason: "no agent".into() },
        Event::Stall { name: name(), step: Step::Drain, milliseconds: 1.0 },
        Event::ThawOwed { tries: 1, reason: "no agent".into() },
        Event::ThawConfirmed { count: 2 },
        Event::SpaceLow { path: PathBuf::from("/state"), free: 1 },
        Event::IoError {
            device: "vda".into(),
            operation: IoOperation::Write,
            action: ErrorAction::Stop,
            nospace: true,
            reason: "no storage space".into(),
        },
        Event::Expired { name: name(), disk: "vda".into(), reason: "too many".into() },
    ];
    let steps = [
        Step::Prepare,
        Step::PreSync,
        Step::Freeze,
        Step::Gate,
        Step::Drain,
        Step::Pivot,
        Step::Open,
        Step::Thaw,
        Step::Seal,
    ];
    assert_eq!(definitions("enum")["SnapshotStep"]["data"], json!(steps));
    events.extend(steps.map(step_event));
    let statuses = [
        JobStatus::Created,
        JobStatus::Running,
        JobStatus::Paused,
        JobStatus::Waiting,
        JobStatus::Pending,
        JobStatus::Aborting,
        JobStatus::Concluded,
        JobStatus::Null,
    ];
    assert_eq!(definitions("enum")["JobStatus"]["data"], json!(statuses));
    events.extend(statuses.map(|status| Event::Job { id: name(), status }));
    let mut seen = BTreeMap::from([(EXPORT_PROGRESS.to_owned(), ())]);
    let documented = definitions("event");
    for event in &events {
        // A new event must be added above: this match makes sure of it.
        match event {
            Event::Step { .. } | Event::Created { .. } | Event::Sealed { .. } | Event::Failed { .. } => {}
            Event::Stall { .. } | Event::ThawOwed { .. } | Event::ThawConfirmed { .. } => {}
            Event::SpaceLow { .. } | Event::IoError { .. } | Event::Job { .. } | Event::Expired { .. } => {}
        }
        seen.insert(event.name().to_owned(), ());
        members(&documented[event.name()]["data"], &json!(event), event.name());
    }
    assert_eq!(documented.keys().collect::<Vec<_>>(), seen.keys().collect::<Vec<_>>());
    let progress = |name: &str, data: Value| members(&documented[name]["data"], &data, name);
    let export = json!({"name": "a", "disk": "vda", "target": "/x", "format": "raw"});
    let caller = Caller { service: &service, progress: &progress };
    run(&caller, "snapshot-export", export.as_object().unwrap().clone()).unwrap();
}

#[test]
fn every_definition_and_member_has_a_comment() {
    let mut comment = String::new();
    let mut found = 0;
    for line in TEXT.lines() {
        if line == "##" && !comment.ends_with("@") {
            comment.push('@');
        } else if let Some(text) = line.strip_prefix('#') {
            comment.push_str(text);
            comment.push('\n');
        } else if line.is_empty() {
            comment.clear();
        } else if line.starts_with('{') {
            let name = line.split('\'').nth(3).unwrap();
            assert!(comment.contains(&format!("@{name}:")), "{name} has no comment");
            let kind = line.split('\'').nth(1).unwrap();
            let definition = &definitions(kind)[name];
            let names: Vec<String> = match definition.get("data") {
                Some(Value::Object(members)) => members.keys().cloned().collect(),
                Some(Value::Array(words)) => {
                    words.iter().map(|word| word.as_str().unwrap().to_owned()).collect()
                }
                _ => Vec::new(),
            };
            for member in names {
                let plain = member.trim_start_matches('*');
                assert!(comment.contains(&format!(" @{plain}:")), "{name} does not explain {plain}");
            }
            found += 1;
        }
    }
    let all: usize = ["command", "event", "struct", "enum"].map(|kind| definitions(kind).len()).iter().sum();
    assert_eq!(found, all);
}
