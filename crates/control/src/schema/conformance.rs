//! The schema against the code: it must list every command, event and member, and nothing else, and what the commands
//! return must be what it says.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::PathBuf;

use serde_json::json;
use snapshot::{
    CreateRequest, ErrorAction, Event, IoOperation, JobEnd, JobStatus, JobType, ShutdownCause,
    SnapshotRecord, Step,
};
use time::OffsetDateTime;

use super::*;
use crate::Service;
use crate::commands::{Caller, EXPORT_PROGRESS, EXPORT_READY, all, run};
use crate::testing::Fake;

/// Whether an object is what the structure of that name says.
fn conforms(name: &str, value: &Value, place: &str) {
    let checked = SCHEMA.check(name, value.as_object().unwrap());
    assert_eq!(checked.map_err(|error| error.desc), Ok(()), "{place}: {value}");
}

fn enumeration(name: &str) -> Value {
    match &SCHEMA.types[name] {
        Type::Enum(words) => json!(words),
        other => panic!("{name} is {other:?}"),
    }
}

fn end(error: Option<&str>) -> JobEnd {
    let error = error.map(str::to_owned);
    JobEnd { r#type: JobType::Backup, device: "a".into(), len: 2, offset: 1, speed: 0, error }
}

fn step_event(step: Step) -> Event {
    Event::Step { name: "a".into(), step, milliseconds: 0.5 }
}

#[test]
fn the_commands_are_the_documented_ones() {
    let mut names: Vec<_> = all().map(|(name, _)| *name).collect();
    names.sort_unstable();
    assert_eq!(SCHEMA.commands.keys().collect::<Vec<_>>(), names);
}

/// What the schema lets pass, the commands' own types take: every member and every word.
#[test]
fn what_the_check_lets_pass_the_types_take() {
    for (name, signature) in SCHEMA.commands.iter().filter(|(name, _)| *name != "qmp_capabilities") {
        for (turn, full) in (0..16).flat_map(|turn| [(turn, true), (turn, false)]) {
            let service = Fake::new();
            let caller = Caller::alone(&service);
            let arguments = sample(&signature.arguments, turn, full);
            if let Err(error) = run(&caller, name, arguments.as_object().unwrap().clone()) {
                let story = format!("{name} with {arguments}: {}", error.desc);
                assert!(
                    !error.desc.starts_with("Invalid") && !error.desc.starts_with("Parameter"),
                    "{story}"
                );
            }
        }
    }
}

/// A value of a type; of several that there are, another at each turn. Without what may be left out unless it is `full`.
fn sample(name: &str, turn: usize, full: bool) -> Value {
    let object = |members: &[&Member]| -> Value {
        let given = members.iter().filter(|member| full || !member.optional);
        given.map(|member| (member.name.clone(), sample_of(&member.of, turn, full))).collect()
    };
    match SCHEMA.types.get(name) {
        Some(Type::Enum(words)) => json!(words[turn % words.len()]),
        Some(Type::Struct { .. }) => object(&SCHEMA.members_of(name)),
        Some(Type::Union { base, tag, branches }) => {
            let mut members: Vec<_> = base.iter().collect();
            let case = object(&members)[tag].as_str().unwrap().to_owned();
            members.extend(branches.get(&case).map(|of| SCHEMA.members_of(of)).unwrap_or_default());
            object(&members)
        }
        // Their references only: a definition may hold another one, and so on.
        Some(Type::Alternate(branches)) => {
            sample(branches.iter().find(|of| *of == "str").unwrap(), turn, full)
        }
        None => match name {
            "str" => json!("/first"),
            "bool" => json!(turn.is_multiple_of(2)),
            "uint32" => json!(u32::MAX),
            "int" => json!(i64::MAX),
            _ => json!(u64::MAX),
        },
    }
}

fn sample_of(of: &TypeRef, turn: usize, full: bool) -> Value {
    match of {
        TypeRef::One(name) => sample(name, turn, full),
        TypeRef::Array(name) => json!([sample(name, turn, full)]),
    }
}

#[test]
fn every_type_that_is_named_is_defined_and_every_type_that_is_defined_is_used() {
    let shown = introspect(&SCHEMA);
    let shown: BTreeSet<_> =
        shown.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    let builtins = BTreeSet::from(["str", "bool", "int", "number", "null", "any"]);
    let defined: BTreeSet<_> = SCHEMA.types.keys().map(String::as_str).collect();
    let named =
        shown.iter().filter(|name| !name.starts_with('[')).copied().filter(|name| !builtins.contains(name));
    let known = |name: &&str| SCHEMA.commands.contains_key(*name) || SCHEMA.events.contains_key(*name);
    let types: BTreeSet<_> = named.filter(|name| !known(name)).collect();
    let bases = SCHEMA.types.values().filter_map(|of| match of {
        Type::Struct { base, .. } => base.as_deref(),
        _ => None,
    });
    assert_eq!(types.union(&bases.collect()).copied().collect::<BTreeSet<_>>(), defined);
}

/// Of disks and snapshots.
fn calls_of_snapshots() -> Vec<(&'static str, Value)> {
    let prepare = |name: &str| json!({"name": name});
    vec![
        ("query-version", json!({})),
        ("query-commands", json!({})),
        ("query-name", json!({})),
        ("query-tpm", json!({})),
        ("query-qmp-schema", json!({})),
        ("query-status", json!({})),
        ("block_resize", json!({"device": "vda", "size": 1 << 30})),
        (
            "change-backing-file",
            json!({"device": "vda", "image-node-name": "vda.1", "backing-file": "base.raw"}),
        ),
        ("stop", json!({})),
        ("query-status", json!({})),
        ("cont", json!({})),
        ("query-block", json!({})),
        ("query-named-block-nodes", json!({})),
        ("query-blockstats", json!({"query-nodes": true})),
        ("query-frazil", json!({})),
        ("snapshot-create", prepare("a")),
        ("snapshot-prepare", prepare("b")),
        ("query-frazil", json!({})),
        ("snapshot-release", prepare("b")),
        ("snapshot-prepare", prepare("c")),
        ("snapshot-abort", prepare("c")),
        ("query-snapshots", json!({})),
        ("checkpoint-create", json!({ "name": "monday" })),
        ("query-checkpoints", json!({})),
        ("checkpoint-delete", json!({ "name": "monday" })),
        ("query-changes", json!({ "disk": "vda", "from": "monday", "limit": 3 })),
        ("query-snapshot", prepare("a")),
        ("query-snapshot", json!({"name": "a", "probe": true})),
        ("snapshot-export", json!({"name": "a", "disk": "vda", "target": "/x", "format": "raw"})),
        (
            "snapshot-serve",
            json!({"name": "a", "disk": "vda", "addr": {"type": "unix", "data": {"path": "/nbd"}}, "writable": true}),
        ),
        ("snapshot-revert", prepare("b")),
        ("snapshot-delete", json!({"name": "b", "job-id": "j", "speed": 1, "auto-dismiss": false})),
        ("block-commit", json!({"device": "vda", "top": "/images/vda.1.qcow2", "base-node": "vda.0"})),
        ("block-stream", json!({"device": "vda.1", "job-id": "up"})),
    ]
}

/// Of jobs.
fn calls_of_jobs() -> Vec<(&'static str, Value)> {
    vec![
        ("job-pause", json!({"id": "j"})),
        ("job-resume", json!({"id": "j"})),
        ("block-job-set-speed", json!({"device": "j", "speed": 0})),
        ("job-cancel", json!({"id": "j"})),
        ("query-jobs", json!({})),
        ("query-block-jobs", json!({})),
        ("job-complete", json!({"id": "j"})),
        ("job-finalize", json!({"id": "j"})),
        ("block-job-pause", json!({"device": "j"})),
        ("block-job-resume", json!({"device": "j"})),
        ("block-job-complete", json!({"device": "j"})),
        ("block-job-finalize", json!({"id": "j"})),
        ("block-job-cancel", json!({"device": "j", "force": true})),
        ("block-job-dismiss", json!({"id": "up"})),
        ("job-dismiss", json!({"id": "j"})),
    ]
}

/// Of nodes, bitmaps and exports; the last one ends all.
fn calls_of_nodes() -> Vec<(&'static str, Value)> {
    vec![
        ("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "/x"})),
        ("qom-set", json!({"path": "vda", "property": "drive", "value": "f"})),
        ("blockdev-backup", json!({"device": "vda", "target": "f", "sync": "full"})),
        (
            "drive-backup",
            json!({"device": "vda", "target": "/x", "sync": "full", "mode": "existing", "format": "raw"}),
        ),
        (
            "blockdev-create",
            json!({"job-id": "c", "options": {"driver": "qcow2", "file": "f", "size": 512, "compression-type": "zstd"}}),
        ),
        ("block-dirty-bitmap-add", json!({"node": "vda", "name": "b"})),
        ("block-dirty-bitmap-clear", json!({"node": "vda", "name": "b"})),
        ("block-dirty-bitmap-enable", json!({"node": "vda", "name": "b"})),
        ("block-dirty-bitmap-disable", json!({"node": "vda", "name": "b"})),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "vda", "target": "b", "bitmaps": ["c", {"node": "x", "name": "d"}]}),
        ),
        ("block-dirty-bitmap-remove", json!({"node": "vda", "name": "b"})),
        ("transaction", json!({"actions": [{"type": "abort", "data": {}}]})),
        ("object-add", json!({"qom-type": "tls-creds-x509", "id": "t", "dir": "/pki", "endpoint": "server"})),
        ("object-del", json!({"id": "t"})),
        ("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "/s"}}, "tls-creds": "t"})),
        ("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "vda", "bitmaps": ["b"]})),
        ("nbd-server-add", json!({"device": "vda", "bitmap": "b"})),
        ("query-block-exports", json!({})),
        ("block-export-del", json!({"id": "e", "mode": "hard"})),
        ("nbd-server-remove", json!({"name": "vda"})),
        ("nbd-server-stop", json!({})),
        ("blockdev-del", json!({"node-name": "f"})),
        ("quit", json!({})),
    ]
}

/// Every command, with arguments that the fake takes.
fn calls() -> Vec<(&'static str, Value)> {
    [calls_of_snapshots(), calls_of_jobs(), calls_of_nodes()].concat()
}

#[test]
fn what_commands_return_is_what_is_documented() {
    let service = Fake::new();
    let caller = Caller::alone(&service);
    let calls = calls();
    for (name, arguments) in &calls {
        let arguments = arguments.as_object().unwrap().clone();
        let returned = run(&caller, name, arguments).unwrap();
        match &SCHEMA.commands[*name].returns {
            Some(of) => {
                let checked = SCHEMA.check_value(of, &returned, name);
                assert_eq!(checked.map_err(|error| error.desc), Ok(()), "{returned}");
            }
            None => assert_eq!(returned, json!({}), "{name}"),
        }
    }
    let called = |name: &String| name == "qmp_capabilities" || calls.iter().any(|(called, _)| called == name);
    assert!(SCHEMA.commands.keys().all(called));
}

/// One of each that are not of a step or of a state of jobs.
fn plain_events(record: SnapshotRecord) -> Vec<Event> {
    let name = || "a".to_owned();
    vec![
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
        Event::JobCompleted { end: Box::new(end(Some("no room"))), client: Some(1) },
        Event::JobCancelled { end: Box::new(end(None)), client: None },
        Event::JobReady { end: Box::new(end(None)), client: Some(1) },
        Event::JobError {
            device: name(),
            operation: IoOperation::Read,
            action: ErrorAction::Ignore,
            client: Some(1),
        },
        Event::ExportDeleted { id: name() },
        Event::JobPending { r#type: JobType::Backup, id: name(), client: None },
        Event::Stopped {},
        Event::Resumed {},
        Event::Shutdown { guest: false, reason: ShutdownCause::HostSignal },
    ]
}

#[test]
fn the_events_and_their_data_are_the_documented_ones() {
    let service = Fake::new();
    let record = service.create(CreateRequest { name: "a".into(), disks: None, freeze: None }).unwrap();
    assert_eq!(record.time, OffsetDateTime::UNIX_EPOCH);
    let name = || "a".to_owned();
    let mut events = plain_events(record);
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
    assert_eq!(enumeration("SnapshotStep"), json!(steps));
    events.extend(steps.map(step_event));
    let statuses = [
        JobStatus::Created,
        JobStatus::Running,
        JobStatus::Paused,
        JobStatus::Ready,
        JobStatus::Standby,
        JobStatus::Waiting,
        JobStatus::Pending,
        JobStatus::Aborting,
        JobStatus::Concluded,
        JobStatus::Null,
    ];
    assert_eq!(enumeration("JobStatus"), json!(statuses));
    let causes = [ShutdownCause::HostQmpQuit, ShutdownCause::HostSignal];
    assert_eq!(enumeration("ShutdownCause"), json!(causes));
    events.extend(statuses.map(|status| Event::Job { id: name(), status }));
    let mut seen = BTreeMap::from([(EXPORT_PROGRESS.to_owned(), ()), (EXPORT_READY.to_owned(), ())]);
    for event in &events {
        // A new event must be added above: this match makes sure of it.
        match event {
            Event::Step { .. } | Event::Created { .. } | Event::Sealed { .. } | Event::Failed { .. } => {}
            Event::Stall { .. } | Event::ThawOwed { .. } | Event::ThawConfirmed { .. } => {}
            Event::SpaceLow { .. } | Event::IoError { .. } | Event::Job { .. } | Event::Expired { .. } => {}
            Event::JobCompleted { .. } | Event::JobCancelled { .. } | Event::JobError { .. } => {}
            Event::JobReady { .. } | Event::JobPending { .. } | Event::ExportDeleted { .. } => {}
            Event::Stopped {} | Event::Resumed {} | Event::Shutdown { .. } => {}
        }
        seen.insert(event.name().to_owned(), ());
        conforms(&SCHEMA.events[event.name()], &json!(event), event.name());
    }
    assert_eq!(SCHEMA.events.keys().collect::<Vec<_>>(), seen.keys().collect::<Vec<_>>());
    let progress = |name: &str, data: Value| {
        conforms(&SCHEMA.events[name], &data, name);
        ControlFlow::Continue(())
    };
    let export = json!({"name": "a", "disk": "vda", "target": "/x", "format": "raw"});
    let caller = Caller { progress: &progress, ..Caller::alone(&service) };
    run(&caller, "snapshot-export", export.as_object().unwrap().clone()).unwrap();
    let serve = json!({"name": "a", "disk": "vda", "addr": {"type": "unix", "data": {"path": "/nbd"}}});
    run(&caller, "snapshot-serve", serve.as_object().unwrap().clone()).unwrap();
}

#[test]
fn every_definition_and_member_has_a_comment() {
    let (mut comment, mut found) = (String::new(), 0);
    for line in FILES.iter().flat_map(|text| text.lines()) {
        if line == "##" && !comment.ends_with('@') {
            comment.push('@');
        } else if let Some(text) = line.strip_prefix('#') {
            comment.push_str(text);
            comment.push('\n');
        } else if line.is_empty() {
            comment.clear();
        } else if line.starts_with('{') {
            let name = line.split('\'').nth(3).unwrap();
            assert!(comment.contains(&format!("@{name}:")), "{name} has no comment");
            for member in names_in(name) {
                assert!(comment.contains(&format!(" @{member}:")), "{name} does not explain {member}");
            }
            found += 1;
        }
    }
    let unnamed = |name: &&String| !name.starts_with("q_");
    let types = SCHEMA.types.keys().filter(unnamed).count();
    assert_eq!(found, types + SCHEMA.commands.len() + SCHEMA.events.len());
}

/// The members or words that the definition of that name lists itself.
fn names_in(name: &str) -> Vec<&str> {
    let of = SCHEMA.types.get(name).or_else(|| SCHEMA.types.get(&format!("q_obj_{name}-arg")));
    match of {
        Some(Type::Struct { members, .. } | Type::Union { base: members, .. }) => {
            members.iter().map(|member| member.name.as_str()).collect()
        }
        Some(Type::Enum(words)) => words.iter().map(String::as_str).collect(),
        Some(Type::Alternate(_)) | None => Vec::new(),
    }
}
