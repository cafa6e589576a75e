//! Standard output: one JSON value for programs, or a text for people.

use std::io::{self, Write};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cli::Output;
use crate::failure::{Exit, Failure, printable};

/// Prints the daemon's answer as it is, or as the text that `table` makes of it.
pub(super) fn show_or_json<T: DeserializeOwned>(
    output: Output,
    value: &Value,
    table: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    if output.json {
        return print(&format!("{value:#}\n"));
    }
    print(&printable(&table(&decode("read the answer", value)?)))
}

/// An answer as what it must be.
pub(super) fn decode<T: DeserializeOwned>(what: &str, value: &Value) -> Result<T, Failure> {
    T::deserialize(value).map_err(|error| {
        Failure::new(Exit::Failed, what, error).hint(
            "the daemon may be of another version: compare `frazil --version` with `frazil status --json`",
        )
    })
}

/// Prints `text`. A reader that went away early (`| head`) is no failure.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Failed, "write to standard output", error))
        }
        _ => Ok(()),
    }
}
