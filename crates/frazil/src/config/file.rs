//! The configuration as a TOML file: the flags' words as keys, and a `[[disk]]` table for each `--disk`.

use std::path::PathBuf;

use snapshot::{FreezeOwner, FreezePolicy};
use toml::{Table, Value};

use super::{Config, Mistake, SandboxMode, Word, disk, parse_metrics};

const KEYS: &[&str] = &[
    "state",
    "control",
    "agent",
    "freeze-owner",
    "freeze",
    "pre-sync",
    "allow-folders",
    "target-folders",
    "tls-folders",
    "sandbox",
    "metrics",
    "users",
    "disk",
];

/// Reads the text of a configuration file. Its paths are still as written.
pub(crate) fn read(text: &str) -> Result<Config, Mistake> {
    let mut table: Table = text
        .parse()
        .map_err(|error: toml::de::Error| Mistake::Toml(error.to_string().trim_end().to_owned()))?;
    if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(Mistake::UnknownKey { key: key.clone(), valid: KEYS });
    }
    let disks = disks(table.remove("disk"))?;
    let allow_folders = folders("allow-folders", table.remove("allow-folders"))?;
    let target_folders = folders("target-folders", table.remove("target-folders"))?;
    let tls_folders = folders("tls-folders", table.remove("tls-folders"))?;
    let users = users(table.remove("users"))?;
    let mut words = |key: &str| table.remove(key).map(|value| word(key, value)).transpose();
    let missing = |key, example| Mistake::Missing { key, example };
    Ok(Config {
        state: words("state")?.ok_or(missing("state", "\"DIRECTORY\""))?.into(),
        control: words("control")?.ok_or(missing("control", "\"SOCKET\""))?.into(),
        agent: words("agent")?.map(PathBuf::from),
        freeze_owner: meant("freeze-owner", words("freeze-owner")?, FreezeOwner::default())?,
        freeze: meant("freeze", words("freeze")?, FreezePolicy::default())?,
        pre_sync: meant("pre-sync", words("pre-sync")?, true)?,
        allow_folders,
        target_folders,
        tls_folders,
        sandbox: meant("sandbox", words("sandbox")?, SandboxMode::default())?,
        users,
        metrics: words("metrics")?.map(|text| parse_metrics(&text)).transpose()?,
        disks,
    })
}

fn meant<T: Word>(key: &str, given: Option<String>, default: T) -> Result<T, Mistake> {
    given.map_or(Ok(default), |value| T::from_word(key, &value))
}

fn folders(key: &str, value: Option<Value>) -> Result<Vec<PathBuf>, Mistake> {
    const EXPECTED: &str = "a list of strings";
    match value {
        None => Ok(Vec::new()),
        Some(Value::Array(values)) => values
            .into_iter()
            .map(|value| match value {
                Value::String(text) if !text.is_empty() => Ok(text.into()),
                other => Err(wrong_kind(key, &other, EXPECTED)),
            })
            .collect(),
        Some(other) => Err(wrong_kind(key, &other, EXPECTED)),
    }
}

fn users(value: Option<Value>) -> Result<Vec<u32>, Mistake> {
    const EXPECTED: &str = "a list of user ids, as [0, 107]";
    match value {
        None => Ok(Vec::new()),
        Some(Value::Array(values)) => values
            .into_iter()
            .map(|value| {
                let id = value.as_integer().and_then(|id| u32::try_from(id).ok());
                id.ok_or_else(|| wrong_kind("users", &value, EXPECTED))
            })
            .collect(),
        Some(other) => Err(wrong_kind("users", &other, EXPECTED)),
    }
}

fn disks(value: Option<Value>) -> Result<Vec<disk::DiskConfig>, Mistake> {
    let tables = match value {
        None => return Err(Mistake::NoDisk { example: "a [[disk]] table with id, path, format and socket" }),
        Some(Value::Array(tables)) => tables,
        Some(other) => return Err(wrong_kind("disk", &other, "a [[disk]] table for each disk")),
    };
    tables.into_iter().enumerate().map(|(at, table)| one_disk(at + 1, table)).collect()
}

fn one_disk(number: usize, value: Value) -> Result<disk::DiskConfig, Mistake> {
    let Value::Table(table) = value else {
        return Err(wrong_kind("disk", &value, "a [[disk]] table for each disk"));
    };
    let id = table.get("id").and_then(Value::as_str).map(str::to_owned);
    table
        .into_iter()
        .map(|(key, value)| word(&key, value).map(|value| (key, value)))
        .collect::<Result<_, _>>()
        .and_then(disk::from_pairs)
        .map_err(|mistake| Mistake::InDisk { number, id, mistake: Box::new(mistake) })
}

/// A TOML value as the word it stands for on the command line: `true` is `on`, 4 is `4`.
fn word(key: &str, value: Value) -> Result<String, Mistake> {
    match value {
        Value::String(text) if text.is_empty() => Err(Mistake::Empty { key: key.to_owned() }),
        Value::String(text) => Ok(text),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Boolean(switch) => Ok(switch.word().to_owned()),
        other => Err(wrong_kind(key, &other, "a string")),
    }
}

fn wrong_kind(key: &str, value: &Value, expected: &'static str) -> Mistake {
    Mistake::WrongKind { key: key.to_owned(), kind: value.type_str(), expected }
}
