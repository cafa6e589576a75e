//! What a plain reading of the specification says a server does, in memory and without any cleverness.

use std::sync::LazyLock;

use super::SIZE;
use crate::proto::reply::Style;
use crate::testing::{Ask, command};

/// The options in what a client says, greeting first: their codes and data, up to what makes no sense.
pub(super) fn options(said: &[u8]) -> Vec<(u32, &[u8])> {
    let mut found = Vec::new();
    let Some((flags, mut rest)) = said.split_at_checked(4) else { return found };
    if !matches!(flags, [0, 0, 0, 1 | 3]) {
        return found;
    }
    while let Some((head, after)) = rest.split_at_checked(16) {
        let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if &head[..8] != b"IHAVEOPT" {
            break;
        }
        let Some((data, after)) = after.split_at_checked(word(12) as usize) else { break };
        found.push((word(8), data));
        rest = after;
    }
    found
}

/// What is on the disk at first. Made once: that takes longer than most requests.
static CONTENT: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..SIZE).map(|at| (at / 3 + at / 1000) as u8).collect());

/// A disk and a client, both made of a fuzzer's bytes.
pub(super) struct Model<'a> {
    input: &'a [u8],
    pub(super) style: Style,
    pub(super) writable: bool,
    pub(super) bytes: Vec<u8>,
}

impl<'a> Model<'a> {
    pub(super) fn new(input: &'a [u8]) -> Self {
        let mut model = Self { input, style: Style::Simple, writable: true, bytes: CONTENT.clone() };
        let mode = model.number(1);
        model.style = [Style::Simple, Style::Structured, Style::Extended][(mode % 3) as usize];
        model.writable = mode & 0x80 == 0;
        model
    }

    /// The next `len` bytes; zeroes once they are used up.
    fn number(&mut self, len: usize) -> u64 {
        let (now, rest) = self.input.split_at(len.min(self.input.len()));
        self.input = rest;
        now.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// What is left once the requests are made.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.input
    }

    /// The next request and what follows it.
    pub(super) fn next(&mut self) -> Option<(Ask, Vec<u8>)> {
        if self.input.len() < 10 {
            return None;
        }
        let number = self.number(1) as u16 % 10;
        if number == command::DISC {
            return None;
        }
        let flags = self.number(1) as u16;
        // Mostly on the disk, sometimes at its end, and sometimes nowhere near it.
        let mut place = |wild: u64| {
            let (shift, at) = (self.number(1) % 64, self.number(3));
            match shift {
                63 => u64::MAX - at,
                62 => SIZE as u64 - at % 4096,
                61 => at << 20,
                _ => at % wild,
            }
        };
        let (offset, len) = (place(SIZE as u64), place(SIZE as u64 / 2));
        let extended = self.style == Style::Extended;
        let has_payload = number == command::WRITE || (extended && flags & 1 << 5 != 0);
        // A payload that is too long ends the connection, which would be told of no more: others see to that.
        let len = if has_payload { len % (2 << 20) } else { len };
        let len = if extended { len } else { len % (1 << 32) };
        let payload = if has_payload { vec![offset as u8; len as usize] } else { Vec::new() };
        Some((Ask { flags, command: number, offset, len }, payload))
    }

    /// Does it, or says which error it gets.
    pub(super) fn execute(&mut self, ask: Ask, payload: &[u8]) -> Result<(), u32> {
        let extended = self.style == Style::Extended;
        let mut allowed = 1;
        match ask.command {
            command::READ => allowed |= 1 << 2,
            command::WRITE_ZEROES => allowed |= 1 << 1,
            command::BLOCK_STATUS => allowed |= 1 << 3,
            command::WRITE if extended => allowed |= 1 << 5,
            8.. => return Err(22),
            _ => {}
        }
        if ask.flags & !allowed != 0 {
            return Err(22);
        }
        let writes = matches!(ask.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if writes && !self.writable {
            return Err(1);
        }
        if ask.command == command::FLUSH {
            return Ok(());
        }
        if matches!(ask.command, command::READ | command::CACHE) && ask.len > 32 << 20 {
            return Err(22);
        }
        if u128::from(ask.offset) + u128::from(ask.len) > SIZE as u128 {
            return Err(if writes { 28 } else { 22 });
        }
        let range = ask.offset as usize..(ask.offset + ask.len) as usize;
        match ask.command {
            command::WRITE => self.bytes[range].copy_from_slice(payload),
            command::TRIM | command::WRITE_ZEROES => self.bytes[range].fill(0),
            command::BLOCK_STATUS if ask.len == 0 || self.style == Style::Simple => return Err(22),
            _ => {}
        }
        Ok(())
    }
}
