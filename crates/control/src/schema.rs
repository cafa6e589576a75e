//! The schema: what commands take and return and what events carry, read from `docs/qapi`.
//!
//! The files are the documentation and the program at once, as QEMU's are: arguments are checked against them before a command
//! sees them, and `query-qmp-schema` shows them. So there is nothing that could be documented in another way than it works.
//!
//! The language is QEMU's (`docs/devel/qapi-code-gen.rst`) as far as it is used: enumerations, structures with a base, flat
//! unions, alternates, commands and events.

mod check;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod generate;
mod introspect;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde_json::Value;

use crate::stream::Stream;

pub(crate) use introspect::introspect;

/// The files, in the order of the documentation.
pub(crate) const FILES: &[&str] = &[
    include_str!("../../../docs/qapi/protocol.json"),
    include_str!("../../../docs/qapi/disks.json"),
    include_str!("../../../docs/qapi/stats.json"),
    include_str!("../../../docs/qapi/snapshots.json"),
    include_str!("../../../docs/qapi/marks.json"),
    include_str!("../../../docs/qapi/jobs.json"),
    include_str!("../../../docs/qapi/blockdev.json"),
    include_str!("../../../docs/qapi/exports.json"),
];

/// The schema of this program.
pub(crate) static SCHEMA: LazyLock<Schema> =
    LazyLock::new(|| Schema::parse(FILES).expect("the schema is part of the program, and a test reads it"));

/// The structure without members: the arguments of a command that takes none.
pub(crate) const EMPTY: &str = "q_empty";

/// What is defined, by name.
#[derive(Debug)]
pub(crate) struct Schema {
    types: BTreeMap<String, Type>,
    pub(crate) commands: BTreeMap<String, Signature>,
    /// With the type of their data.
    pub(crate) events: BTreeMap<String, String>,
}

/// What a command takes and returns.
#[derive(Debug)]
pub(crate) struct Signature {
    /// A structure or union.
    pub(crate) arguments: String,
    /// `None`: an empty object.
    pub(crate) returns: Option<TypeRef>,
}

/// A type of its own.
#[derive(Debug)]
pub(crate) enum Type {
    Enum(Vec<String>),
    Struct {
        base: Option<String>,
        members: Vec<Member>,
    },
    Union {
        base: Vec<Member>,
        tag: String,
        branches: BTreeMap<String, String>,
    },
    /// One of several types that JSON tells apart.
    Alternate(Vec<String>),
}

/// A type where it is used.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum TypeRef {
    One(String),
    Array(String),
}

/// A member of an object.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) optional: bool,
    pub(crate) of: TypeRef,
}

impl Schema {
    /// Reads the files. An error tells which definition is not in the language.
    fn parse(files: &[&str]) -> Result<Self, String> {
        let types = BTreeMap::from([(EMPTY.to_owned(), Type::Struct { base: None, members: Vec::new() })]);
        let mut schema = Self { types, commands: BTreeMap::new(), events: BTreeMap::new() };
        for definition in files.iter().flat_map(|text| definitions(text)) {
            let definition = definition?;
            schema.define(&definition).ok_or_else(|| format!("not a definition: {definition}"))?;
        }
        Ok(schema)
    }

    fn define(&mut self, definition: &Value) -> Option<()> {
        let word = |name: &str| definition.get(name).and_then(Value::as_str).map(str::to_owned);
        let data = definition.get("data");
        if let Some(name) = word("command") {
            let arguments = self.arguments(&name, data)?;
            let returns =
                definition.get("returns").map(|returns| type_ref(returns).ok_or(())).transpose().ok()?;
            self.commands.insert(name, Signature { arguments, returns });
            return Some(());
        }
        if let Some(name) = word("event") {
            let data = self.arguments(&name, data)?;
            self.events.insert(name, data);
            return Some(());
        }
        let (name, of) = if let Some(name) = word("enum") {
            (name, Type::Enum(words(data?.as_array()?.iter())?))
        } else if let Some(name) = word("struct") {
            (name, Type::Struct { base: word("base"), members: members(data?)? })
        } else if let Some(name) = word("union") {
            let branch = |(tag, of): (&String, &Value)| Some((tag.clone(), of.as_str()?.to_owned()));
            let branches = data?.as_object()?.iter().map(branch).collect::<Option<_>>()?;
            (
                name,
                Type::Union {
                    base: members(definition.get("base")?)?,
                    tag: word("discriminator")?,
                    branches,
                },
            )
        } else {
            (word("alternate")?, Type::Alternate(words(data?.as_object()?.values())?))
        };
        self.types.insert(name, of);
        Some(())
    }

    /// The type of the arguments of a command or the data of an event; one that has no name gets QEMU's for such.
    fn arguments(&mut self, name: &str, data: Option<&Value>) -> Option<String> {
        match data {
            None => Some(EMPTY.to_owned()),
            Some(Value::String(name)) => Some(name.clone()),
            Some(data) => {
                let arguments = format!("q_obj_{name}-arg");
                self.types.insert(arguments.clone(), Type::Struct { base: None, members: members(data)? });
                Some(arguments)
            }
        }
    }

    /// The members of a structure, those of its base first.
    fn members_of(&self, name: &str) -> Vec<&Member> {
        match self.types.get(name) {
            Some(Type::Struct { base, members }) => {
                let inherited = base.as_deref().map(|base| self.members_of(base)).unwrap_or_default();
                inherited.into_iter().chain(members).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// The definitions in a file, comments left out. Strings are in single quotes, which QMP's parser reads too.
fn definitions(text: &str) -> Vec<Result<Value, String>> {
    let mut stream = Stream::default();
    let mut found = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        for mut input in [line.as_bytes(), b"\n"] {
            while let Some(value) = stream.next(&mut input) {
                found.push(value.map_err(|error| error.to_string()));
            }
        }
    }
    found
}

fn words<'a>(values: impl Iterator<Item = &'a Value>) -> Option<Vec<String>> {
    values.map(|value| value.as_str().map(str::to_owned)).collect()
}

fn members(data: &Value) -> Option<Vec<Member>> {
    let member = |(name, of): (&String, &Value)| {
        let plain = name.strip_prefix('*');
        let (name, optional) = (plain.unwrap_or(name).to_owned(), plain.is_some());
        Some(Member { name, optional, of: type_ref(of)? })
    };
    data.as_object()?.iter().map(member).collect()
}

fn type_ref(of: &Value) -> Option<TypeRef> {
    match of {
        Value::String(name) => Some(TypeRef::One(name.clone())),
        Value::Array(of) => match of.as_slice() {
            [Value::String(name)] => Some(TypeRef::Array(name.clone())),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod conformance;
