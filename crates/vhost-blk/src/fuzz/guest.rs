//! What a plain reading of the specification says a device does with a guest's memory and its disk, in memory and one
//! request after the other (virtio 1.3, sections 2.7 and 5.2.6).

use block::SECTOR;

use crate::config::{MAX_DATA, MAX_ZERO_SECTORS};
use crate::engine::ID_LEN;
use crate::guest::MAX_IOVECS;

/// The guest's memory, by address and length: two pieces that touch, and one behind a hole.
pub(super) const REGIONS: [(u64, usize); 3] = [(0, 0x2000), (0x2000, 0x1000), (0x4000, 0x1000)];
/// Bytes in it.
pub(super) const MEMORY: usize = 0x4000;
/// Where the ring is, unless it is anywhere.
pub(super) const AVAIL: u64 = 0x100;
pub(super) const USED: u64 = 0x140;
/// Entries of the ring, at most: of more, some could be answered before others are begun, as time has it.
pub(super) const MAX_SIZE: u16 = 4;
/// Rounds of the ring that are followed. A guest may have its own disk write new requests into the ring, for ever.
const MAX_ROUNDS: usize = 32;

pub(super) const SERIAL: [u8; ID_LEN] = *b"frazil's serial 0123";

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A piece of memory, as a descriptor names it.
type Piece = (u64, u32);

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// What is asked for; offsets and lengths in bytes.
enum Asked {
    Read(u64, u64),
    Write(u64, u64),
    Zero(u64, u64),
    Flush,
    Id,
}

/// A request that was taken from the ring: the answer that it has already, or what is to be done.
struct Taken {
    head: u16,
    status_at: Option<u64>,
    asked: Result<Asked, u8>,
    data: Vec<Piece>,
}

/// A guest and its disk.
pub(super) struct Model {
    pub(super) memory: Vec<u8>,
    pub(super) disk: Vec<u8>,
    pub(super) read_only: bool,
    pub(super) size: u16,
    next_avail: u16,
    next_used: u16,
}

/// Where in all bytes of memory `len` bytes from `addr` on are, if they are in one run.
fn place(addr: u64, len: usize) -> Option<usize> {
    let end = addr.checked_add(len as u64)?;
    match end {
        _ if len == 0 => Some(0),
        _ if end <= 0x3000 => Some(addr as usize),
        _ if addr >= 0x4000 && end <= 0x5000 => Some(addr as usize - 0x1000),
        _ => None,
    }
}

impl Model {
    /// The device goes on where the used ring is.
    pub(super) fn new(memory: Vec<u8>, disk: Vec<u8>, read_only: bool, size: u16) -> Self {
        let mut model = Self { memory, disk, read_only, size, next_avail: 0, next_used: 0 };
        model.next_used = model.number(USED + 2);
        model
    }

    fn bytes(&self, addr: u64, len: usize) -> Option<&[u8]> {
        place(addr, len).map(|at| &self.memory[at..at + len])
    }

    fn number(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.bytes(addr, 2).unwrap().try_into().unwrap())
    }

    fn put(&mut self, addr: u64, bytes: &[u8]) -> bool {
        let at = place(addr, bytes.len());
        at.inspect(|at| self.memory[*at..*at + bytes.len()].copy_from_slice(bytes)).is_some()
    }

    /// Works off the ring; `false` if it has no end.
    pub(super) fn run(&mut self) -> bool {
        for _ in 0..MAX_ROUNDS {
            let waiting = self.number(AVAIL + 2).wrapping_sub(self.next_avail);
            // "Do not kick", while there is something to do. With too much of it the device waits for better times.
            self.put(USED, &u16::from(waiting > 0).to_le_bytes());
            if waiting == 0 || waiting > self.size {
                return true;
            }
            let taken: Vec<_> = (0..waiting).map(|_| self.take()).collect();
            let done: Vec<_> = taken.into_iter().map(|taken| self.carry_out(taken)).collect();
            for (head, status_at, status, written) in done {
                self.answer(head, status_at, status, written);
            }
        }
        false
    }

    fn take(&mut self) -> Taken {
        let head = self.number(AVAIL + 4 + 2 * u64::from(self.next_avail % self.size));
        self.next_avail = self.next_avail.wrapping_add(1);
        let Some((readable, writable)) = self.chain(head) else {
            return Taken { head, status_at: None, asked: Err(IO_ERROR), data: Vec::new() };
        };
        let (writable, status_at) = without_last_byte(writable);
        let header = split(readable, 16).and_then(|(header, rest)| Some((self.gather(&header)?, rest)));
        let (asked, data) = match (status_at, header) {
            (Some(_), Some((header, readable))) => self.parse(&header, readable, writable),
            _ => (Err(IO_ERROR), Vec::new()),
        };
        let iovecs: usize = data.iter().map(slices).sum();
        let is_there = iovecs <= MAX_IOVECS && data.iter().all(|piece| self.is_memory(*piece));
        Taken { head, status_at, asked: if is_there { asked } else { Err(IO_ERROR) }, data }
    }

    /// The readable and writable descriptors of a chain; `None` if it has no sound end.
    fn chain(&self, head: u16) -> Option<(Vec<Piece>, Vec<Piece>)> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let (mut table, mut size, mut index, mut indirect) = (0_u64, self.size, head, false);
        let (mut count, mut total) = (0_u32, 0_u64);
        loop {
            let mut found = self.descriptor(table, size, index)?;
            if found.flags & INDIRECT != 0 {
                let entries = u16::try_from(found.len / 16).ok()?;
                if indirect || found.len % 16 != 0 {
                    return None;
                }
                (table, size, count, indirect) = (found.addr, entries, 0, true);
                found = self.descriptor(table, size, 0)?;
                if found.flags & INDIRECT != 0 {
                    return None;
                }
            }
            (count, total) = (count + 1, total + u64::from(found.len));
            let is_write = found.flags & WRITE != 0;
            let turns_back = !is_write && !writable.is_empty();
            if count > u32::from(size) || total > u64::from(u32::MAX) || turns_back {
                return None;
            }
            if is_write { &mut writable } else { &mut readable }.push((found.addr, found.len));
            if readable.len() + writable.len() > MAX_IOVECS + 1 {
                return None;
            }
            if found.flags & NEXT == 0 {
                return Some((readable, writable));
            }
            index = found.next;
        }
    }

    fn descriptor(&self, table: u64, size: u16, index: u16) -> Option<Descriptor> {
        if index >= size {
            return None;
        }
        let bytes = self.bytes(table.checked_add(u64::from(index) * 16)?, 16)?;
        Some(Descriptor {
            addr: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
            flags: u16::from_le_bytes(bytes[12..14].try_into().unwrap()),
            next: u16::from_le_bytes(bytes[14..].try_into().unwrap()),
        })
    }

    fn parse(
        &self,
        header: &[u8],
        readable: Vec<Piece>,
        writable: Vec<Piece>,
    ) -> (Result<Asked, u8>, Vec<Piece>) {
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        match kind {
            0 if total(&readable) == 0 => {
                (range(sector, total(&writable), MAX_DATA).map(|(at, len)| Asked::Read(at, len)), writable)
            }
            1 if total(&writable) == 0 => {
                (range(sector, total(&readable), MAX_DATA).map(|(at, len)| Asked::Write(at, len)), readable)
            }
            0 | 1 => (Err(IO_ERROR), Vec::new()),
            4 => (Ok(Asked::Flush), Vec::new()),
            8 => (Ok(Asked::Id), writable),
            11 => (self.zeroes(readable, 0), Vec::new()),
            13 => (self.zeroes(readable, 1), Vec::new()),
            _ => (Err(UNSUPPORTED), Vec::new()),
        }
    }

    /// The one range of a discard or write-zeroes, which may have the flags up to `most`.
    fn zeroes(&self, readable: Vec<Piece>, most: u32) -> Result<Asked, u8> {
        let (range_at, rest) = split(readable, 16).ok_or(IO_ERROR)?;
        let bytes = self.gather(&range_at).filter(|_| total(&rest) == 0).ok_or(IO_ERROR)?;
        let sectors = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let sector = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let flags = u32::from_le_bytes(bytes[12..].try_into().unwrap());
        let found = range(sector, u64::from(sectors) * SECTOR, u64::from(MAX_ZERO_SECTORS) * SECTOR)?;
        if flags > most { Err(UNSUPPORTED) } else { Ok(Asked::Zero(found.0, found.1)) }
    }

    fn is_memory(&self, (addr, len): Piece) -> bool {
        place(addr, len as usize).is_some()
    }

    fn gather(&self, pieces: &[Piece]) -> Option<Vec<u8>> {
        let parts: Option<Vec<_>> =
            pieces.iter().map(|(addr, len)| self.bytes(*addr, *len as usize)).collect();
        parts.map(|parts| parts.concat())
    }

    fn scatter(&mut self, pieces: &[Piece], bytes: &[u8]) -> usize {
        let mut rest = bytes;
        for (addr, len) in pieces {
            let (now, after) = rest.split_at(rest.len().min(*len as usize));
            assert!(self.put(*addr, now));
            rest = after;
        }
        bytes.len() - rest.len()
    }

    /// The part of the disk, if it may be asked for it.
    fn part(&self, offset: u64, len: u64, change: bool) -> Result<std::ops::Range<usize>, u8> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.disk.len() as u64);
        match inside && !(change && self.read_only) {
            true => Ok(offset as usize..(offset + len) as usize),
            false => Err(IO_ERROR),
        }
    }

    fn carry_out(&mut self, taken: Taken) -> (u16, Option<u64>, u8, usize) {
        let Taken { head, status_at, asked, data } = taken;
        let done = asked.and_then(|asked| {
            match asked {
                Asked::Read(offset, len) => {
                    let bytes = self.disk[self.part(offset, len, false)?].to_vec();
                    return Ok(self.scatter(&data, &bytes));
                }
                Asked::Write(offset, len) => {
                    let part = self.part(offset, len, true)?;
                    let bytes = self.gather(&data).unwrap();
                    self.disk[part].copy_from_slice(&bytes);
                }
                Asked::Zero(offset, len) => {
                    let part = self.part(offset, len, true)?;
                    self.disk[part].fill(0);
                }
                Asked::Id => return Ok(self.scatter(&data, &SERIAL)),
                Asked::Flush => {}
            }
            Ok(0)
        });
        let (status, written) = done.map_or_else(|status| (status, 0), |written| (OK, written));
        (head, status_at, status, written)
    }

    /// The status, then the used ring: nothing was written that the driver may rely on, if the status could not be.
    fn answer(&mut self, head: u16, status_at: Option<u64>, status: u8, written: usize) {
        let told = status_at.is_some_and(|addr| self.put(addr, &[status]));
        if head >= self.size {
            return;
        }
        let len = if told { written as u32 + 1 } else { 0 };
        let entry = [u32::from(head), len].map(u32::to_le_bytes).concat();
        assert!(self.put(USED + 4 + 8 * u64::from(self.next_used % self.size), &entry));
        self.next_used = self.next_used.wrapping_add(1);
        self.put(USED + 2, &self.next_used.to_le_bytes());
    }
}

fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|(_, len)| u64::from(*len)).sum()
}

/// How many pieces of mapped memory it is.
fn slices((addr, len): &Piece) -> usize {
    let crosses = *addr < 0x2000 && addr + u64::from(*len) > 0x2000;
    usize::from(*len > 0) + usize::from(crosses)
}

/// The first `count` bytes of the pieces, and what is left; `None` if they are less.
fn split(pieces: Vec<Piece>, count: u32) -> Option<(Vec<Piece>, Vec<Piece>)> {
    let (mut front, mut back, mut left) = (Vec::new(), Vec::new(), count);
    for (addr, len) in pieces {
        let now = len.min(left);
        front.push((addr, now));
        // What is not memory was refused before anybody could look behind it.
        back.push((addr.saturating_add(u64::from(now)), len - now));
        left -= now;
    }
    (left == 0).then_some((front, back))
}

/// The pieces without their last byte, and where that is.
fn without_last_byte(mut pieces: Vec<Piece>) -> (Vec<Piece>, Option<u64>) {
    while let Some((addr, len)) = pieces.pop() {
        if len > 0 {
            pieces.push((addr, len - 1));
            return (pieces, addr.checked_add(u64::from(len - 1)));
        }
    }
    (pieces, None)
}

/// Whole sectors, some, and no more than `most` bytes.
fn range(sector: u64, len: u64, most: u64) -> Result<(u64, u64), u8> {
    let offset = sector.checked_mul(SECTOR).filter(|offset| offset.checked_add(len).is_some());
    let sound = len > 0 && len.is_multiple_of(SECTOR) && len <= most;
    offset.filter(|_| sound).map(|offset| (offset, len)).ok_or(IO_ERROR)
}
