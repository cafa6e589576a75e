//! The bodies of the fuzz targets: each takes any bytes, and panics if the server does other than a plain model of it.
//!
//! `fuzz/` hands them to libFuzzer; the tests here run them for a moment on mutated seeds, so that they stay true.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a panic is how a fuzz target speaks"
)]

mod model;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use block::testing::MemStorage;
use block::{DirtyBitmap, RawDisk};

use crate::context::{BitmapContext, MetaContext};
use crate::export::{Export, Exports};
use crate::negotiate::{Negotiator, Outcome, Tls};
use crate::proto::reply::Style;
use crate::testing::{answer, option_reply, request};
use crate::transmit::{PIECE, Spare, Terms, Transmission};
use crate::wire::{Incoming, Outgoing, Socket, Wire};
use model::Model;

/// A fuzz target's body.
pub type Target = fn(&[u8]);

/// All targets, by the names that they have in `fuzz/`.
pub const TARGETS: [(&str, Target); 2] = [("nbd_negotiation", negotiation), ("nbd_requests", requests)];

/// Bytes of the disk: more than are done in one piece.
const SIZE: usize = PIECE as usize + 65536 + 512;
/// So many requests are taken from one input.
const MAX_REQUESTS: usize = 64;

/// What a client says, and what it is told.
struct Talk<'a> {
    said: &'a [u8],
    told: Vec<u8>,
}

impl Read for Talk<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.said.read(buf)
    }
}

impl Write for Talk<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.told.extend(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Each option that was said in whole is answered, in order, with any number of replies and one that ends them; and where
/// TLS is required, with nothing that tells of exports.
pub fn negotiation(data: &[u8]) {
    let Some((mode, said)) = data.split_first() else { return };
    let tls = [Tls::None, Tls::Required, Tls::Active][usize::from(mode % 3)];
    let exports = Exports::default();
    let disk = RawDisk::new(Arc::new(MemStorage::new(SIZE)), true).unwrap();
    let bitmap = Arc::new(DirtyBitmap::new(SIZE as u64, 16).unwrap());
    let context = Arc::new(BitmapContext::new("b0", bitmap));
    exports.add(Export::new("a", Arc::new(disk)).description("secret").context(context)).unwrap();
    let mut talk = Talk { said, told: Vec::new() };
    let outcome = Negotiator::new(&exports, tls).run(&mut talk);
    let mut told = &talk.told[18..];
    for (code, data) in model::options(said) {
        loop {
            let Some((kind, payload)) = option_reply(&mut told, code) else {
                // Only what can not be answered, or what comes once nothing can go wrong any more, is missing.
                let ends = matches!(outcome, Err(_) | Ok(Outcome::Chosen(_)));
                return assert!(ends && matches!(code, 1 | 7), "option {code} was not answered");
            };
            if tls == Tls::Required {
                let allowed =
                    matches!((code, kind), (2 | 5, 1) | (_, 0x8000_0003 | 0x8000_0005 | 0x8000_0009));
                assert!(allowed && payload.is_empty(), "option {code} was answered {kind:#x} before TLS");
            }
            match kind {
                1 if code == 2 => return assert!(matches!(outcome, Ok(Outcome::End))),
                1 if code == 5 => {
                    return assert!(matches!(outcome, Ok(Outcome::StartTls)) && data.is_empty());
                }
                1 => break,
                _ if kind >> 31 == 1 => break,
                _ => {}
            }
        }
    }
    assert!(told.is_empty(), "more was told than was asked");
}

/// Requests do to the disk, and are told, what a plain reading of the specification says.
pub fn requests(data: &[u8]) {
    let mut model = Model::new(data);
    let storage = Arc::new(MemStorage::from(model.bytes.clone()));
    let disk = Arc::new(RawDisk::new(Arc::clone(&storage) as _, false).unwrap());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (style, export) = (model.style, Export::new("a", disk));
    let export = if model.writable { export.writable() } else { export };
    let server = std::thread::spawn(move || serve(theirs, style, export));
    converse(ours, &mut model);
    server.join().unwrap();
    assert!(storage.bytes() == model.bytes, "the disk holds something else");
}

/// Without threads to spare, requests are executed one after the other.
fn serve(stream: UnixStream, style: Style, export: Export) {
    let exports = Exports::default();
    exports.add(export).unwrap();
    let (export, socket) = (exports.find("a").unwrap(), Arc::new(Socket::Unix(stream)));
    let export = exports.enter(&export, 0, &socket).unwrap();
    let contexts: Vec<Arc<dyn MetaContext>> = match style {
        Style::Simple => Vec::new(),
        _ => export.contexts().to_vec(),
    };
    let mut incoming = Incoming::default();
    let wire = Wire::new(socket, Duration::from_secs(20));
    wire.begin_transmission(&mut incoming).unwrap();
    let terms = Terms { export, style, contexts, size: SIZE as u64 };
    Transmission::serve(wire, incoming, Outgoing::default(), terms, Arc::new(Spare::new(0)));
}

fn converse(mut stream: UnixStream, model: &mut Model<'_>) {
    for cookie in 0..MAX_REQUESTS as u64 {
        let Some((ask, payload)) = model.next() else { break };
        let expected = model.execute(ask, &payload);
        let bytes = [&request(model.style, cookie, ask)[..], &payload].concat();
        // A payload that is too long is refused before it is sent in whole.
        let _ = stream.write_all(&bytes);
        let is_read = ask.command == crate::testing::command::READ;
        let found = answer(&mut stream, |_| if is_read { ask.len as usize } else { 0 }).unwrap();
        assert_eq!((found.cookie, found.error), (cookie, expected.err().unwrap_or(0)), "{ask:?}");
        if found.error == 0 && is_read {
            let (from, len) = (ask.offset as usize, ask.len as usize);
            let base = if model.style == Style::Simple { 0 } else { ask.offset };
            assert!(found.bytes(base, len) == model.bytes[from..from + len], "{ask:?} read something else");
        }
        for (_, list) in found.status {
            let total: u64 = list.iter().map(|(len, _)| len).sum();
            assert_eq!(total, ask.len, "{ask:?} was told of something else");
        }
    }
    let _ = stream.write_all(model.rest());
}
