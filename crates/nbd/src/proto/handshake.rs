//! The handshake: greeting, options and their replies ("Fixed newstyle negotiation", "Handshake phase").

use super::{Reader, string};

/// Before each option of the client, and the second magic of the greeting: `IHAVEOPT`.
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The first magic of the greeting: `NBDMAGIC`.
const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Before each reply to an option.
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Bytes that follow the reply to `NBD_OPT_EXPORT_NAME`, unless the client asked for none.
pub(crate) const PADDING: usize = 124;

/// Options ("Option types").
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options ("Option reply types").
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(crate) enum Reply {
    Ack = 1,
    Server = 2,
    Info = 3,
    MetaContext = 4,
    Unsupported = (1 << 31) + 1,
    Policy = (1 << 31) + 2,
    Invalid = (1 << 31) + 3,
    TlsRequired = (1 << 31) + 5,
    Unknown = (1 << 31) + 6,
    TooBig = (1 << 31) + 9,
    ExtendedRequired = (1 << 31) + 10,
}

/// Pieces of information about an export ("Option reply types", `NBD_REP_INFO`).
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// What the server says first.
pub(crate) fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    bytes
}

/// What the client answers to the greeting.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct ClientFlags {
    /// It wants no padding after the reply to `NBD_OPT_EXPORT_NAME`.
    pub(crate) no_zeroes: bool,
}

impl ClientFlags {
    /// `None` for flags that were not offered, with which the connection must be dropped ("Client flags"), and for
    /// clients that do not know fixed newstyle: TLS could not be asked of them, nor an error told.
    pub(crate) fn decode(bytes: [u8; 4]) -> Option<Self> {
        let flags = u32::from_be_bytes(bytes);
        let (fixed, no_zeroes) = (u32::from(FLAG_FIXED_NEWSTYLE), u32::from(FLAG_NO_ZEROES));
        (flags & !(fixed | no_zeroes) == 0 && flags & fixed != 0)
            .then_some(Self { no_zeroes: flags & no_zeroes != 0 })
    }
}

/// What comes before an option's data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct OptionHeader {
    pub(crate) option: u32,
    /// Of the data, in bytes; not yet judged.
    pub(crate) len: u32,
}

impl OptionHeader {
    pub(crate) const LEN: usize = 16;

    /// `None` without the magic: the two have lost each other.
    pub(crate) fn decode(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let magic = reader.u64()?;
        let header = Self { option: reader.u32()?, len: reader.u32()? };
        (magic == OPTION_MAGIC).then_some(header)
    }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct InfoRequest<'a> {
    pub(crate) name: &'a str,
    /// What the client wants to know beside [`info::EXPORT`].
    pub(crate) wants: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// `None` if it is cut short, or longer than it says.
    pub(crate) fn decode(data: &'a [u8]) -> Option<Self> {
        let mut reader = Reader(data);
        let name = reader.string()?;
        let count = usize::from(reader.u16()?);
        if reader.0.len() != count * 2 {
            return None;
        }
        let wants = std::iter::from_fn(|| reader.u16()).collect();
        Some(Self { name, wants })
    }
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct MetaRequest<'a> {
    pub(crate) name: &'a str,
    pub(crate) queries: Vec<&'a str>,
}

impl<'a> MetaRequest<'a> {
    /// `None` if it is cut short, or longer than it says.
    pub(crate) fn decode(data: &'a [u8]) -> Option<Self> {
        let mut reader = Reader(data);
        let name = reader.string()?;
        let count = reader.u32()?;
        let mut queries = Vec::new();
        // Each takes four bytes at least, so what was sent bounds the list, whatever the count says.
        for _ in 0..count {
            queries.push(reader.string()?);
        }
        reader.0.is_empty().then_some(Self { name, queries })
    }
}

/// The data of `NBD_OPT_EXPORT_NAME`.
pub(crate) fn export_name(data: &[u8]) -> Option<&str> {
    string(data)
}

/// Appends one reply to an option.
pub(crate) fn push_reply(out: &mut Vec<u8>, option: u32, reply: Reply, payload: &[&[u8]]) {
    // Names, texts and numbers: never near 4 GiB.
    let len: usize = payload.iter().map(|part| part.len()).sum();
    out.extend(REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend((reply as u32).to_be_bytes());
    out.extend((len as u32).to_be_bytes());
    payload.iter().for_each(|part| out.extend(*part));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, count: u16, rest: &[u8]) -> Vec<u8> {
        [&(name.len() as u32).to_be_bytes(), name.as_bytes(), &count.to_be_bytes(), rest].concat()
    }

    #[test]
    fn flags_that_were_not_offered_are_refused() {
        assert_eq!(ClientFlags::decode([0, 0, 0, 3]), Some(ClientFlags { no_zeroes: true }));
        assert_eq!(ClientFlags::decode([0, 0, 0, 1]), Some(ClientFlags { no_zeroes: false }));
        for flags in [0_u32, 2, 4, 5, 1 << 31 | 1] {
            assert_eq!(ClientFlags::decode(flags.to_be_bytes()), None, "{flags}");
        }
    }

    #[test]
    fn a_request_for_information_is_exactly_as_long_as_it_says() {
        let good = info("disk", 2, &[0, 1, 0, 3]);
        assert_eq!(InfoRequest::decode(&good), Some(InfoRequest { name: "disk", wants: vec![1, 3] }));
        for cut in 0..good.len() {
            assert_eq!(InfoRequest::decode(&good[..cut]), None, "{cut}");
        }
        assert_eq!(InfoRequest::decode(&info("disk", 1, &[0, 1, 0])), None);
        assert_eq!(InfoRequest::decode(&info("d\0sk", 0, &[])), None);
        assert_eq!(InfoRequest::decode(&info(&"d".repeat(4097), 0, &[])), None);
        assert_eq!(InfoRequest::decode(&[0xff; 64]), None);
    }

    #[test]
    fn counts_of_queries_that_are_not_there_take_no_memory() {
        let head = [&1_u32.to_be_bytes()[..], b"d"].concat();
        let lie = [&head[..], &u32::MAX.to_be_bytes(), &[0; 40]].concat();
        assert_eq!(MetaRequest::decode(&lie), None);
        let one = [&head[..], &1_u32.to_be_bytes(), &5_u32.to_be_bytes(), b"base:"].concat();
        assert_eq!(MetaRequest::decode(&one), Some(MetaRequest { name: "d", queries: vec!["base:"] }));
        assert_eq!(MetaRequest::decode(&[&one[..], &[0]].concat()), None);
    }
}
