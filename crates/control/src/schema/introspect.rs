//! The schema in the words of `query-qmp-schema` (QEMU's `qapi/introspect.json`).
//!
//! QEMU hides the names of types behind numbers, so that nobody relies on them. They are shown here; a client that goes by
//! the references alone does not see a difference.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Member, Schema, Type, TypeRef};

/// All commands and events, and every type that can be reached from them.
pub(crate) fn introspect(schema: &Schema) -> Value {
    let mut found = Found { schema, entries: Vec::new(), shown: BTreeSet::new() };
    for (name, signature) in &schema.commands {
        let returns = signature.returns.clone().unwrap_or(TypeRef::One(super::EMPTY.to_owned()));
        let (arguments, returns) = (found.object(&signature.arguments), found.reference(&returns));
        found
            .entries
            .push(json!({"name": name, "meta-type": "command", "arg-type": arguments, "ret-type": returns}));
    }
    for (name, data) in &schema.events {
        let data = found.object(data);
        found.entries.push(json!({"name": name, "meta-type": "event", "arg-type": data}));
    }
    Value::Array(found.entries)
}

struct Found<'a> {
    schema: &'a Schema,
    entries: Vec<Value>,
    /// Names of types that have an entry, or are about to get one.
    shown: BTreeSet<String>,
}

impl Found<'_> {
    /// The name by which a type is referred to; it gets an entry of its own.
    fn reference(&mut self, of: &TypeRef) -> String {
        match of {
            TypeRef::One(name) => self.object(name),
            TypeRef::Array(name) => {
                let element = self.object(name);
                let array = format!("[{element}]");
                if self.shown.insert(array.clone()) {
                    let entry = json!({"name": array, "meta-type": "array", "element-type": element});
                    self.entries.push(entry);
                }
                array
            }
        }
    }

    fn object(&mut self, name: &str) -> String {
        let schema = self.schema;
        let name = if schema.types.contains_key(name) { name } else { builtin(name).0 };
        if !self.shown.insert(name.to_owned()) {
            return name.to_owned();
        }
        let mut entry = match schema.types.get(name) {
            None => json!({"meta-type": "builtin", "json-type": builtin(name).1}),
            Some(Type::Enum(words)) => {
                let members: Vec<_> = words.iter().map(|word| json!({"name": word})).collect();
                json!({"meta-type": "enum", "members": members, "values": words})
            }
            Some(Type::Struct { .. }) => {
                json!({"meta-type": "object", "members": self.members(schema.members_of(name))})
            }
            Some(Type::Union { base, tag, branches }) => {
                let variant = |(case, of): (&String, &String)| json!({"case": case, "type": self.object(of)});
                let variants: Vec<_> = branches.iter().map(variant).collect();
                let members = self.members(base.iter().collect());
                json!({"meta-type": "object", "members": members, "tag": tag, "variants": variants})
            }
            Some(Type::Alternate(branches)) => {
                let members: Vec<_> = branches.iter().map(|of| json!({"type": self.object(of)})).collect();
                json!({"meta-type": "alternate", "members": members})
            }
        };
        entry["name"] = json!(name);
        self.entries.push(entry);
        name.to_owned()
    }

    fn members(&mut self, members: Vec<&Member>) -> Vec<Value> {
        let member = |member: &Member| {
            let mut entry = json!({"name": member.name, "type": self.reference(&member.of)});
            if member.optional {
                // What is taken if it is left out depends on the command: QEMU's null says so.
                entry["default"] = Value::Null;
            }
            entry
        };
        members.into_iter().map(member).collect()
    }
}

/// A builtin type's name and JSON type. All whole numbers are one, as in QEMU.
fn builtin(name: &str) -> (&str, &str) {
    match name {
        "str" => ("str", "string"),
        "bool" => ("bool", "boolean"),
        "null" => ("null", "null"),
        "number" => ("number", "number"),
        "any" => ("any", "value"),
        _ => ("int", "int"),
    }
}
