//! Parameters: what arguments a command takes, checked and refused in the words of QEMU's input visitor
//! (`qapi/qobject-input-visitor.c`, `qapi/qapi-visit-core.c`).

use serde_json::{Map, Value};

use crate::error::CommandError;

/// One parameter of a command. The schema in `docs/qapi/frazil.json` says the same; a test compares the two.
#[derive(Debug)]
pub(crate) struct Param {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) optional: bool,
}

/// The type of an argument.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A string.
    Str,
    /// A boolean.
    Bool,
    /// A whole number from `min` to `max`, both allowed.
    Int { min: u64, max: u64 },
    /// One of some words.
    Enum(&'static [&'static str]),
    /// An array of such.
    List(&'static Kind),
}

/// One that must be given.
pub(crate) const fn required(name: &'static str, kind: Kind) -> Param {
    Param { name, kind, optional: false }
}

/// One that may be left out.
pub(crate) const fn optional(name: &'static str, kind: Kind) -> Param {
    Param { name, kind, optional: true }
}

/// Checks `arguments` against `params`: nothing missing, nothing unknown, every type right.
pub(crate) fn check(params: &[Param], arguments: &Map<String, Value>) -> Result<(), CommandError> {
    for param in params {
        match arguments.get(param.name) {
            Some(value) => check_value(param.name, &param.kind, value)?,
            None if param.optional => {}
            None => return Err(CommandError::generic(format!("Parameter '{}' is missing", param.name))),
        }
    }
    match arguments.keys().find(|name| params.iter().all(|param| param.name != *name)) {
        Some(name) => Err(CommandError::generic(format!("Parameter '{name}' is unexpected"))),
        None => Ok(()),
    }
}

fn check_value(name: &str, kind: &Kind, value: &Value) -> Result<(), CommandError> {
    let wrong_type = |expected| {
        Err(CommandError::generic(format!("Invalid parameter type for '{name}', expected: {expected}")))
    };
    match (kind, value) {
        (Kind::Str, Value::String(_)) | (Kind::Bool, Value::Bool(_)) => Ok(()),
        (Kind::Str, _) => wrong_type("string"),
        (Kind::Bool, _) => wrong_type("boolean"),
        (Kind::Int { min, max }, Value::Number(number)) => match number.as_u64() {
            Some(number) if (*min..=*max).contains(&number) => Ok(()),
            _ if number.is_f64() => wrong_type("integer"),
            _ => Err(CommandError::generic(format!(
                "Parameter '{name}' expects a value between {min} and {max}"
            ))),
        },
        (Kind::Int { .. }, _) => wrong_type("integer"),
        (Kind::Enum(words), Value::String(word)) if words.contains(&word.as_str()) => Ok(()),
        (Kind::Enum(_), Value::String(word)) => {
            Err(CommandError::generic(format!("Parameter '{name}' does not accept value '{word}'")))
        }
        (Kind::Enum(_), _) => wrong_type("string"),
        (Kind::List(kind), Value::Array(values)) => values
            .iter()
            .enumerate()
            .try_for_each(|(i, value)| check_value(&format!("{name}[{i}]"), kind, value)),
        (Kind::List(_), _) => wrong_type("array"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const PARAMS: &[Param] = &[
        required("name", Kind::Str),
        optional("disks", Kind::List(&Kind::Str)),
        optional("freeze", Kind::Enum(&["require", "never"])),
        optional("lease", Kind::Int { min: 1, max: 10 }),
        optional("force", Kind::Bool),
    ];

    fn refusal(arguments: Value) -> String {
        check(PARAMS, arguments.as_object().unwrap()).unwrap_err().desc
    }

    #[test]
    fn arguments_are_refused_in_the_words_of_qemu() {
        for (arguments, expected) in [
            (json!({}), "Parameter 'name' is missing"),
            (json!({"name": 5}), "Invalid parameter type for 'name', expected: string"),
            (json!({"name": null}), "Invalid parameter type for 'name', expected: string"),
            (json!({"name": "a", "foo": 1}), "Parameter 'foo' is unexpected"),
            (json!({"name": "a", "disks": "vda"}), "Invalid parameter type for 'disks', expected: array"),
            (
                json!({"name": "a", "disks": ["vda", 1]}),
                "Invalid parameter type for 'disks[1]', expected: string",
            ),
            (json!({"name": "a", "freeze": "maybe"}), "Parameter 'freeze' does not accept value 'maybe'"),
            (json!({"name": "a", "freeze": true}), "Invalid parameter type for 'freeze', expected: string"),
            (json!({"name": "a", "force": "on"}), "Invalid parameter type for 'force', expected: boolean"),
            (json!({"name": "a", "lease": "5"}), "Invalid parameter type for 'lease', expected: integer"),
            (json!({"name": "a", "lease": 1.5}), "Invalid parameter type for 'lease', expected: integer"),
            (json!({"name": "a", "lease": 11}), "Parameter 'lease' expects a value between 1 and 10"),
            (json!({"name": "a", "lease": -1}), "Parameter 'lease' expects a value between 1 and 10"),
        ] {
            assert_eq!(refusal(arguments), expected);
        }
    }

    #[test]
    fn right_arguments_pass() {
        let all = json!({"name": "", "disks": [], "freeze": "never", "lease": 10, "force": false});
        check(PARAMS, all.as_object().unwrap()).unwrap();
        check(PARAMS, json!({"name": "a"}).as_object().unwrap()).unwrap();
    }
}
