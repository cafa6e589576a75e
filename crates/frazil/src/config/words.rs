//! The words that values can be: one list for the flags, the `--disk` keys and the configuration file.

use block::WriteErrors;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use hostio::Cache;
use snapshot::{FreezeOwner, FreezePolicy, ImageFormat};

use super::Mistake;

/// A type whose values are written as words.
pub(crate) trait Word: Copy + PartialEq + Send + Sync + 'static {
    /// Every word and what it means.
    const WORDS: &'static [(&'static str, Self)];

    /// Reads the value of `key`.
    fn from_word(key: &str, value: &str) -> Result<Self, Mistake> {
        Self::WORDS.iter().find(|(word, _)| *word == value).map(|(_, meant)| *meant).ok_or_else(|| {
            Mistake::NoSuchWord {
                key: key.to_owned(),
                value: value.to_owned(),
                valid: Self::WORDS.iter().map(|(word, _)| *word).collect(),
            }
        })
    }

    /// The word for this value.
    fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, meant)| *meant == self).map_or("", |(word, _)| word)
    }
}

impl Word for FreezePolicy {
    const WORDS: &'static [(&'static str, Self)] =
        &[("require", Self::Require), ("prefer", Self::Prefer), ("never", Self::Never)];
}

impl Word for FreezeOwner {
    const WORDS: &'static [(&'static str, Self)] =
        &[("frazil", Self::Frazil), ("external", Self::External), ("none", Self::None)];
}

impl Word for ImageFormat {
    const WORDS: &'static [(&'static str, Self)] = &[("raw", Self::Raw), ("qcow2", Self::Qcow2)];
}

impl Word for Cache {
    const WORDS: &'static [(&'static str, Self)] = &[("writeback", Self::Writeback), ("none", Self::None)];
}

impl Word for WriteErrors {
    const WORDS: &'static [(&'static str, Self)] =
        &[("report", Self::Report), ("enospc", Self::Enospc), ("stop", Self::Stop)];
}

/// What the daemon keeps itself from.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum SandboxMode {
    /// All that follows.
    #[default]
    On,
    /// Nothing, and its memory can be dumped and traced.
    Off,
    /// Files and connections only.
    Landlock,
    /// System calls only.
    Seccomp,
}

impl Word for SandboxMode {
    const WORDS: &'static [(&'static str, Self)] =
        &[("on", Self::On), ("off", Self::Off), ("landlock", Self::Landlock), ("seccomp", Self::Seccomp)];
}

impl Word for bool {
    const WORDS: &'static [(&'static str, Self)] = &[("on", true), ("off", false)];
}

/// Reads a flag whose value is a word; help and completions list the words.
pub(crate) fn parser<T: Word>() -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(T::WORDS.iter().map(|(word, _)| *word))
        .try_map(|value| T::from_word("value", &value))
}
