//! Values of a type, sound or spoiled, out of a fuzzer's bytes.

use block::testing::Input;
use serde_json::{Map, Value, json};

use super::{Member, Schema, Type, TypeRef};

/// A type may hold itself; so deep it is taken.
const DEEPEST: usize = 8;

/// Bytes that spoil what they decide about.
const SPOILS: u8 = 0xff;
const SPOILS_ELSE: u8 = 0xfe;

/// Makes one value. Whether it conforms to its type is known, for only it spoils it.
pub(crate) struct Generator<'a> {
    pub(crate) schema: &'a Schema,
    pub(crate) input: Input<'a>,
    pub(crate) spoiled: bool,
    depth: usize,
}

impl<'a> Generator<'a> {
    pub(crate) fn new(schema: &'a Schema, input: Input<'a>) -> Self {
        Self { schema, input, spoiled: false, depth: 0 }
    }

    /// An object of the structure or union of that name.
    pub(crate) fn object(&mut self, name: &str) -> Map<String, Value> {
        let mut object = Map::new();
        match self.schema.types.get(name) {
            Some(Type::Union { base, tag, branches }) => {
                self.fill(&mut object, base.iter());
                let case = object.get(tag).and_then(Value::as_str).and_then(|tag| branches.get(tag));
                let members = case.map(|of| self.schema.members_of(of)).unwrap_or_default();
                self.fill(&mut object, members.into_iter());
            }
            _ => self.fill(&mut object, self.schema.members_of(name).into_iter()),
        }
        if self.input.byte() == SPOILS {
            object.insert("x-of-nobody".to_owned(), Value::Null);
            self.spoiled = true;
        }
        object
    }

    fn fill(&mut self, object: &mut Map<String, Value>, members: impl Iterator<Item = &'a Member>) {
        for member in members {
            let how = self.input.byte();
            if member.optional && how.is_multiple_of(4) {
                continue;
            }
            if !member.optional && how == SPOILS {
                self.spoiled = true;
                continue;
            }
            let value = self.value(&member.of);
            object.insert(member.name.clone(), value);
        }
    }

    fn value(&mut self, of: &TypeRef) -> Value {
        self.depth += 1;
        let value = match of {
            TypeRef::One(name) => self.one(name),
            TypeRef::Array(name) => match self.input.byte() {
                SPOILS => self.spoil(json!({})),
                count => (0..count % 4).map(|_| self.one(name)).collect(),
            },
        };
        self.depth -= 1;
        value
    }

    fn one(&mut self, name: &str) -> Value {
        let how = self.input.byte();
        match self.schema.types.get(name) {
            None => self.builtin(name, how),
            // No type but an array's takes an array.
            Some(_) if how == SPOILS => self.spoil(json!([[]])),
            Some(Type::Enum(_)) if how == SPOILS_ELSE => self.spoil(json!("x-of-nobody")),
            Some(Type::Enum(words)) => words.get(usize::from(how) % words.len().max(1)).cloned().into(),
            Some(Type::Alternate(branches)) => {
                // A definition may hold another one, and so on.
                let plain = branches.iter().find(|branch| *branch == "str").filter(|_| self.depth > DEEPEST);
                let branch = plain.or_else(|| branches.get(usize::from(how) % branches.len().max(1)));
                branch.map(|branch| self.one(branch)).unwrap_or_default()
            }
            Some(Type::Struct { .. } | Type::Union { .. }) => {
                self.depth += 1;
                let object = self.object(name);
                self.depth -= 1;
                Value::Object(object)
            }
        }
    }

    fn builtin(&mut self, name: &str, how: u8) -> Value {
        match name {
            "any" => json!([how, null]),
            _ if how == SPOILS => self.spoil(json!([[]])),
            "str" => match how {
                0..=0x3f => json!(["", "vda", "first", "/first", "target", "b", "x"][usize::from(how % 7)]),
                _ => Value::String(String::from_utf8_lossy(self.input.bytes(usize::from(how & 31))).into()),
            },
            "bool" => json!(how.is_multiple_of(2)),
            "null" => Value::Null,
            "number" => json!(self.input.number(8)),
            _ if how == SPOILS_ELSE => self.next_to(name),
            "int" | "int64" => json!(self.input.number(8).cast_signed() >> (how % 64)),
            "uint8" => json!(self.input.byte()),
            "uint32" => json!(self.input.number(4)),
            _ => json!(self.input.number(8) >> (how % 64)),
        }
    }

    /// The whole number next to those that the type holds, below or above. JSON has floats for what 64 bits do not hold.
    fn next_to(&mut self, name: &str) -> Value {
        let held = match name {
            "int" | "int64" => i128::from(i64::MIN)..=i128::from(i64::MAX),
            "uint8" => 0..=i128::from(u8::MAX),
            "uint32" => 0..=i128::from(u32::MAX),
            _ => 0..=i128::from(u64::MAX),
        };
        let number = if self.input.byte().is_multiple_of(2) { held.start() - 1 } else { held.end() + 1 };
        let value = serde_json::Number::from_i128(number).map_or_else(|| json!(number as f64), Value::Number);
        self.spoil(value)
    }

    fn spoil(&mut self, value: Value) -> Value {
        self.spoiled = true;
        value
    }
}
