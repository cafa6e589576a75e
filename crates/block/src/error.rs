//! Errors: a small stable kind, what was being done, and the cause beneath.

use std::fmt;
use std::io;

/// The result of anything that can fail on a disk.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it is. Protocols map the kind (QMP class, NBD errno, virtio status); people read the text.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ErrorKind {
    /// The caller's argument makes no sense.
    InvalidInput,
    /// The range ends past the end of the disk.
    OutOfRange,
    /// The named thing does not exist.
    NotFound,
    /// The thing is in use, or not in a state that allows this.
    Busy,
    /// The disk or image is not writable.
    ReadOnly,
    /// A feature that Frazil does not have.
    Unsupported,
    /// The image contradicts its own format.
    Corrupt,
    /// The host has no room left.
    NoSpace,
    /// A deadline passed.
    TimedOut,
    /// The host's I/O failed.
    Io,
    /// An earlier sync of this image failed; what it lost is unknown, so it acknowledges nothing any more.
    Latched,
}

/// A failure: its kind, its story, and its cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A failure without a cause beneath.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// The stable kind, for protocols.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same failure, told from further up: `context: old text`.
    #[must_use]
    pub fn context(self, context: impl Into<String>) -> Self {
        Self { kind: self.kind, context: context.into(), source: Some(Box::new(self)) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{}: {source}", self.context),
            None => f.write_str(&self.context),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::InvalidInput => ErrorKind::InvalidInput,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                ErrorKind::NoSpace
            }
            io::ErrorKind::TimedOut => ErrorKind::TimedOut,
            io::ErrorKind::ResourceBusy => ErrorKind::Busy,
            _ => ErrorKind::Io,
        };
        Self { kind, context: error.to_string(), source: None }
    }
}

/// Adds the story to a failure on its way up.
pub trait Context<T> {
    /// Wraps the error with what was being done; `context` is only called on failure.
    fn context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| error.into().context(context()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_story_keeps_its_kind() {
        let failed: io::Result<()> = Err(io::ErrorKind::StorageFull.into());
        let error = failed.context(|| "grow the overlay").context(|| "write to vda").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.to_string(), "write to vda: grow the overlay: no storage space");
    }
}
