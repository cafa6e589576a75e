//! How a command ends: the exit code for scripts, and the text for people.

use std::fmt;
use std::process::ExitCode;

/// The exit codes, which scripts may rely on. Clap itself ends with [`Exit::Usage`] on a bad command line.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// It failed; nothing has changed unless the text says otherwise.
    Failed = 1,
    /// The command line or the configuration file makes no sense.
    Usage = 2,
    /// The daemon can not be reached, or went away before it answered.
    Unreachable = 3,
    /// The snapshot was taken and stands, but its grade is `crash` although `--freeze require` was asked for.
    CrashGrade = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// The end of `--help`: what the exit codes mean.
pub(crate) const EXIT_CODES: &str = "Exit codes:
  0  done
  1  failed
  2  the command line or the configuration file makes no sense
  3  the daemon can not be reached, or went away before it answered
  4  the snapshot was taken, but with grade `crash` although `--freeze require` was given";

/// Why a command failed: what was being done, the cause, and what to do next.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    what: String,
    cause: String,
    hints: Vec<String>,
}

impl Failure {
    /// A failure to do `what` because of `cause`.
    pub(crate) fn new(exit: Exit, what: impl Into<String>, cause: impl ToString) -> Self {
        Self { exit, what: what.into(), cause: cause.to_string(), hints: Vec::new() }
    }

    /// Says what to do next; the likeliest first.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// The code to end with.
    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frazil: {}: {}", self.what, printable(&self.cause))?;
        self.hints.iter().try_for_each(|hint| write!(f, "\nhint: {hint}"))
    }
}

/// The text without what would drive a terminal: parts of it come from a guest.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}
