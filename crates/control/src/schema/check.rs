//! Values against types, refused in the words of QEMU's input visitor (`qapi/qobject-input-visitor.c`,
//! `qapi/qapi-visit-core.c`).

use serde_json::{Map, Value};

use super::{Member, Schema, Type, TypeRef};
use crate::error::CommandError;

type Checked = Result<(), CommandError>;

/// The builtin types that are whole numbers, with what they hold.
const INTEGERS: &[(&str, i128, i128)] = &[
    ("int", i64::MIN as i128, i64::MAX as i128),
    ("int64", i64::MIN as i128, i64::MAX as i128),
    ("uint8", 0, u8::MAX as i128),
    ("uint32", 0, u32::MAX as i128),
    ("uint64", 0, u64::MAX as i128),
    ("size", 0, u64::MAX as i128),
];

impl Schema {
    /// Checks arguments, or the data of an event, against the structure or union of that name: nothing missing, nothing
    /// unknown, every type right, at any depth.
    pub(crate) fn check(&self, name: &str, members: &Map<String, Value>) -> Checked {
        self.check_object(name, members, "")
    }

    /// Checks a value that stands at `place`.
    pub(crate) fn check_value(&self, of: &TypeRef, value: &Value, place: &str) -> Checked {
        match (of, value) {
            (TypeRef::One(name), value) => self.check_one(name, value, place),
            (TypeRef::Array(name), Value::Array(values)) => {
                let one = |(i, value)| self.check_one(name, value, &format!("{place}[{i}]"));
                values.iter().enumerate().try_for_each(one)
            }
            (TypeRef::Array(_), _) => wrong_type(place, "array"),
        }
    }

    fn check_one(&self, name: &str, value: &Value, place: &str) -> Checked {
        match (self.types.get(name), value) {
            (None, value) => check_builtin(name, value, place),
            (Some(Type::Enum(words)), Value::String(word)) => match words.contains(word) {
                true => Ok(()),
                false => refuse(format!("Parameter '{place}' does not accept value '{word}'")),
            },
            (Some(Type::Enum(_)), _) => wrong_type(place, "string"),
            (Some(Type::Alternate(branches)), value) => {
                match branches.iter().find(|branch| self.begins(branch, value)) {
                    Some(branch) => self.check_one(branch, value, place),
                    None => wrong_type(place, name),
                }
            }
            (Some(Type::Struct { .. } | Type::Union { .. }), Value::Object(members)) => {
                self.check_object(name, members, place)
            }
            (Some(Type::Struct { .. } | Type::Union { .. }), _) => wrong_type(place, "object"),
        }
    }

    /// Whether a value has the JSON type of the branch of an alternate.
    fn begins(&self, branch: &str, value: &Value) -> bool {
        match self.types.get(branch) {
            Some(Type::Struct { .. } | Type::Union { .. }) => value.is_object(),
            Some(Type::Enum(_)) => value.is_string(),
            Some(Type::Alternate(_)) => false,
            None => match branch {
                "str" => value.is_string(),
                "bool" => value.is_boolean(),
                "null" => value.is_null(),
                _ => value.is_number(),
            },
        }
    }

    fn check_object(&self, name: &str, object: &Map<String, Value>, place: &str) -> Checked {
        let allowed: Vec<&Member> = match self.types.get(name) {
            Some(Type::Union { base, tag, branches }) => {
                check_members(self, base.iter(), object, place)?;
                let branch = object.get(tag).and_then(Value::as_str).and_then(|tag| branches.get(tag));
                base.iter().chain(branch.map(|of| self.members_of(of)).unwrap_or_default()).collect()
            }
            _ => self.members_of(name),
        };
        check_members(self, allowed.iter().copied(), object, place)?;
        match object.keys().find(|name| allowed.iter().all(|member| member.name != **name)) {
            Some(name) => refuse(format!("Parameter '{}' is unexpected", within(place, name))),
            None => Ok(()),
        }
    }
}

fn check_members<'a>(
    schema: &Schema,
    mut members: impl Iterator<Item = &'a Member>,
    object: &Map<String, Value>,
    place: &str,
) -> Checked {
    members.try_for_each(|member| {
        let place = within(place, &member.name);
        match object.get(&member.name) {
            Some(value) => schema.check_value(&member.of, value, &place),
            None if member.optional => Ok(()),
            None => refuse(format!("Parameter '{place}' is missing")),
        }
    })
}

fn check_builtin(name: &str, value: &Value, place: &str) -> Checked {
    let (right, called) = match name {
        "str" => (value.is_string(), "string"),
        "bool" => (value.is_boolean(), "boolean"),
        "null" => (value.is_null(), "null"),
        "any" => (true, "value"),
        "number" => (value.is_number(), "number"),
        _ => return check_integer(name, value, place),
    };
    if right { Ok(()) } else { wrong_type(place, called) }
}

fn check_integer(name: &str, value: &Value, place: &str) -> Checked {
    let whole = value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from));
    match (whole, INTEGERS.iter().find(|(integer, ..)| *integer == name)) {
        (Some(whole), Some((_, least, most))) if (*least..=*most).contains(&whole) => Ok(()),
        (Some(_), _) => refuse(format!("Parameter '{place}' expects {name}")),
        (None, _) => wrong_type(place, "integer"),
    }
}

/// The name of a member as QEMU writes it: from the outermost argument on.
fn within(place: &str, name: &str) -> String {
    if place.is_empty() { name.to_owned() } else { format!("{place}.{name}") }
}

fn wrong_type(place: &str, expected: &str) -> Checked {
    refuse(format!("Invalid parameter type for '{place}', expected: {expected}"))
}

fn refuse(story: String) -> Checked {
    Err(CommandError::generic(story))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TEXT: &str = "
        { 'enum': 'Freeze', 'data': [ 'require', 'never' ] }
        { 'struct': 'Named', 'data': { 'name': 'str' } }
        { 'struct': 'File', 'base': 'Named', 'data': { 'path': 'Ref' } }
        { 'struct': 'Null', 'data': { '*size': 'size' } }
        { 'union': 'Node', 'base': { 'driver': 'Driver', '*node': 'str' }, 'discriminator': 'driver',
          'data': { 'file': 'File', 'null': 'Null' } }
        { 'enum': 'Driver', 'data': [ 'file', 'null', 'bare' ] }
        { 'alternate': 'Ref', 'data': { 'definition': 'Node', 'reference': 'str' } }
        { 'command': 'test', 'data': { 'name': 'str', '*disks': [ 'str' ], '*freeze': 'Freeze', '*lease': 'uint32',
          '*force': 'bool', '*nodes': [ 'Node' ] } }
    ";

    fn check(arguments: &Value) -> Checked {
        let schema = Schema::parse(&[TEXT]).unwrap();
        schema.check(&schema.commands["test"].arguments, arguments.as_object().unwrap())
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
                json!({"name": "a", "disks": ["a", 1]}),
                "Invalid parameter type for 'disks[1]', expected: string",
            ),
            (json!({"name": "a", "freeze": "maybe"}), "Parameter 'freeze' does not accept value 'maybe'"),
            (json!({"name": "a", "freeze": true}), "Invalid parameter type for 'freeze', expected: string"),
            (json!({"name": "a", "force": "on"}), "Invalid parameter type for 'force', expected: boolean"),
            (json!({"name": "a", "lease": "5"}), "Invalid parameter type for 'lease', expected: integer"),
            (json!({"name": "a", "lease": 1.5}), "Invalid parameter type for 'lease', expected: integer"),
            (json!({"name": "a", "lease": 1_u64 << 32}), "Parameter 'lease' expects uint32"),
            (json!({"name": "a", "lease": -1}), "Parameter 'lease' expects uint32"),
            (json!({"name": "a", "nodes": [1]}), "Invalid parameter type for 'nodes[0]', expected: object"),
            (json!({"name": "a", "nodes": [{}]}), "Parameter 'nodes[0].driver' is missing"),
            (
                json!({"name": "a", "nodes": [{"driver": "disk"}]}),
                "Parameter 'nodes[0].driver' does not accept value 'disk'",
            ),
            (
                json!({"name": "a", "nodes": [{"driver": "null", "path": "x"}]}),
                "Parameter 'nodes[0].path' is unexpected",
            ),
            (
                json!({"name": "a", "nodes": [{"driver": "file", "path": "x"}]}),
                "Parameter 'nodes[0].name' is missing",
            ),
            (
                json!({"name": "a", "nodes": [{"driver": "file", "name": "n", "path": 3}]}),
                "Invalid parameter type for 'nodes[0].path', expected: Ref",
            ),
            (
                json!({"name": "a", "nodes": [{"driver": "file", "name": "n", "path": {"driver": "null", "size": "1"}}]}),
                "Invalid parameter type for 'nodes[0].path.size', expected: integer",
            ),
        ] {
            assert_eq!(check(&arguments).unwrap_err().desc, expected);
        }
    }

    #[test]
    fn right_arguments_pass() {
        check(&json!({"name": "a"})).unwrap();
        let nodes = json!([
            {"driver": "bare", "node": "n"},
            {"driver": "file", "name": "n", "path": {"driver": "null", "size": u64::MAX}},
            {"driver": "file", "name": "n", "path": "other"},
        ]);
        let all =
            json!({"name": "", "disks": [], "freeze": "never", "lease": 10, "force": false, "nodes": nodes});
        check(&all).unwrap();
    }

    #[test]
    fn what_is_not_in_the_language_is_refused() {
        for text in
            ["{ 'structure': 'A' }", "{ 'struct': 'A' }", "{ 'command': 'a', 'returns': 5 }", "{ 'enum' }"]
        {
            assert!(Schema::parse(&[text]).is_err(), "{text}");
        }
    }
}
