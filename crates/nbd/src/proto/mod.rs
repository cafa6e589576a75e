//! The bytes on the wire: pure functions, no I/O and no state.
//!
//! Names and numbers are those of the specification, `doc/proto.md` of NetworkBlockDevice/nbd; the section is named
//! where a rule comes from. All numbers are in network byte order.

pub(crate) mod handshake;
pub(crate) mod reply;
pub(crate) mod request;

/// The longest string of the protocol, in bytes ("Conventions").
pub(crate) const MAX_STRING: usize = 4096;

/// Errors of the transmission phase ("Error values").
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(crate) enum Errno {
    NotPermitted = 1,
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    NotSupported = 95,
}

impl Errno {
    /// What a client may know of it. Not the error's own story, which names files of this host.
    pub(crate) fn message(self) -> &'static str {
        match self {
            Self::NotPermitted => "the export is read-only",
            Self::Io => "an I/O error on the server",
            Self::Invalid => "the request makes no sense here",
            Self::NoSpace => "no room, or past the end of the export",
            Self::NotSupported => "not supported",
        }
    }
}

impl From<block::ErrorKind> for Errno {
    fn from(kind: block::ErrorKind) -> Self {
        use block::ErrorKind as Kind;
        match kind {
            Kind::InvalidInput | Kind::OutOfRange => Self::Invalid,
            Kind::ReadOnly => Self::NotPermitted,
            Kind::Unsupported => Self::NotSupported,
            Kind::NoSpace => Self::NoSpace,
            Kind::NotFound | Kind::Busy | Kind::Corrupt | Kind::TimedOut | Kind::Io | Kind::Latched => {
                Self::Io
            }
        }
    }
}

/// Takes numbers and strings off the front of a message; `None` once it is too short.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.bytes(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.bytes(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.bytes(8)?.try_into().ok().map(u64::from_be_bytes)
    }

    /// A string with its length before it.
    pub(crate) fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()?;
        string(self.bytes(usize::try_from(len).ok()?)?)
    }
}

/// A string as the protocol has them: UTF-8 without NUL, and not too long ("Conventions").
pub(crate) fn string(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok().filter(|text| text.len() <= MAX_STRING && !text.contains('\0'))
}
