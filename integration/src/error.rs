use std::fmt;
use std::io;

/// What went wrong, for a person who reads the log of a failed test; nothing here is matched on.
pub struct Error(String);

/// The result of everything a harness does.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with these words.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }

    /// Adds what was seen, such as the end of a console's log.
    #[must_use]
    pub fn with(self, title: &str, evidence: &str) -> Self {
        Self(format!("{}\n--- {title}\n{}\n---", self.0, evidence.trim_end()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// Test runners print the error that a test returns by `Debug`.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Self(format!("JSON: {error}"))
    }
}

/// Says what was being done when an error came.
pub trait Context<T> {
    /// The same result, its error led in by `doing`.
    fn context(self, doing: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Error(format!("{doing}: {error}")))
    }
}
