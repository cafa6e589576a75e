//! What a request may ask for.

use std::collections::BTreeMap;

use block::{Disk, Error, ErrorKind, Result};

use crate::group::Served;

/// The disks of a request: those named, or all that can change.
pub(crate) fn choose(served: &BTreeMap<String, Served>, wanted: Option<&[String]>) -> Result<Vec<Served>> {
    let refuse = |kind, story: String| Err(Error::new(kind, story));
    let Some(wanted) = wanted else {
        let all: Vec<_> = served.values().filter(|disk| !disk.chain.read_only()).cloned().collect();
        return match all.is_empty() {
            true => refuse(ErrorKind::InvalidInput, "no writable disk is served".to_owned()),
            false => Ok(all),
        };
    };
    let mut chosen = BTreeMap::new();
    for id in wanted {
        let Some(disk) = served.get(id) else {
            let known: Vec<_> = served.keys().map(String::as_str).collect();
            return refuse(
                ErrorKind::NotFound,
                format!("there is no disk '{id}', only {}", known.join(", ")),
            );
        };
        if disk.chain.read_only() {
            return refuse(
                ErrorKind::ReadOnly,
                format!("disk '{id}' is read-only: it has one state for ever"),
            );
        }
        if chosen.insert(id, disk.clone()).is_some() {
            return refuse(ErrorKind::InvalidInput, format!("disk '{id}' is named twice"));
        }
    }
    match chosen.is_empty() {
        true => refuse(ErrorKind::InvalidInput, "the list of disks is empty".to_owned()),
        false => Ok(chosen.into_values().collect()),
    }
}

/// Snapshot names are shown, logged and typed, and may become parts of file names.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let starts_well = name.bytes().next().is_some_and(|first| !b"-.".contains(&first));
    if starts_well && name.len() <= 64 && name.bytes().all(allowed) {
        return Ok(());
    }
    let story =
        "a snapshot's name has 1 to 64 letters, digits, '-', '_' or '.', and starts with neither '-' nor '.'";
    Err(Error::new(ErrorKind::InvalidInput, story))
}
