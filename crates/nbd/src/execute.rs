//! Requests, executed on the disk and answered ("Request types").

use std::io::{self, IoSlice};

use block::{ByteRange, Error, ErrorKind, Extent, Result, Source, blocking, write_disk};

use crate::context::{Extents, holes};
use crate::negotiate::MAX_PAYLOAD;
use crate::proto::Errno;
use crate::proto::reply::{Style, To};
use crate::proto::request::{Command, Request, flag};
use crate::transmit::{PIECE, Transmission};
use crate::wire::Incoming;

/// What is told to a client.
type Answer<T> = std::result::Result<T, Errno>;

/// Zeroes between data that are fewer are sent as data: to name them costs more.
const MIN_HOLE: u64 = 4096;
/// Pieces of a host file that are shorter are read without asking where its holes are: to ask costs more than to read.
const MIN_SEARCH: u64 = 64 * 1024;
/// Runs of status in one chunk: a quarter of a MiB of them.
const MAX_EXTENTS: usize = 16 * 1024;
/// How much is trimmed or zeroed at once, so that a connection that is cut off ends soon.
const ZERO_STEP: u64 = 64 << 20;

/// Where a piece of data is in a thread's buffer, or that it is a hole.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Chunk {
    Data { at: usize, len: usize },
    Hole { at: usize, len: usize },
}

/// What is still to be done once a payload is read.
#[derive(Debug)]
pub(crate) struct Last {
    /// How the request fares so far.
    result: Answer<()>,
    /// The last piece of the payload, which is in the buffer: its offset in the export, and its length.
    offset: u64,
    len: usize,
}

impl Transmission {
    /// Whether the request can be executed at all ("Request types", "Block size constraints").
    fn check(&self, request: &Request) -> Answer<()> {
        let writes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
        if !request.valid || matches!(request.command, Command::Unknown(_) | Command::Disconnect) {
            return Err(Errno::Invalid);
        }
        if writes && !self.export.writable() {
            return Err(Errno::NotPermitted);
        }
        let moves_bytes = matches!(request.command, Command::Read | Command::Write | Command::Cache);
        if moves_bytes && request.len > u64::from(MAX_PAYLOAD) {
            return Err(Errno::Invalid);
        }
        match ByteRange::new(request.offset, request.len) {
            _ if request.command == Command::Flush => Ok(()),
            Some(range) if range.is_within(self.size) => Ok(()),
            _ if writes => Err(Errno::NoSpace),
            _ => Err(Errno::Invalid),
        }
    }

    fn to(&self, request: &Request) -> To {
        To { style: self.style, cookie: request.cookie, offset: request.offset }
    }

    /// Reads what follows the request, and writes all but its last piece. Nothing of the disk is held while the client
    /// sends.
    pub(crate) fn receive_payload(
        &self,
        request: &Request,
        incoming: &mut Incoming,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Last> {
        let mut last = Last { result: self.check(request), offset: request.offset, len: 0 };
        if request.payload > u64::from(MAX_PAYLOAD) {
            // It is told why; then the connection must go, for what it sends is no request.
            self.reply(self.to(request), Err(Errno::Invalid))?;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a payload of more than 32 MiB"));
        }
        let mut left = request.payload;
        while left > 0 {
            last = self.write_last(last, buffer);
            let piece = room(buffer, left.min(PIECE));
            last.len = piece.len();
            left -= piece.len() as u64;
            if !self.wire.receive(incoming, piece)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(last)
    }

    /// Writes the piece that is in the buffer, unless something has failed before.
    fn write_last(&self, last: Last, buffer: &[u8]) -> Last {
        let piece = buffer.get(..last.len).unwrap_or_default();
        let result = match last.result {
            Ok(()) if !piece.is_empty() => {
                write_disk(&**self.export.disk(), last.offset, piece).map_err(|error| self.failed(&error))
            }
            before => before,
        };
        // A request that fails may lie anywhere, so its end may be no number.
        Last { result, offset: last.offset.saturating_add(piece.len() as u64), len: 0 }
    }

    /// Does what the request asks for, and answers it. An error is one of the connection, and ends it.
    pub(crate) fn execute(&self, request: &Request, last: Last, buffer: &mut Vec<u8>) -> io::Result<()> {
        let to = self.to(request);
        let range = ByteRange { offset: request.offset, len: request.len };
        if let Err(errno) = last.result {
            return self.reply(to, Err(errno));
        }
        match request.command {
            Command::Read => self.read(to, range, request.has(flag::DF), buffer),
            Command::BlockStatus => self.block_status(to, range, request.has(flag::REQ_ONE)),
            _ => self.reply(to, self.change(request, range, last, buffer)),
        }
    }

    /// The commands that return nothing but whether they have succeeded.
    fn change(&self, request: &Request, range: ByteRange, last: Last, buffer: &mut Vec<u8>) -> Answer<()> {
        let disk = &**self.export.disk();
        let unmap = !request.has(flag::NO_HOLE);
        match request.command {
            Command::Write => self.write_last(last, buffer).result,
            Command::Trim => self.in_steps(range, |step| blocking(|waker| disk.discard(step, waker))),
            Command::WriteZeroes => {
                self.in_steps(range, |step| blocking(|waker| disk.write_zeroes(step, unmap, waker)))
            }
            Command::Cache => return self.cache(range, buffer),
            Command::Flush => return disk.flush().run().map_err(|error| self.failed(&error)),
            _ => return Err(Errno::Invalid),
        }?;
        match request.has(flag::FUA) || self.export.writethrough() {
            true => disk.flush().run().map_err(|error| self.failed(&error)),
            false => Ok(()),
        }
    }

    fn in_steps(&self, range: ByteRange, mut change: impl FnMut(ByteRange) -> Result<()>) -> Answer<()> {
        for step in steps(range, ZERO_STEP) {
            change(step).map_err(|error| self.failed(&error))?;
        }
        Ok(())
    }

    /// Brings the bytes into the host's page cache, by reading them.
    fn cache(&self, range: ByteRange, buffer: &mut Vec<u8>) -> Answer<()> {
        for step in steps(range, PIECE) {
            self.fill(step, room(buffer, step.len), true)?;
        }
        Ok(())
    }

    fn read(&self, to: To, range: ByteRange, whole: bool, buffer: &mut Vec<u8>) -> io::Result<()> {
        if range.len == 0 {
            return self.reply(to, Ok(()));
        }
        if range.len > PIECE && (whole || to.style == Style::Simple) {
            return self.read_whole(to, range, buffer);
        }
        for piece in steps(range, PIECE) {
            let done = piece.end() == range.end();
            let bytes = room(buffer, piece.len);
            let mut head = Vec::new();
            let chunks = match self.fill(piece, bytes, !whole && to.style != Style::Simple) {
                Ok(chunks) => chunks,
                Err(errno) => return self.reply(to, Err(errno)),
            };
            let ends = push_heads(&mut head, to, piece, &chunks, done);
            let mut parts = interleave(&head, &ends, &chunks, bytes);
            self.send(&mut parts)?;
        }
        Ok(())
    }

    /// Reads what must be sent in one chunk and is longer than a buffer. It is read while it is sent, so nothing else of
    /// this connection is sent meanwhile.
    fn read_whole(&self, to: To, range: ByteRange, buffer: &mut Vec<u8>) -> io::Result<()> {
        let mut outgoing = self.outgoing();
        let mut head = Vec::new();
        match to.style {
            Style::Simple => to.push_simple(&mut head, Ok(())),
            _ => to.push_data(&mut head, range.offset, range.len, false),
        }
        let mut result = Ok(());
        for piece in steps(range, PIECE) {
            let bytes = room(buffer, piece.len);
            if result.is_ok() {
                result = self.fill(piece, bytes, false).map(|_| ());
            }
            if result.is_err() {
                if to.style == Style::Simple {
                    // It was told to have succeeded: only hanging up says otherwise.
                    return Err(io::Error::other("a read failed in the middle of its reply"));
                }
                bytes.fill(0);
            }
            self.wire.send(&mut outgoing, &mut [IoSlice::new(&head), IoSlice::new(bytes)])?;
            head.clear();
        }
        if to.style != Style::Simple {
            to.push_end(&mut head, result);
            self.wire.send(&mut outgoing, &mut [IoSlice::new(&head)])?;
        }
        Ok(())
    }

    /// Reads `range` to its place in `bytes`, as long as it is, but for holes, if they may be `sparse`.
    fn fill(&self, range: ByteRange, bytes: &mut [u8], sparse: bool) -> Answer<Vec<Chunk>> {
        let mut found = Vec::new();
        let resolved = self.export.disk().resolve_read(range, &mut found);
        resolved.map_err(|error| self.failed(&error))?;
        let mut filling = Filling { bytes, at: 0, chunks: Vec::new() };
        for extent in &found {
            filling.extent(extent, sparse).map_err(|error| self.failed(&error))?;
        }
        // A disk that told of less than it was asked for.
        if filling.at == filling.bytes.len() { Ok(filling.chunks) } else { Err(Errno::Io) }
    }

    fn block_status(&self, to: To, range: ByteRange, one: bool) -> io::Result<()> {
        if self.contexts.is_empty() || range.len == 0 {
            return self.reply(to, Err(Errno::Invalid));
        }
        let max = if one { 1 } else { MAX_EXTENTS };
        for (id, context) in self.contexts.iter().enumerate() {
            let mut extents = Extents::new(range.len, max);
            let told = context.describe(range, &mut extents);
            if let Err(errno) = told.map_err(|error| self.failed(&error)) {
                return self.reply(to, Err(errno));
            }
            if extents.list().is_empty() {
                // It is always right to know nothing.
                let _ = extents.push(range.len, 0);
            }
            let mut out = Vec::new();
            to.push_status(&mut out, id as u32, extents.list(), id + 1 == self.contexts.len());
            self.send(&mut [IoSlice::new(&out)])?;
        }
        Ok(())
    }

    fn reply(&self, to: To, result: Answer<()>) -> io::Result<()> {
        let mut out = Vec::with_capacity(64);
        to.push_end(&mut out, result);
        self.send(&mut [IoSlice::new(&out)])
    }

    /// The story is for us; the client is told no more than the kind.
    fn failed(&self, error: &Error) -> Errno {
        match error.kind() {
            ErrorKind::Io | ErrorKind::Corrupt | ErrorKind::Latched => {
                tracing::warn!(export = self.export.name(), %error, "a request of an NBD client failed");
            }
            _ => tracing::debug!(export = self.export.name(), %error, "refused a request of an NBD client"),
        }
        error.kind().into()
    }
}

/// Bytes of a disk on their way to a buffer.
struct Filling<'a> {
    bytes: &'a mut [u8],
    /// So many are there.
    at: usize,
    chunks: Vec<Chunk>,
}

impl Filling<'_> {
    /// The next extent: read, but for its holes if they may be `sparse`.
    fn extent(&mut self, extent: &Extent, sparse: bool) -> Result<()> {
        let len = extent.len;
        match &extent.source {
            Source::Zero => self.hole(len, sparse),
            Source::File { storage, offset } if sparse && len >= MIN_SEARCH => {
                holes(&**storage, ByteRange { offset: *offset, len }, |part, is_hole| {
                    match is_hole {
                        true => self.hole(part.len, sparse)?,
                        false => self.data(part.len, |bytes| storage.read_at(bytes, part.offset))?,
                    }
                    Ok(true)
                })
            }
            Source::File { storage, offset } => self.data(len, |bytes| storage.read_at(bytes, *offset)),
            Source::Bytes { bytes, offset } => self.data(len, |part| {
                let found = bytes.get(*offset..).and_then(|bytes| bytes.get(..part.len()));
                let too_short = || Error::new(ErrorKind::Corrupt, "an extent is longer than its bytes");
                part.copy_from_slice(found.ok_or_else(too_short)?);
                Ok(())
            }),
        }
    }

    fn hole(&mut self, len: u64, sparse: bool) -> Result<()> {
        match sparse && len >= MIN_HOLE {
            true => self.add(len, true, |_| Ok(())),
            false => self.data(len, |part| {
                part.fill(0);
                Ok(())
            }),
        }
    }

    fn data(&mut self, len: u64, load: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        self.add(len, false, load)
    }

    fn add(&mut self, len: u64, is_hole: bool, load: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        let too_long = || Error::new(ErrorKind::Corrupt, "a disk told of more than it was asked for");
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        let part = end.and_then(|end| self.bytes.get_mut(self.at..end)).ok_or_else(too_long)?;
        load(part)?;
        let len = part.len();
        push_chunk(&mut self.chunks, self.at, len, is_hole);
        self.at += len;
        Ok(())
    }
}

/// The beginning of the buffer, `len` bytes; it grows to no more than a piece.
fn room(buffer: &mut Vec<u8>, len: u64) -> &mut [u8] {
    let len = len.min(PIECE) as usize;
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}

/// `range` in steps of at most `step` bytes.
fn steps(range: ByteRange, step: u64) -> impl Iterator<Item = ByteRange> {
    (0..range.len.div_ceil(step)).map(move |number| {
        let from = number * step;
        ByteRange { offset: range.offset + from, len: step.min(range.len - from) }
    })
}

/// One more piece; neighbours alike are one chunk.
fn push_chunk(chunks: &mut Vec<Chunk>, at: usize, len: usize, is_hole: bool) {
    match (chunks.last_mut(), is_hole) {
        _ if len == 0 => {}
        (Some(Chunk::Hole { len: last, .. }), true) | (Some(Chunk::Data { len: last, .. }), false) => {
            *last += len;
        }
        (_, true) => chunks.push(Chunk::Hole { at, len }),
        (_, false) => chunks.push(Chunk::Data { at, len }),
    }
}

/// Appends the heads of all chunks, holes being nothing else; returns where each ends.
fn push_heads(out: &mut Vec<u8>, to: To, piece: ByteRange, chunks: &[Chunk], done: bool) -> Vec<usize> {
    let mut ends = Vec::with_capacity(chunks.len());
    for (index, chunk) in chunks.iter().enumerate() {
        let done = done && index + 1 == chunks.len();
        match (*chunk, to.style) {
            // The reply has but one chunk, which has no head of its own.
            (_, Style::Simple) => to.push_simple(out, Ok(())),
            (Chunk::Data { at, len }, _) => {
                to.push_data(out, piece.offset + at as u64, len as u64, done);
            }
            (Chunk::Hole { at, len }, _) => to.push_hole(out, piece.offset + at as u64, len as u32, done),
        }
        ends.push(out.len());
    }
    ends
}

/// Heads and data in the order in which they are sent.
fn interleave<'a>(heads: &'a [u8], ends: &[usize], chunks: &[Chunk], bytes: &'a [u8]) -> Vec<IoSlice<'a>> {
    let mut parts = Vec::with_capacity(2 * chunks.len());
    let mut start = 0;
    for (chunk, &end) in chunks.iter().zip(ends) {
        parts.push(IoSlice::new(&heads[start..end]));
        if let Chunk::Data { at, len } = *chunk {
            parts.push(IoSlice::new(&bytes[at..at + len]));
        }
        start = end;
    }
    parts
}
