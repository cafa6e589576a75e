//! Messages: what a request must look like, and how replies and events are written (`docs/interop/qmp-spec.rst`).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::error::CommandError;

/// A well-formed request: some command, with whatever arguments.
#[derive(Debug, PartialEq)]
pub(crate) struct Request {
    pub(crate) execute: String,
    pub(crate) arguments: Map<String, Value>,
}

/// Takes a request apart, as `qmp_dispatch_check_obj` in QEMU's `qapi/qmp-dispatch.c`. Its `id` comes out in any case.
pub(crate) fn parse_request(value: Value) -> (Option<Value>, Result<Request, CommandError>) {
    let Value::Object(mut members) = value else {
        return (None, Err(CommandError::generic("QMP input must be a JSON object")));
    };
    (members.remove("id"), parse_members(members))
}

fn parse_members(members: Map<String, Value>) -> Result<Request, CommandError> {
    let mut execute = None;
    let mut arguments = Map::new();
    for (name, value) in members {
        match (name.as_str(), value) {
            ("execute", Value::String(command)) => execute = Some(command),
            ("execute", _) => {
                return Err(CommandError::generic("QMP input member 'execute' must be a string"));
            }
            ("arguments", Value::Object(given)) => arguments = given,
            ("arguments", _) => {
                return Err(CommandError::generic("QMP input member 'arguments' must be an object"));
            }
            _ => return Err(CommandError::generic(format!("QMP input member '{name}' is unexpected"))),
        }
    }
    match execute {
        Some(execute) => Ok(Request { execute, arguments }),
        None => Err(CommandError::generic("QMP input lacks member 'execute'")),
    }
}

/// The reply to a command, with the `id` of its request if that had one.
pub(crate) fn reply(id: Option<Value>, outcome: Result<Value, CommandError>) -> Value {
    let mut reply = match outcome {
        Ok(value) => json!({ "return": value }),
        Err(error) => json!({ "error": { "class": error.class.name(), "desc": error.desc } }),
    };
    if let (Some(id), Some(members)) = (id, reply.as_object_mut()) {
        members.insert("id".to_owned(), id);
    }
    reply
}

/// The first message of a connection. No capability is offered: there is no out-of-band execution.
pub(crate) fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": [] } })
}

/// QEMU's `VersionInfo`. Under `qemu` is the version whose block commands are followed, for clients decide by it which they
/// use; `package` says who it is.
pub(crate) fn version() -> Value {
    json!({
        "qemu": { "major": 10, "minor": 0, "micro": 0 },
        "package": concat!("frazil ", env!("CARGO_PKG_VERSION")),
    })
}

/// An event that happened at `time`. A clock before 1970 gives -1, as in QEMU.
pub(crate) fn event(name: &str, data: Value, time: SystemTime) -> Value {
    let timestamp = match time.duration_since(UNIX_EPOCH) {
        Ok(since) => json!({ "seconds": since.as_secs(), "microseconds": Duration::subsec_micros(&since) }),
        Err(_) => json!({ "seconds": -1, "microseconds": -1 }),
    };
    let mut message = json!({ "event": name, "timestamp": timestamp });
    // As in QEMU, an event that has nothing to say has no data.
    if data.as_object().is_none_or(|data| !data.is_empty()) {
        message["data"] = data;
    }
    message
}

/// One line, in ASCII and ended by CRLF, as the specification has it.
pub(crate) fn encode(message: &Value) -> Vec<u8> {
    let text = message.to_string();
    let mut line = Vec::with_capacity(text.len() + 2);
    let mut units = [0; 2];
    for char in text.chars() {
        match u8::try_from(char) {
            Ok(byte) if byte.is_ascii() => line.push(byte),
            // Only strings hold such characters, so the escape is always understood.
            _ => char
                .encode_utf16(&mut units)
                .iter()
                .for_each(|unit| line.extend(format!("\\u{unit:04x}").bytes())),
        }
    }
    line.extend(b"\r\n");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_refused_in_the_words_of_qemu() {
        for (request, expected) in [
            (json!(null), "QMP input must be a JSON object"),
            (json!([]), "QMP input must be a JSON object"),
            (json!({}), "QMP input lacks member 'execute'"),
            (json!({"execute": true}), "QMP input member 'execute' must be a string"),
            (json!({"execute": "a", "arguments": []}), "QMP input member 'arguments' must be an object"),
            (json!({"execute": "a", "extra": true}), "QMP input member 'extra' is unexpected"),
            (json!({"exec-oob": "a"}), "QMP input member 'exec-oob' is unexpected"),
        ] {
            assert_eq!(parse_request(request).1, Err(CommandError::generic(expected)));
        }
    }

    #[test]
    fn an_id_of_any_type_is_echoed_on_success_and_on_failure() {
        for id in
            [json!(null), json!(true), json!(-7), json!(1.5), json!("ü"), json!([1, [2]]), json!({"a": {}})]
        {
            let (found, request) = parse_request(json!({"execute": "a", "id": id}));
            assert!(request.is_ok());
            assert_eq!(reply(found, Ok(json!({}))), json!({"return": {}, "id": id}));
            let (found, request) = parse_request(json!({"execute": 1, "id": id}));
            assert_eq!(reply(found, request.map(|_| json!({})))["id"], id);
        }
        assert_eq!(reply(None, Ok(json!([]))), json!({"return": []}));
    }

    #[test]
    fn lines_are_ascii() {
        let message = json!({"a\u{e9}": "\u{1F9CA}\u{7f}\n\""});
        let line = encode(&message);
        assert_eq!(line, b"{\"a\\u00e9\":\"\\ud83e\\uddca\x7f\\n\\\"\"}\r\n");
        assert_eq!(serde_json::from_slice::<Value>(&line).unwrap(), message);
    }

    #[test]
    fn events_carry_the_time() {
        let time = UNIX_EPOCH + Duration::new(1_258_551_470, 802_384_999);
        let expected = json!({"seconds": 1_258_551_470, "microseconds": 802_384});
        assert_eq!(event("X", json!({}), time)["timestamp"], expected);
        assert_eq!(event("X", json!({"a": 1}), time)["data"], json!({"a": 1}));
        assert!(event("X", json!({}), time).get("data").is_none());
        let before = UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(event("X", json!({}), before)["timestamp"], json!({"seconds": -1, "microseconds": -1}));
    }
}
