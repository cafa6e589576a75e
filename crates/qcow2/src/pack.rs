//! Writing compressed clusters: whole ones, packed one behind the other into host clusters that they share.
//!
//! ```text
//!   host clusters   |  a  | b |   c    |  tables  | d |   ...
//!                    1        2         1          1            refcounts: how many have some of their bytes there
//! ```
//! A compressed cluster may begin in one host cluster and end in the next. It is never changed where it is: who writes to
//! it moves it. Its room is used again once none of those is left with which it shares its host cluster.
//!
//! The order is that of every write: data, journal, entry. That its first sector may hold the end of the one before does not
//! matter: both of the sector's contents, the old and the new one, hold that.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::task::{Poll, Waker};

use block::{ByteRange, Context, Error, ErrorKind, Result, blocking, write_disk};

use crate::compressed::{Packed, compress};
use crate::entry::{Entry, Geometry, GuestCluster, Home, HostOffset, State};
use crate::image::{Core, Image, Inner, Writer};
use crate::pending::Claim;
use crate::publish::Step;
use crate::refcount_bits::RefcountWidth;

/// Where the next compressed cluster goes. One is written at a time: two could share a sector.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packer {
    /// Behind the last one; at a cluster's end if there is no room left.
    next: u64,
    /// How many have bytes in the host cluster of `next`, or had.
    names: u64,
    /// How many can be counted.
    most: u64,
}

/// What flushes have to know of compressed clusters. Under the lock of writes.
#[derive(Debug, Default)]
pub(crate) struct Packing {
    /// Host clusters into which some are being written, or the next one may be.
    pub(crate) held: Range<u64>,
    /// Published, and not yet taken by a flush.
    pub(crate) named: Vec<Home>,
}

impl Packing {
    /// Host clusters in which there is something, or will be, that no flush has counted.
    pub(crate) fn uncounted(&self, geometry: Geometry) -> HashSet<u64> {
        let packed = self.named.iter().filter_map(|home| Packed::decode(geometry, home.0).ok());
        let named = packed.map(|packed| packed.clusters(geometry));
        named.flat_map(|(first, count)| first..first + count).chain(self.held.clone()).collect()
    }
}

impl Image {
    /// Writes a whole cluster, compressed in the way that its header says; one that would not get smaller
    /// is written as it is. `offset` is a multiple of the cluster size ([`Self::cluster_size`]), and `data` is a cluster, or
    /// what there is of the disk's last one. Waits for writes under way to the same cluster.
    ///
    /// Errors: [`ErrorKind::InvalidInput`] for what is not a whole cluster, [`ErrorKind::Unsupported`] for an image whose
    /// data is in a file of its own; else as writing.
    pub fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<()> {
        let (image, size) = (&self.0, self.cluster_size());
        let range = ByteRange { offset, len: data.len() as u64 };
        let end = image.capacity().min(offset.saturating_add(size));
        if !image.geometry.is_aligned(offset) || range.len == 0 || range.end() != end {
            return Err(Error::new(ErrorKind::InvalidInput, "only whole clusters can be compressed"));
        }
        if image.geometry.external {
            let story = "an image whose data is in another file can not be compressed";
            return Err(Error::new(ErrorKind::Unsupported, story));
        }
        let mut whole = Cow::Borrowed(data);
        if range.len < size {
            whole.to_mut().resize(size as usize, 0);
        }
        match compress(image.packed.compression(), &whole) {
            Some(packed) => image.pack(image.begin_writing(range)?, range, &packed),
            None => write_disk(self, offset, data),
        }
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.0.geometry.cluster_size()
    }
}

impl Inner {
    /// Writes the cluster that is `range`, of which `bytes` is the compressed form.
    fn pack(self: &Arc<Self>, writer: &Writer, range: ByteRange, bytes: &[u8]) -> Result<()> {
        let cluster = self.geometry.cluster_at(range.offset);
        // Entries are read before the lock is taken.
        self.look(cluster, |_| ())?;
        let claimed = blocking(|waker| self.claim_whole(writer, cluster, waker))?;
        let mut packer = writer.packer.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *packer;
        let room = packer.place(self, &mut writer.core(), bytes.len() as u64)?;
        let written = Packed::encode(self.geometry, room.at, bytes.len() as u64)
            .ok_or_else(|| Error::new(ErrorKind::NoSpace, "the file is too long for compressed clusters"))
            .and_then(|word| self.storage.write_at(bytes, room.at).map(|()| Home(word)));
        let published = written.and_then(|home| {
            self.packed.forget(home.0);
            claimed.publish(Entry { home, state: State::new(self.geometry.all(), 0) })
        });
        let mut core = writer.core();
        if published.is_err() {
            *packer = before;
            room.taken.into_iter().for_each(|taken| core.allocator.give_back(taken));
        }
        core.packing.held = packer.held(self.geometry.cluster_bits);
        published.context(|| "write a compressed cluster")
    }

    /// Claims all of a cluster: from then on nobody else begins a write to new room in it, or clears it.
    fn claim_whole<'a>(
        self: &'a Arc<Self>,
        writer: &'a Writer,
        cluster: GuestCluster,
        waker: &Waker,
    ) -> Poll<Result<Claimed<'a>>> {
        let mut core = writer.core();
        let all = self.geometry.all();
        if core.claims.conflict(cluster, 0, all) {
            core.claims.wait(waker);
            return Poll::Pending;
        }
        let old = match self.entry(&core, cluster) {
            Ok(old) => old,
            Err(error) => return Poll::Ready(Err(error)),
        };
        let home = HostOffset::default();
        let claim = Claim { cluster, shared: 0, exclusive: all, publish: 0, old, home };
        let owner = core.claims.hold(&[claim]);
        // It was given no home that could be taken back.
        core.claims.published(cluster);
        Poll::Ready(Ok(Claimed { image: self, writer, owner, cluster }))
    }
}

/// A cluster that nobody else writes to new room in. Dropped, it is let go of.
struct Claimed<'a> {
    image: &'a Inner,
    writer: &'a Writer,
    owner: u64,
    cluster: GuestCluster,
}

impl Claimed<'_> {
    fn publish(self, new: Entry) -> Result<()> {
        let mut core = self.writer.core();
        let old = self.image.entry(&core, self.cluster)?;
        self.image.publish(&mut core, &[Step { cluster: self.cluster, old, new }])
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        let waiting = self.writer.core().claims.release(self.owner, |_| ());
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// Room for a compressed cluster.
struct Room {
    /// Where, in the file.
    at: u64,
    /// The host cluster that was taken for it.
    taken: Option<HostOffset>,
}

impl Packer {
    /// Nothing is packed yet.
    pub(crate) fn new(width: RefcountWidth) -> Self {
        Self { next: 0, names: 0, most: width.max() }
    }

    /// Room for `len` bytes, fewer than a cluster has: behind the last ones if they fit or if the host cluster behind is to be
    /// had, else at the begin of a new one.
    fn place(&mut self, image: &Inner, core: &mut Core, len: u64) -> Result<Room> {
        let size = image.geometry.cluster_size();
        // None if nothing may be packed behind the last one.
        let left = match self.names < self.most {
            true => self.next.next_multiple_of(size) - self.next,
            false => 0,
        };
        let mut room = Room { at: self.next, taken: None };
        let fits = len <= left;
        if !fits {
            let taken = core.take()?;
            if left == 0 || taken.0 != self.next + left {
                room.at = taken.0;
            }
            room.taken = Some(taken);
        }
        self.names = if fits { self.names + 1 } else { 1 };
        self.next = room.at + len;
        let bits = image.geometry.cluster_bits;
        core.packing.held = room.at >> bits..((self.next - 1) >> bits) + 1;
        Ok(room)
    }

    /// The host cluster that has room left, if one has.
    fn held(&self, cluster_bits: u32) -> Range<u64> {
        let (first, end) = (self.next >> cluster_bits, self.next.div_ceil(1 << cluster_bits));
        first..end
    }
}
