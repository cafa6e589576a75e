//! Requests of the transmission phase ("Request message", "Request types").

use super::Reader;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;

/// Flags of commands ("Command flags").
pub(crate) mod flag {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;
}

/// What a client can ask for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    /// Any other number.
    Unknown(u16),
}

impl Command {
    fn decode(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }

    /// The flags that it may come with. FUA is valid with all of them, for clients are known to set it on any.
    fn flags(self) -> u16 {
        flag::FUA
            | match self {
                Self::Read => flag::DF,
                Self::WriteZeroes => flag::NO_HOLE,
                Self::BlockStatus => flag::REQ_ONE,
                _ => 0,
            }
    }
}

/// A request, as it came: nothing is known of its range, but its flags were looked at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) command: Command,
    /// Whatever the client wants to have back with the reply.
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// How many bytes follow the header.
    pub(crate) payload: u64,
    /// Whether the flags are such as the command may have.
    pub(crate) valid: bool,
}

impl Request {
    /// Bytes of a header.
    pub(crate) const LEN: usize = 28;
    /// Bytes of an extended one.
    pub(crate) const EXTENDED_LEN: usize = 32;

    /// `None` without the magic: the two have lost each other, and the connection must go.
    pub(crate) fn decode(header: &[u8], extended: bool) -> Option<Self> {
        let mut reader = Reader(header);
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        if reader.u32()? != magic {
            return None;
        }
        let (flags, command) = (reader.u16()?, Command::decode(reader.u16()?));
        let (cookie, offset) = (reader.u64()?, reader.u64()?);
        let len = if extended { reader.u64()? } else { u64::from(reader.u32()?) };
        // With extended headers a flag tells whether the length is that of a payload. QEMU (10.0) does not set it on
        // writes, which can only mean that theirs follows.
        let is_write = command == Command::Write;
        let has_payload = is_write || (extended && flags & flag::PAYLOAD_LEN != 0);
        let allowed = command.flags() | if extended { flag::PAYLOAD_LEN } else { 0 };
        let valid = flags & !allowed == 0 && has_payload == is_write;
        let payload = if has_payload { len } else { 0 };
        Some(Self { flags, command, cookie, offset, len, payload, valid })
    }

    /// Whether the flag is set.
    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compact(flags: u16, command: u16, len: u32) -> Vec<u8> {
        let (cookie, offset) = (7_u64.to_be_bytes(), 4096_u64.to_be_bytes());
        [
            &REQUEST_MAGIC.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &command.to_be_bytes(),
            &cookie,
            &offset,
            &len.to_be_bytes(),
        ]
        .concat()
    }

    fn extended(flags: u16, command: u16, len: u64) -> Vec<u8> {
        let mut bytes = compact(flags, command, 0);
        bytes.splice(..4, EXTENDED_REQUEST_MAGIC.to_be_bytes());
        bytes.splice(24.., len.to_be_bytes());
        bytes
    }

    fn payload(bytes: &[u8], extended: bool) -> (u64, bool) {
        let request = Request::decode(bytes, extended).unwrap();
        (request.payload, request.valid)
    }

    #[test]
    fn a_payload_is_told_by_the_command_or_with_extended_headers_by_a_flag() {
        assert_eq!(payload(&compact(0, 1, 512), false), (512, true));
        assert_eq!(payload(&compact(0, 0, 512), false), (0, true));
        assert_eq!(payload(&compact(flag::PAYLOAD_LEN, 1, 512), false), (512, false));
        assert_eq!(payload(&extended(flag::PAYLOAD_LEN, 1, 512), true), (512, true));
        assert_eq!(payload(&extended(0, 1, 512), true), (512, true));
        assert_eq!(payload(&extended(flag::PAYLOAD_LEN, 7, 512), true), (512, false));
        assert_eq!(payload(&extended(0, 6, u64::MAX), true), (0, true));
    }

    #[test]
    fn flags_are_valid_with_the_commands_that_know_them() {
        for (flags, command, valid) in [
            (flag::FUA, 0, true),
            (flag::DF, 0, true),
            (flag::DF, 6, false),
            (flag::NO_HOLE, 6, true),
            (flag::NO_HOLE, 4, false),
            (flag::REQ_ONE, 7, true),
            (flag::REQ_ONE, 0, false),
            (1 << 4, 6, false),
            (1 << 15, 0, false),
        ] {
            let request = Request::decode(&compact(flags, command, 1), false).unwrap();
            assert_eq!(request.valid, valid, "{flags:#x} {command}");
        }
    }

    #[test]
    fn another_magic_or_a_short_header_is_no_request() {
        assert!(Request::decode(&compact(0, 0, 1), false).is_some());
        assert!(Request::decode(&compact(0, 0, 1)[..27], false).is_none());
        assert!(Request::decode(&compact(0, 0, 1), true).is_none());
        assert!(Request::decode(&extended(0, 0, 1), false).is_none());
    }
}
