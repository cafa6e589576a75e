//! The body of the fuzz target: it takes any bytes, and panics if the server does other than a plain model of it.
//!
//! `fuzz/` hands it to libFuzzer; the test here runs it for a moment on mutated seeds, so that it stays true.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a panic is how a fuzz target speaks"
)]

use block::testing::Input;
use serde_json::{Map, Value, json};

use crate::commands::{Caller, dispatch};
use crate::message::{encode, parse_request, reply};
use crate::schema::generate::Generator;
use crate::schema::{SCHEMA, TypeRef};
use crate::stream::{Stream, StreamError};
use crate::testing::Fake;

type Item = Result<Value, StreamError>;

/// What a client says is framed as plain JSON is, however the bytes are cut; each command is answered once; arguments are
/// refused if and only if they do not conform to the schema, and what is returned conforms to it.
pub fn qmp(data: &[u8]) {
    let Some((mode, rest)) = data.split_first() else { return };
    let service = Fake::new();
    service.go_on();
    let caller = Caller::alone(&service);
    match mode % 2 {
        0 => talk(&caller, rest),
        _ => called(&caller, Input(rest)),
    }
}

fn talk(caller: &Caller<'_>, said: &[u8]) {
    let items = framed([said]);
    let cuts = said.first().map_or(1, |byte| usize::from(*byte) + 1);
    assert_eq!(framed(said.chunks(cuts)), items, "how the bytes arrive must not matter");
    let last_of_all = said.len().saturating_sub(1);
    assert_eq!(framed([&said[..last_of_all], &said[last_of_all..]]), items);
    plainly(said, &items);
    let mut negotiated = false;
    for item in items {
        let is_fatal = item.as_ref().is_err_and(StreamError::is_fatal);
        if let Ok(value) = item {
            answer(caller, &mut negotiated, value);
        }
        if is_fatal {
            return;
        }
    }
}

/// All that comes of these bytes, up to where the stream can not go on.
fn framed<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Item> {
    let (mut stream, mut items) = (Stream::default(), Vec::new());
    for mut piece in pieces {
        while let Some(item) = stream.next(&mut piece) {
            let is_fatal = item.as_ref().is_err_and(StreamError::is_fatal);
            items.push(item);
            if is_fatal {
                return items;
            }
        }
    }
    items
}

/// Where all of it is plain JSON, each value of it came, but for a number at the end that may have no end yet.
fn plainly(said: &[u8], items: &[Item]) {
    let plain: Result<Vec<Value>, _> = serde_json::Deserializer::from_slice(said).into_iter().collect();
    let is_cut = items.iter().any(|item| item.as_ref().is_err_and(StreamError::is_fatal));
    if let (Ok(mut plain), false) = (plain, is_cut) {
        let scalar = |value: &Value| value.is_number() || value.is_boolean() || value.is_null();
        if plain.len() == items.len() + 1 && plain.last().is_some_and(scalar) {
            plain.pop();
        }
        assert_eq!(items, plain.into_iter().map(Ok).collect::<Vec<_>>());
    }
}

/// What a service does that is told to panic says nothing of the server.
fn is_sound(arguments: Option<&Value>) -> bool {
    arguments.and_then(|arguments| arguments.get("name")).is_none_or(|name| name != "panic")
}

fn answer(caller: &Caller<'_>, negotiated: &mut bool, value: Value) {
    if !is_sound(value.get("arguments")) {
        return;
    }
    let (given, was_negotiated) = (value.get("id").cloned(), *negotiated);
    let name = value.get("execute").and_then(Value::as_str).map(str::to_owned);
    let (id, request) = parse_request(value);
    assert_eq!(id, given, "the id is not echoed");
    let outcome = request.and_then(|request| dispatch(caller, negotiated, request));
    if name.as_deref() != Some("qmp_capabilities") {
        assert!(was_negotiated == *negotiated && (was_negotiated || outcome.is_err()));
    }
    if let (Ok(value), Some(name)) = (&outcome, &name) {
        conforms(name, value);
    }
    let told = reply(id, outcome);
    let line = encode(&told);
    assert!(
        line.is_ascii() && line.ends_with(b"\r\n") && line.iter().filter(|byte| **byte == b'\n').count() == 1
    );
    let read: Value = serde_json::from_slice(&line).unwrap();
    let mut names: Vec<_> = read.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    let expected: &[&[&str]] = match given.is_some() {
        true => &[&["id", "return"], &["error", "id"]],
        false => &[&["return"], &["error"]],
    };
    assert!(expected.contains(&&names[..]), "{names:?}");
    if let Some(error) = read.get("error") {
        let classes = ["GenericError", "CommandNotFound", "DeviceNotFound", "DeviceNotActive"];
        assert!(classes.contains(&error["class"].as_str().unwrap()) && error["desc"].is_string());
    }
}

fn conforms(name: &str, value: &Value) {
    let checked = match &SCHEMA.commands[name].returns {
        Some(returns) => SCHEMA.check_value(returns, value, "return"),
        None => SCHEMA.check_value(&TypeRef::One(crate::schema::EMPTY.to_owned()), value, "return"),
    };
    assert_eq!(checked, Ok(()), "{name} returned {value}");
}

/// Calls of a command with arguments that are made for it.
fn called(caller: &Caller<'_>, mut input: Input<'_>) {
    answer(caller, &mut false, json!({ "execute": "qmp_capabilities" }));
    for _ in 0..4 {
        let at = usize::from(input.byte()) % SCHEMA.commands.len();
        let (name, signature) = SCHEMA.commands.iter().nth(at).unwrap();
        let mut generator = Generator::new(&SCHEMA, input);
        let arguments: Map<String, Value> = generator.object(&signature.arguments);
        input = generator.input;
        let checked = SCHEMA.check(&signature.arguments, &arguments);
        assert_eq!(checked.is_err(), generator.spoiled, "{name} with {arguments:?}: {checked:?}");
        answer(caller, &mut true, json!({ "execute": name, "arguments": arguments, "id": at }));
        if input.is_empty() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use block::testing::{drive, keep_seeds};

    use super::*;

    #[test]
    fn clients_are_answered_as_the_model_says() {
        let talk = |said: &str| [b"\0", said.as_bytes()].concat();
        let call = |name: &str, bytes: &[u8]| {
            let at = SCHEMA.commands.keys().position(|known| known == name).unwrap();
            [&[1, at as u8], bytes].concat()
        };
        let made = [
            (
                "negotiation",
                talk(
                    r#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}{"execute":"query-version","id":[1.5,"ü"]}"#,
                ),
            ),
            ("early", talk("{'execute':'query-status'} 12 null [] \"it\\'s\"\n")),
            (
                "snapshot",
                talk(
                    "{'execute':'qmp_capabilities'}{'execute':'snapshot-create','arguments':{'name':'a'}}{'execute':'query-snapshots'}",
                ),
            ),
            (
                "transaction",
                talk(
                    "{'execute':'qmp_capabilities'}{'execute':'transaction','arguments':{'actions':[{'type':'abort','data':{}}]}}",
                ),
            ),
            ("stray", talk("{\"execute\": \"x\u{1}{]\u{7f}}{'id':'\\u00fc','execute':{}}")),
            ("blockdev-add", call("blockdev-add", &[1, 0, 1, 1, 0, 1, 1, 2, 1, 1, 0, 1, 1, 1])),
            ("block-job-set-speed", call("block-job-set-speed", &[1, 1, 1, 8, 0, 0, 0, 0, 0, 1, 0, 0])),
            ("spoiled", call("snapshot-create", &[1, 2, 0xff])),
            ("next-below", call("block_resize", &[0, 0, 1, 0xfe, 0])),
            ("next-above", call("block_resize", &[0, 0, 1, 0xfe, 1])),
            ("transactions", call("transaction", &[1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5, 1, 1, 1])),
        ];
        keep_seeds("qmp", &made);
        drive("qmp", qmp, Duration::from_secs(3));
    }
}
