//! What a command answers when it fails.

use block::ErrorKind;

/// QEMU's error classes (`qapi/error.json`), as far as Frazil has a use for them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ErrorClass {
    /// Anything that no other class names.
    GenericError,
    /// The command is unknown, or not allowed before the negotiation.
    CommandNotFound,
    /// The named disk or snapshot does not exist.
    DeviceNotFound,
    /// The named block job does not exist.
    DeviceNotActive,
}

impl ErrorClass {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
        }
    }
}

/// A failed command: programs read the class, people the description.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct CommandError {
    pub(crate) class: ErrorClass,
    pub(crate) desc: String,
}

impl CommandError {
    pub(crate) fn generic(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into() }
    }

    pub(crate) fn command_not_found(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::CommandNotFound, desc: desc.into() }
    }
}

impl From<block::Error> for CommandError {
    fn from(error: block::Error) -> Self {
        let class = match error.kind() {
            ErrorKind::NotFound => ErrorClass::DeviceNotFound,
            _ => ErrorClass::GenericError,
        };
        Self { class, desc: error.to_string() }
    }
}
