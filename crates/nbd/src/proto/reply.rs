//! Replies of the transmission phase ("Simple reply message", "Structured reply chunk message", "Extended reply chunk
//! message").

use super::Errno;

const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The last chunk of a reply.
const FLAG_DONE: u16 = 1;

const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_OFFSET_HOLE: u16 = 2;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_BLOCK_STATUS_EXT: u16 = 6;
const TYPE_ERROR: u16 = (1 << 15) + 1;

/// Transmission flags ("Transmission flags").
pub(crate) mod transmission {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
}

/// What kind of replies the client asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Style {
    Simple,
    Structured,
    /// Structured, with 64-bit lengths in requests and replies.
    Extended,
}

/// The request that is answered: what its replies repeat.
#[derive(Clone, Copy, Debug)]
pub(crate) struct To {
    pub(crate) style: Style,
    pub(crate) cookie: u64,
    /// Where the request began; extended replies repeat it.
    pub(crate) offset: u64,
}

impl To {
    /// Appends the reply to a command that returns nothing, or which failed.
    pub(crate) fn push_end(self, out: &mut Vec<u8>, result: Result<(), Errno>) {
        match (self.style, result) {
            (Style::Simple, result) => self.push_simple(out, result),
            (_, Ok(())) => self.push_chunk(out, TYPE_NONE, true, 0),
            (_, Err(errno)) => {
                let message = errno.message();
                self.push_chunk(out, TYPE_ERROR, true, 6 + message.len() as u64);
                out.extend((errno as u32).to_be_bytes());
                out.extend((message.len() as u16).to_be_bytes());
                out.extend(message.as_bytes());
            }
        }
    }

    /// Appends a simple reply. After a successful one to a read, the data follows.
    pub(crate) fn push_simple(self, out: &mut Vec<u8>, result: Result<(), Errno>) {
        out.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
        out.extend(result.err().map_or(0, |errno| errno as u32).to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
    }

    /// Appends what comes before `len` bytes of data from `offset` of the export on.
    pub(crate) fn push_data(self, out: &mut Vec<u8>, offset: u64, len: u64, done: bool) {
        self.push_chunk(out, TYPE_OFFSET_DATA, done, 8 + len);
        out.extend(offset.to_be_bytes());
    }

    /// Appends a hole.
    pub(crate) fn push_hole(self, out: &mut Vec<u8>, offset: u64, len: u32, done: bool) {
        self.push_chunk(out, TYPE_OFFSET_HOLE, done, 12);
        out.extend(offset.to_be_bytes());
        out.extend(len.to_be_bytes());
    }

    /// Appends the status of consecutive extents, each its length and flags, in the context with this id. Without extended
    /// headers their lengths must fit in 32 bits, which those within a request do.
    pub(crate) fn push_status(self, out: &mut Vec<u8>, id: u32, extents: &[(u64, u32)], done: bool) {
        let count = extents.len() as u64;
        if self.style == Style::Extended {
            self.push_chunk(out, TYPE_BLOCK_STATUS_EXT, done, 8 + 16 * count);
            out.extend(id.to_be_bytes());
            out.extend((count as u32).to_be_bytes());
            for (len, flags) in extents {
                out.extend(len.to_be_bytes());
                out.extend(u64::from(*flags).to_be_bytes());
            }
        } else {
            self.push_chunk(out, TYPE_BLOCK_STATUS, done, 4 + 8 * count);
            out.extend(id.to_be_bytes());
            for (len, flags) in extents {
                out.extend((*len as u32).to_be_bytes());
                out.extend(flags.to_be_bytes());
            }
        }
    }

    /// Appends the header of a chunk with `len` bytes of payload. No payload is longer than 32 MiB and a little.
    fn push_chunk(self, out: &mut Vec<u8>, kind: u16, done: bool, len: u64) {
        let extended = self.style == Style::Extended;
        out.extend(if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC }.to_be_bytes());
        out.extend(if done { FLAG_DONE } else { 0 }.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        if extended {
            out.extend(self.offset.to_be_bytes());
            out.extend(len.to_be_bytes());
        } else {
            out.extend((len as u32).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(style: Style, make: impl FnOnce(To, &mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        make(To { style, cookie: 0x0102_0304_0506_0708, offset: 0x1000 }, &mut out);
        out
    }

    #[test]
    fn headers_have_the_lengths_of_the_specification() {
        assert_eq!(made(Style::Simple, |to, out| to.push_end(out, Ok(()))).len(), 16);
        assert_eq!(made(Style::Structured, |to, out| to.push_end(out, Ok(()))).len(), 20);
        assert_eq!(made(Style::Extended, |to, out| to.push_end(out, Ok(()))).len(), 32);
        assert_eq!(made(Style::Structured, |to, out| to.push_hole(out, 0, 1, true)).len(), 20 + 12);
        assert_eq!(made(Style::Extended, |to, out| to.push_data(out, 0, 512, true)).len(), 32 + 8);
    }

    #[test]
    fn a_simple_error_is_magic_error_and_cookie() {
        let found = made(Style::Simple, |to, out| to.push_end(out, Err(Errno::NoSpace)));
        assert_eq!(found, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn status_is_in_32_bits_or_with_extended_headers_in_64() {
        let extents = [(512, 3), (1 << 20, 0)];
        let found = made(Style::Structured, |to, out| to.push_status(out, 9, &extents, true));
        let expected = [0, 0, 0, 9, 0, 0, 2, 0, 0, 0, 0, 3, 0, 16, 0, 0, 0, 0, 0, 0];
        assert_eq!(found[..20], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 5, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 20]);
        assert_eq!(found[20..], expected);
        let found = made(Style::Extended, |to, out| to.push_status(out, 9, &[(1 << 32, 3)], false));
        assert_eq!(found[4..8], [0, 0, 0, 6]);
        assert_eq!(found[16..32], [0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 24]);
        assert_eq!(found[32..], [0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
    }
}
