//! One disk: `id=vda,path=FILE,format=raw|qcow2,socket=SOCK[,…]`, or a `[[disk]]` table with the same keys.

use std::path::PathBuf;

use block::WriteErrors;
use hostio::Cache;
use snapshot::ImageFormat;

use super::mistake::{MAX_ID, MAX_SERIAL};
use super::{Mistake, Word};

/// The keys of a disk, in the order in which people write them.
pub(crate) const KEYS: &[&str] = &[
    "id",
    "path",
    "format",
    "socket",
    "queues",
    "serial",
    "readonly",
    "cache",
    "metadata-cache",
    "werror",
    "max-overlays",
];

/// As many as one framework's worker mask has bits (`VhostUserBackend::queues_per_thread`).
pub(crate) const MAX_QUEUES: u16 = 64;

/// More than anybody has descriptors for.
const MAX_OVERLAYS: u16 = 10_000;

/// Less would hold hardly more than one piece of a disk that was written in crumbs.
const MIN_METADATA_CACHE: u64 = 1 << 20;
const MAX_METADATA_CACHE: u64 = 64 << 30;

/// A disk to serve.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct DiskConfig {
    /// Its name in snapshots, on the command line and in QMP.
    pub(crate) id: String,
    /// The base image: a file or a host block device. What is on top of it is found in the state directory.
    pub(crate) path: PathBuf,
    /// The base image's format; never probed.
    pub(crate) format: ImageFormat,
    /// Where the front-end connects.
    pub(crate) socket: PathBuf,
    /// Request queues offered, each with its own worker. A front-end that wants more refuses to start.
    pub(crate) queues: u16,
    /// What the guest sees as the disk's serial, at most [`MAX_SERIAL`] bytes of ASCII.
    pub(crate) serial: String,
    /// Whether the guest is refused all writes.
    pub(crate) readonly: bool,
    /// The way of data I/O.
    pub(crate) cache: Cache,
    /// Bytes of memory for what is known of where the disk's bytes are.
    pub(crate) metadata_cache: u64,
    /// What becomes of the guest's changes that the host can not carry out.
    pub(crate) werror: WriteErrors,
    /// With more overlays, the oldest snapshots are deleted; `None` for no limit.
    pub(crate) max_overlays: Option<u32>,
}

/// Parses the value of `--disk`; a comma inside a value is written as two, as QEMU does.
pub(crate) fn parse(text: &str) -> Result<DiskConfig, Mistake> {
    let pairs = split(text)
        .into_iter()
        .map(|word| match word.split_once('=') {
            Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
            None => Err(Mistake::NoValue { word }),
        })
        .collect::<Result<_, _>>()?;
    from_pairs(pairs)
}

/// Splits at single commas and makes one of two.
fn split(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(letter);
        }
    }
    words
}

/// Builds a disk of its keys and values.
pub(super) fn from_pairs(pairs: Vec<(String, String)>) -> Result<DiskConfig, Mistake> {
    let mut given = Given::new(pairs)?;
    let id = given.required("id", "vda")?;
    check_id(&id)?;
    let serial = match given.optional("serial") {
        Some(serial) => checked_serial(serial)?,
        None => id.chars().take(MAX_SERIAL).collect(),
    };
    Ok(DiskConfig {
        path: given.required("path", "FILE")?.into(),
        format: ImageFormat::from_word("format", &given.required("format", "raw|qcow2")?)?,
        socket: given.required("socket", "SOCKET")?.into(),
        queues: given.optional("queues").map_or(Ok(1), |value| queues(&value))?,
        readonly: given
            .optional("readonly")
            .map_or(Ok(false), |value| bool::from_word("readonly", &value))?,
        cache: given
            .optional("cache")
            .map_or(Ok(Cache::default()), |value| Cache::from_word("cache", &value))?,
        metadata_cache: given
            .optional("metadata-cache")
            .map_or(Ok(snapshot::DEFAULT_METADATA_CACHE), |value| size("metadata-cache", &value))?,
        werror: given
            .optional("werror")
            .map_or(Ok(WriteErrors::default()), |value| WriteErrors::from_word("werror", &value))?,
        max_overlays: given.optional("max-overlays").map(|value| overlays(&value)).transpose()?,
        id,
        serial,
    })
}

/// The keys that were given: each known, once, and with a value.
struct Given(Vec<(String, String)>);

impl Given {
    fn new(pairs: Vec<(String, String)>) -> Result<Self, Mistake> {
        for (at, (key, value)) in pairs.iter().enumerate() {
            if !KEYS.contains(&key.as_str()) {
                return Err(Mistake::UnknownKey { key: key.clone(), valid: KEYS });
            }
            if pairs.iter().take(at).any(|(earlier, _)| earlier == key) {
                return Err(Mistake::Twice { key: key.clone() });
            }
            if value.is_empty() {
                return Err(Mistake::Empty { key: key.clone() });
            }
        }
        Ok(Self(pairs))
    }

    fn optional(&mut self, key: &str) -> Option<String> {
        let at = self.0.iter().position(|(given, _)| given == key)?;
        Some(self.0.swap_remove(at).1)
    }

    fn required(&mut self, key: &'static str, example: &'static str) -> Result<String, Mistake> {
        self.optional(key).ok_or(Mistake::Missing { key, example })
    }
}

fn check_id(id: &str) -> Result<(), Mistake> {
    let first = id.starts_with(|c: char| c.is_ascii_alphanumeric());
    let rest = id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if first && rest && id.len() <= MAX_ID { Ok(()) } else { Err(Mistake::BadId { value: id.to_owned() }) }
}

fn checked_serial(serial: String) -> Result<String, Mistake> {
    let printable = serial.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if printable && serial.len() <= MAX_SERIAL {
        Ok(serial)
    } else {
        Err(Mistake::BadSerial { value: serial })
    }
}

fn queues(value: &str) -> Result<u16, Mistake> {
    match value.parse() {
        Ok(queues) if (1..=MAX_QUEUES).contains(&queues) => Ok(queues),
        _ => Err(Mistake::NoSuchNumber { key: "queues", value: value.to_owned(), low: 1, high: MAX_QUEUES }),
    }
}

/// Bytes, as a number or with one of the suffixes that QEMU takes (powers of 1024).
fn size(key: &'static str, value: &str) -> Result<u64, Mistake> {
    let (digits, unit) = match value.chars().last() {
        Some('K') => (&value[..value.len() - 1], 1 << 10),
        Some('M') => (&value[..value.len() - 1], 1 << 20),
        Some('G') => (&value[..value.len() - 1], 1 << 30),
        _ => (value, 1),
    };
    let bytes = digits.parse().ok().and_then(|number: u64| number.checked_mul(unit));
    let fits = bytes.filter(|bytes| (MIN_METADATA_CACHE..=MAX_METADATA_CACHE).contains(bytes));
    fits.ok_or_else(|| Mistake::NoSuchSize { key, value: value.to_owned() })
}

fn overlays(value: &str) -> Result<u32, Mistake> {
    match value.parse() {
        Ok(most) if (1..=MAX_OVERLAYS).contains(&most) => Ok(most.into()),
        _ => Err(Mistake::NoSuchNumber {
            key: "max-overlays",
            value: value.to_owned(),
            low: 1,
            high: MAX_OVERLAYS,
        }),
    }
}
