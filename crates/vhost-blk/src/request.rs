//! Reading requests out of descriptor chains, as from an enemy (virtio 1.3, sections 2.7 and 5.2.6).
//!
//! ```text
//!   readable descriptors                 writable descriptors
//!  ┌────────────┬──────────────────┐    ┌──────────────────┬────────┐
//!  │ header, 16 │ data to write    │    │ data to read     │ status │
//!  └────────────┴──────────────────┘    └──────────────────┴────────┘
//! ```
//! How the bytes are cut into descriptors means nothing (section 2.7.4.1), so the header may span several, and the
//! status is the last writable byte wherever it is. Each descriptor is read once. The data is not looked at here.

use block::{ByteRange, SECTOR};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::chain::Chain;
use crate::config::{MAX_DATA, MAX_ZERO_SECTORS};
use crate::guest::{MAX_IOVECS, Memory, Segment};

const HEADER: usize = 16;

/// How a request ended, as the status byte says it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    #[default]
    IoError = 1,
    Unsupported = 2,
}

/// What is asked for. Ranges are whole sectors, not empty, and their ends are numbers; whether they are on the disk is
/// for the disk to say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Op {
    Read(ByteRange),
    Write(ByteRange),
    Flush,
    Discard(ByteRange),
    WriteZeroes {
        range: ByteRange,
        unmap: bool,
    },
    /// The serial.
    Id,
    /// Nothing but this answer.
    Refuse(Status),
}

/// A chain's descriptors; used again for every request.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

/// A request, and where its status goes. Its data is in the [`Segments`].
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Request {
    pub(crate) op: Op,
    /// `None` if the chain had no sound end, so that nothing can be answered.
    pub(crate) status: Option<GuestAddress>,
}

impl Segments {
    /// Reads one chain. Afterwards [`data`](Self::data) is the request's data.
    pub(crate) fn read(&mut self, memory: &Memory, chain: Chain<'_>) -> Request {
        if !self.collect(chain) {
            return Request { op: Op::Refuse(Status::IoError), status: None };
        }
        let status = self.take_status();
        let refused = |status| Op::Refuse(status);
        let op = match (status, self.take_header(memory)) {
            (None, _) | (_, None) => refused(Status::IoError),
            (Some(_), Some((kind, sector))) => self.op(memory, kind, sector).unwrap_or_else(refused),
        };
        Request { op, status }
    }

    /// The request's data: what is to be written to the disk, or where to put what was read.
    pub(crate) fn data(&self, op: &Op) -> &[Segment] {
        match op {
            Op::Read(_) | Op::Id => &self.writable,
            Op::Write(_) => &self.readable,
            _ => &[],
        }
    }

    /// Follows the chain to its end; `false` if it has none, or is too long, or turns back from writable to readable.
    fn collect(&mut self, chain: Chain<'_>) -> bool {
        self.readable.clear();
        self.writable.clear();
        let mut ended = false;
        for (index, descriptor) in chain.enumerate() {
            if index > MAX_IOVECS {
                return false;
            }
            ended = !descriptor.has_next();
            let segment = Segment { addr: descriptor.addr(), len: descriptor.len() };
            if descriptor.is_write_only() {
                self.writable.push(segment);
            } else if self.writable.is_empty() {
                self.readable.push(segment);
            } else {
                return false;
            }
        }
        ended
    }

    /// Takes the last writable byte.
    fn take_status(&mut self) -> Option<GuestAddress> {
        while let Some(last) = self.writable.last_mut() {
            let Some(rest) = last.len.checked_sub(1) else {
                self.writable.pop();
                continue;
            };
            let status = last.addr.checked_add(u64::from(rest));
            last.len = rest;
            return status;
        }
        None
    }

    /// Takes the first 16 readable bytes: the kind of request and the sector.
    fn take_header(&mut self, memory: &Memory) -> Option<(u32, u64)> {
        let bytes: [u8; HEADER] = self.take_readable(memory)?;
        let (kind, rest) = bytes.split_first_chunk()?;
        let (_, sector) = rest.split_last_chunk()?;
        Some((u32::from_le_bytes(*kind), u64::from_le_bytes(*sector)))
    }

    /// Takes the first `N` readable bytes, wherever the descriptors are cut.
    fn take_readable<const N: usize>(&mut self, memory: &Memory) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let mut rest = bytes.as_mut_slice();
        for segment in &mut self.readable {
            let len = rest.len().min(segment.len as usize);
            let (now, after) = rest.split_at_mut(len);
            memory.read_slice(now, segment.addr).ok()?;
            segment.addr = segment.addr.checked_add(len as u64)?;
            segment.len -= len as u32;
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        rest.is_empty().then_some(bytes)
    }

    fn op(&mut self, memory: &Memory, kind: u32, sector: u64) -> Result<Op, Status> {
        match kind {
            VIRTIO_BLK_T_IN if total(&self.readable) == 0 => transfer(sector, &self.writable).map(Op::Read),
            VIRTIO_BLK_T_OUT if total(&self.writable) == 0 => transfer(sector, &self.readable).map(Op::Write),
            // Data in the wrong direction.
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => Err(Status::IoError),
            VIRTIO_BLK_T_FLUSH => Ok(Op::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Op::Id),
            VIRTIO_BLK_T_DISCARD => match self.zero_range(memory)? {
                (range, 0) => Ok(Op::Discard(range)),
                // Section 5.2.6.2: flags of a discard are answered with "unsupported".
                _ => Err(Status::Unsupported),
            },
            VIRTIO_BLK_T_WRITE_ZEROES => match self.zero_range(memory)? {
                (range, 0) => Ok(Op::WriteZeroes { range, unmap: false }),
                (range, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => Ok(Op::WriteZeroes { range, unmap: true }),
                _ => Err(Status::Unsupported),
            },
            _ => Err(Status::Unsupported),
        }
    }

    /// The one `struct virtio_blk_discard_write_zeroes` that a request may hold, and its flags.
    fn zero_range(&mut self, memory: &Memory) -> Result<(ByteRange, u32), Status> {
        let bytes: [u8; 16] = self.take_readable(memory).ok_or(Status::IoError)?;
        if total(&self.readable) != 0 {
            return Err(Status::IoError);
        }
        let number = |at: usize| {
            let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
            found.map_or(0, |four| u32::from_le_bytes(*four))
        };
        let sector = u64::from(number(0)) | u64::from(number(4)) << 32;
        let sectors = number(8);
        if sectors > MAX_ZERO_SECTORS {
            return Err(Status::IoError);
        }
        Ok((range(sector, u64::from(sectors) * SECTOR)?, number(12)))
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

fn transfer(sector: u64, data: &[Segment]) -> Result<ByteRange, Status> {
    let len = total(data);
    if len > MAX_DATA { Err(Status::IoError) } else { range(sector, len) }
}

fn range(sector: u64, len: u64) -> Result<ByteRange, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    if len == 0 || !len.is_multiple_of(SECTOR) {
        return Err(Status::IoError);
    }
    ByteRange::new(offset, len).ok_or(Status::IoError)
}

#[cfg(test)]
mod tests;
