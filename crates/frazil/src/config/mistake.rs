//! What can be wrong with a configuration, and what to do about it.

use std::path::PathBuf;

/// A mistake in the flags or the configuration file. Its text names the key, the values it can have, and the way out.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Mistake {
    #[error("unknown key `{key}`; the keys are {}", .valid.join(", "))]
    UnknownKey { key: String, valid: &'static [&'static str] },
    #[error("key `{key}` is given twice; give it once")]
    Twice { key: String },
    #[error("key `{key}` is missing; add {key}={example}")]
    Missing { key: &'static str, example: &'static str },
    #[error("`{word}` has no value; write KEY=VALUE, and a comma inside a value as two (`,,`)")]
    NoValue { word: String },
    #[error("key `{key}` has an empty value; give it one or leave the key out")]
    Empty { key: String },
    #[error("key `{key}` can not be `{value}`; it is one of {}", .valid.join(", "))]
    NoSuchWord { key: String, value: String, valid: Vec<&'static str> },
    #[error("key `{key}` can not be `{value}`; it is a number from {low} to {high}")]
    NoSuchNumber { key: &'static str, value: String, low: u16, high: u16 },
    #[error("key `{key}` can not be `{value}`; it is a size from 1M to 64G, as 4096K, 64M or 1G")]
    NoSuchSize { key: &'static str, value: String },
    #[error("key `{key}` can not be `{value}`; it is unix:PATH or HOST:PORT, as 127.0.0.1:9430")]
    NoSuchAddress { key: &'static str, value: String },
    #[error(
        "key `id` can not be `{value}`; use letters, digits, `-`, `_` and `.`, at most {MAX_ID}, a letter or digit \
         first"
    )]
    BadId { value: String },
    #[error(
        "key `serial` can not be `{value}`; a guest sees at most {MAX_SERIAL} printable ASCII characters"
    )]
    BadSerial { value: String },
    #[error(
        "key `{key}` is {len} bytes long, and a socket's path at most {MAX_SOCKET_PATH}: use a shorter path"
    )]
    LongSocket { key: String, len: usize },
    #[error("{} is given to {first} and to {second}; each needs its own", path.display())]
    SharedPath { path: PathBuf, first: String, second: String },
    #[error("two disks have id={id}; each needs its own")]
    SharedId { id: String },
    #[error("no disk to serve; add {example}")]
    NoDisk { example: &'static str },
    #[error("freeze=require needs the guest's agent; add agent=SOCKET, or let freeze-owner be `external`")]
    RequireWithoutAgent,
    #[error("freeze=require contradicts freeze-owner=none; let freeze be `prefer` or `never`")]
    RequireWithoutOwner,
    #[error("key `{key}` has a value of the wrong kind ({kind}); write {expected}")]
    WrongKind { key: String, kind: &'static str, expected: &'static str },
    #[error("{0}")]
    Toml(String),
    #[error("[[disk]] number {number}{}: {mistake}", .id.as_ref().map(|id| format!(" (id {id})")).unwrap_or_default())]
    InDisk { number: usize, id: Option<String>, mistake: Box<Mistake> },
}

/// The longest id of a disk; it becomes part of file names.
pub(crate) const MAX_ID: usize = 64;
/// `VIRTIO_BLK_ID_BYTES` (virtio 1.3, section 5.2.6): what GET_ID can carry.
pub(crate) const MAX_SERIAL: usize = 20;
/// The room in `sockaddr_un`, without the final zero (unix(7)).
pub(crate) const MAX_SOCKET_PATH: usize = 107;
