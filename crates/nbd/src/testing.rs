//! A client for tests and fuzz targets: it says what it is told to, right or wrong, and reads replies strictly.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's means fail the test")]
#![cfg_attr(not(test), allow(dead_code, reason = "fuzz targets need less of it than tests"))]

use std::collections::BTreeMap;
use std::io::{Read, Write};

use crate::proto::reply::Style;

/// Numbers of commands.
pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// What a request says of itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ask {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// A whole reply.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Answer {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
    /// Offset and bytes of each content chunk, or the length of a hole. A simple reply has no offsets.
    pub(crate) content: Vec<(u64, Result<Vec<u8>, u32>)>,
    pub(crate) status: BTreeMap<u32, Vec<(u64, u32)>>,
}

impl Answer {
    /// The bytes that were read, if they are all there, each once.
    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut parts: Vec<_> = self.content.iter().collect();
        parts.sort_by_key(|(at, _)| *at);
        let mut bytes = Vec::with_capacity(len);
        for (at, part) in parts {
            assert_eq!(*at, offset + bytes.len() as u64, "a byte was sent twice, or not at all");
            match part {
                Ok(part) => bytes.extend(part),
                Err(hole) => bytes.resize(bytes.len() + *hole as usize, 0),
            }
        }
        assert_eq!(bytes.len(), len, "not as many as were asked for");
        bytes
    }
}

/// One request as bytes.
pub(crate) fn request(style: Style, cookie: u64, ask: Ask) -> Vec<u8> {
    let extended = style == Style::Extended;
    let mut out = if extended { 0x21e4_1c71_u32 } else { 0x2560_9513 }.to_be_bytes().to_vec();
    out.extend(ask.flags.to_be_bytes());
    out.extend(ask.command.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(ask.offset.to_be_bytes());
    match extended {
        true => out.extend(ask.len.to_be_bytes()),
        false => out.extend((ask.len as u32).to_be_bytes()),
    }
    out
}

/// One option as bytes.
pub(crate) fn option(code: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &code.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

/// The data of INFO and GO.
pub(crate) fn info_data(name: &str, wants: &[u16]) -> Vec<u8> {
    let wants: Vec<u8> =
        [wants.len() as u16].iter().chain(wants).flat_map(|want| want.to_be_bytes()).collect();
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &wants].concat()
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat();
    out.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        out.extend((query.len() as u32).to_be_bytes());
        out.extend(query.as_bytes());
    }
    out
}

pub(crate) fn number<const N: usize>(stream: &mut impl Read) -> Option<u64> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).ok()?;
    Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// A reply to an option: its type and payload. `None` once the server has hung up.
pub(crate) fn option_reply(stream: &mut impl Read, code: u32) -> Option<(u32, Vec<u8>)> {
    assert_eq!(number::<8>(stream)?, 0x0003_e889_0455_65a9);
    assert_eq!(number::<4>(stream).unwrap() as u32, code);
    let kind = number::<4>(stream).unwrap() as u32;
    let mut payload = vec![0; number::<4>(stream).unwrap() as usize];
    stream.read_exact(&mut payload).unwrap();
    Some((kind, payload))
}

/// A reply. `read` is how many bytes a simple one brings; `None` once the server has hung up, or hangs up in the middle of
/// a simple reply, which is how it tells of a failure there.
pub(crate) fn answer(stream: &mut impl Read, read: impl Fn(u64) -> usize) -> Option<Answer> {
    let mut found = Answer::default();
    loop {
        let magic = number::<4>(stream)?;
        if magic == 0x6744_6698 {
            found.error = number::<4>(stream)? as u32;
            found.cookie = number::<8>(stream)?;
            if found.error == 0 {
                let mut bytes = vec![0; read(found.cookie)];
                stream.read_exact(&mut bytes).ok()?;
                found.content.push((0, Ok(bytes)));
            }
            return Some(found);
        }
        let (done, kind) = (number::<2>(stream)?, number::<2>(stream)? as u16);
        found.cookie = number::<8>(stream)?;
        let len = match magic {
            0x668e_33ef => number::<4>(stream)?,
            0x6e8a_278c => {
                number::<8>(stream)?;
                number::<8>(stream)?
            }
            _ => panic!("no magic of a reply: {magic:#x}"),
        };
        assert!(len <= (32 << 20) + 8, "a chunk of {len} bytes");
        let mut payload = vec![0; len as usize];
        stream.read_exact(&mut payload).ok()?;
        take_chunk(&mut found, kind, &payload);
        if done == 1 {
            return Some(found);
        }
    }
}

fn take_chunk(found: &mut Answer, kind: u16, payload: &[u8]) {
    let mut rest = payload;
    match kind {
        0 => assert!(payload.is_empty()),
        1 => {
            let offset = number::<8>(&mut rest).unwrap();
            assert!(!rest.is_empty(), "a chunk without data");
            found.content.push((offset, Ok(rest.to_vec())));
        }
        2 => {
            assert_eq!(payload.len(), 12);
            let offset = number::<8>(&mut rest).unwrap();
            found.content.push((offset, Err(number::<4>(&mut rest).unwrap() as u32)));
        }
        5 | 6 => {
            let id = number::<4>(&mut rest).unwrap() as u32;
            let mut list = Vec::new();
            if kind == 6 {
                assert_eq!(number::<4>(&mut rest).unwrap() as usize * 16, rest.len());
            }
            while !rest.is_empty() {
                list.push(match kind {
                    5 => (number::<4>(&mut rest).unwrap(), number::<4>(&mut rest).unwrap() as u32),
                    _ => (number::<8>(&mut rest).unwrap(), number::<8>(&mut rest).unwrap() as u32),
                });
            }
            assert!(list.iter().all(|(len, _)| *len > 0) && !list.is_empty());
            assert!(found.status.insert(id, list).is_none(), "two chunks of one context");
        }
        0x8001 => {
            found.error = number::<4>(&mut rest).unwrap() as u32;
            assert!(found.error != 0);
            assert_eq!(number::<2>(&mut rest).unwrap() as usize, rest.len());
            std::str::from_utf8(rest).unwrap();
        }
        _ => panic!("a chunk of unknown type {kind}"),
    }
}

/// A connection that has read the greeting, or chosen an export.
#[derive(Debug)]
pub(crate) struct Client<S> {
    pub(crate) stream: S,
    pub(crate) style: Style,
}

impl<S: Read + Write> Client<S> {
    /// Reads the greeting and answers with `flags`.
    pub(crate) fn greet(mut stream: S, flags: u32) -> Self {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
        stream.write_all(&flags.to_be_bytes()).unwrap();
        Self { stream, style: Style::Simple }
    }

    /// All replies to an option, the last being the one that ends it; none if the server hangs up.
    pub(crate) fn option(&mut self, code: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        // It may have hung up before; then there is no reply either.
        let _ = self.stream.write_all(&option(code, data));
        let mut replies = Vec::new();
        while let Some(reply) = option_reply(&mut self.stream, code) {
            replies.push(reply);
            if replies.last().is_some_and(|(kind, _)| *kind == 1 || kind >> 31 == 1) {
                break;
            }
        }
        replies
    }

    /// What ends the replies to an option.
    pub(crate) fn verdict(&mut self, code: u32, data: &[u8]) -> Option<u32> {
        self.option(code, data).last().map(|(kind, _)| *kind)
    }

    /// Asks for a style of replies and chooses an export.
    pub(crate) fn go(&mut self, style: Style, name: &str) {
        match style {
            Style::Simple => {}
            Style::Structured => assert_eq!(self.verdict(8, &[]), Some(1)),
            Style::Extended => assert_eq!(self.verdict(11, &[]), Some(1)),
        }
        self.style = style;
        assert_eq!(self.verdict(7, &info_data(name, &[])), Some(1));
    }

    /// Sends a request and its payload.
    pub(crate) fn send(&mut self, cookie: u64, ask: Ask, payload: &[u8]) {
        self.stream.write_all(&[&request(self.style, cookie, ask)[..], payload].concat()).unwrap();
    }

    /// Sends a request and reads its reply, which is the next one.
    pub(crate) fn ask(&mut self, flags: u16, command: u16, offset: u64, len: u64) -> Option<Answer> {
        self.ask_with(Ask { flags, command, offset, len }, &[])
    }

    /// The same with a payload.
    pub(crate) fn ask_with(&mut self, ask: Ask, payload: &[u8]) -> Option<Answer> {
        self.send(77, ask, payload);
        let len = if ask.command == command::READ { ask.len as usize } else { 0 };
        let answer = answer(&mut self.stream, |_| len)?;
        assert_eq!(answer.cookie, 77);
        Some(answer)
    }

    /// The error that a request is answered with, 0 for none.
    pub(crate) fn error(&mut self, flags: u16, command: u16, offset: u64, len: u64) -> u32 {
        self.ask(flags, command, offset, len).unwrap().error
    }
}
