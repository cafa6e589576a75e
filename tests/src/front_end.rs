//! A front-end whose rings are written by hand: for chains that no driver would make, and for the order of messages.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight, VhostUserVringAddrFlags};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A descriptor: address, length, flags, next.
pub type Desc = (u64, u32, u16, u16);

const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
/// Pages that are written to are logged.
const LOG_ALL: u64 = 1 << 26;
/// Bytes of such a page, for each of which there is a bit.
const LOG_PAGE: u64 = 4096;

/// Descriptors in a ring.
const SIZE: u16 = 64;

/// The guest's memory: two regions of 1 MiB that touch.
const REGION: u64 = 1 << 20;

/// Where ring `i` is: table, then available ring, then used ring. What is past [`FrontEnd::DATA`] is free for tests.
const RING_STRIDE: u64 = 0x3000;

fn negotiate(socket: &Path, without: u64) -> io::Result<Frontend> {
    let mut messages = Frontend::connect(socket, 64).map_err(io::Error::other)?;
    let negotiate = |messages: &mut Frontend| -> vhost::Result<()> {
        messages.set_owner()?;
        let features = messages.get_features()? & !without & !LOG_ALL;
        messages.set_features(features)?;
        let offered = messages.get_protocol_features()?;
        messages.set_protocol_features(offered)?;
        messages.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(features & (PROTOCOL_FEATURES | VERSION_1), PROTOCOL_FEATURES | VERSION_1);
        Ok(())
    };
    negotiate(&mut messages).map_err(io::Error::other)?;
    Ok(messages)
}

/// A connection, its memory, and up to four rings.
pub struct FrontEnd {
    /// `None` between two connections.
    messages: Option<Frontend>,
    memory: GuestMemoryMmap<()>,
    file: File,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    offered: Vec<u16>,
    taken: Vec<u16>,
    without: u64,
    record: Option<(VhostUserInflight, File)>,
}

impl FrontEnd {
    /// A read or write goes on with another descriptor.
    pub const NEXT: u16 = 1;
    /// The device writes it.
    pub const WRITE: u16 = 2;
    /// It is a table.
    pub const INDIRECT: u16 = 4;
    /// The first address past the rings.
    pub const DATA: u64 = 0x10000;
    /// Where the two regions touch.
    pub const SEAM: u64 = REGION;

    /// Connects and negotiates, with all the device's features but for those in `without`; no ring is set up.
    pub fn connect(socket: &Path, rings: usize, without: u64) -> io::Result<Self> {
        let messages = Some(negotiate(socket, without)?);
        let file: File = memfd_create("guest", MemfdFlags::CLOEXEC)?.into();
        file.set_len(2 * REGION)?;
        let whole = (GuestAddress(0), 2 * REGION as usize, Some(FileOffset::new(file.try_clone()?, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([whole]).map_err(io::Error::other)?;
        let events = || (0..rings).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<Vec<_>>>();
        let (kicks, calls) = (events()?, events()?);
        let zeroes = vec![0; rings];
        let (offered, taken, record) = (zeroes.clone(), zeroes, None);
        Ok(Self { messages, memory, file, kicks, calls, offered, taken, without, record })
    }

    /// Has the device make a record of what is in flight, and keeps it for each connection from now on.
    pub fn track(&mut self) -> vhost::Result<()> {
        let asked = VhostUserInflight::new(0, 0, self.kicks.len() as u16, SIZE);
        let (shape, file) = self.messages().get_inflight_fd(&asked)?;
        self.set_record(shape, file)
    }

    /// Gives the device this record, and keeps it for each connection from now on.
    pub fn set_record(&mut self, shape: VhostUserInflight, file: File) -> vhost::Result<()> {
        let set = self.messages().set_inflight_fd(&shape, file.as_raw_fd());
        self.record = Some((shape, file));
        set
    }

    /// The record, and its shape.
    pub fn record(&self) -> Option<&(VhostUserInflight, File)> {
        self.record.as_ref()
    }

    /// Goes, and leaves the guest as it is.
    pub fn disconnect(&mut self) {
        self.messages = None;
    }

    /// Connects again, as QEMU does: the guest and its rings know nothing of it, and go on from where the used ring is.
    pub fn reconnect(&mut self, socket: &Path) -> io::Result<()> {
        self.disconnect();
        self.messages = Some(negotiate(socket, self.without)?);
        if let Some((shape, file)) = self.record.take() {
            self.set_record(shape, file).map_err(io::Error::other)?;
        }
        self.set_memory(2).map_err(io::Error::other)?;
        for ring in 0..self.kicks.len() {
            let used = GuestAddress(Self::table(ring) + 0x2002);
            let base = self.memory.read_obj(used).map_err(io::Error::other)?;
            self.start_at(ring, base).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Takes all of the memory away, and kicks. Nothing of it may be looked at any more.
    pub fn kick_without_memory(&self, ring: usize) {
        self.file.set_len(0).unwrap();
        self.kicks[ring].write(1).unwrap();
    }

    /// The file of the guest's memory.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Sends the memory table: both regions, or only the first.
    pub fn set_memory(&mut self, regions: u64) -> vhost::Result<()> {
        let base = self.base();
        let table: Vec<_> = (0..regions)
            .map(|index| VhostUserMemoryRegionInfo {
                guest_phys_addr: index * REGION,
                memory_size: REGION,
                userspace_addr: base + index * REGION,
                mmap_offset: index * REGION,
                mmap_handle: self.file.as_raw_fd(),
            })
            .collect();
        self.messages().set_mem_table(&table).map(drop)
    }

    /// Where the memory is in this process; the front-end's addresses are made of it.
    fn base(&self) -> u64 {
        let slices = self.memory.get_slices(GuestAddress(0), 1, Permissions::Read);
        let first = slices.ok().and_then(|mut slices| slices.next()?.ok());
        first.map_or(0, |slice| slice.ptr_guard().as_ptr().addr() as u64)
    }

    /// Sets up ring `ring` from where it was left, and enables it.
    pub fn start(&mut self, ring: usize) -> vhost::Result<()> {
        self.start_at(ring, self.offered[ring])
    }

    fn start_at(&mut self, ring: usize, next: u16) -> vhost::Result<()> {
        self.messages().set_vring_num(ring, SIZE)?;
        self.messages().set_vring_base(ring, next)?;
        self.set_addresses(ring, None)?;
        let messages = self.messages.as_mut().unwrap();
        messages.set_vring_call(ring, &self.calls[ring])?;
        messages.set_vring_kick(ring, &self.kicks[ring])?;
        messages.set_vring_enable(ring, true)
    }

    /// Says where a ring is, and where it is to be logged.
    fn set_addresses(&mut self, ring: usize, log_addr: Option<u64>) -> vhost::Result<()> {
        let at = self.base() + Self::table(ring);
        let flags = if log_addr.is_some() { VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() } else { 0 };
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags,
            desc_table_addr: at,
            avail_ring_addr: at + 0x1000,
            used_ring_addr: at + 0x2000,
            log_addr,
        };
        self.messages().set_vring_addr(ring, &config)
    }

    /// Has the device log the pages that it writes to, in the order in which QEMU begins to. `rings` are running.
    pub fn log(&mut self, rings: usize) -> vhost::Result<File> {
        let file: File = memfd_create("log", MemfdFlags::CLOEXEC).map_err(io::Error::from).unwrap().into();
        let bytes = 2 * REGION / LOG_PAGE / 8;
        file.set_len(bytes).unwrap();
        let region =
            VhostUserDirtyLogRegion { mmap_size: bytes, mmap_offset: 0, mmap_handle: file.as_raw_fd() };
        self.messages().set_log_base(0, Some(region))?;
        let features = self.messages().get_features()? & !self.without;
        self.messages().set_features(features | LOG_ALL)?;
        for ring in 0..rings {
            self.set_addresses(ring, Some(Self::table(ring) + 0x2000))?;
        }
        Ok(file)
    }

    /// The pages that are marked in a log; the marks are taken out.
    pub fn logged(log: &File) -> Vec<u64> {
        let mut bits = vec![0; (2 * REGION / LOG_PAGE / 8) as usize];
        log.read_exact_at(&mut bits, 0).unwrap();
        log.write_all_at(&vec![0; bits.len()], 0).unwrap();
        let is_marked = |page: &u64| bits[(page / 8) as usize] >> (page % 8) & 1 == 1;
        (0..2 * REGION / LOG_PAGE).filter(is_marked).collect()
    }

    /// Stops ring `ring`, and returns the next available index that the device would take.
    pub fn stop(&mut self, ring: usize) -> vhost::Result<u32> {
        self.messages().get_vring_base(ring)
    }

    /// The other messages.
    pub fn messages(&mut self) -> &mut Frontend {
        self.messages.as_mut().unwrap()
    }

    /// So many bytes of the configuration space.
    pub fn config(&mut self, offset: u32, size: u32) -> vhost::Result<Vec<u8>> {
        let flags = VhostUserConfigFlags::WRITABLE;
        Ok(self.messages().get_config(offset, size, flags, &vec![0; size as usize])?.1)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Writes the header of a request.
    pub fn header(&self, addr: u64, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(addr)).unwrap();
    }

    /// Writes descriptors from `first` on into a table: ring `ring`'s own, or one at `table`.
    pub fn descriptors(&self, table: u64, first: u16, descriptors: &[Desc]) {
        for (index, (addr, len, flags, next)) in descriptors.iter().enumerate() {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&addr.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            let at = table + 16 * (u64::from(first) + index as u64);
            self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        }
    }

    /// The address of ring `ring`'s table.
    pub fn table(ring: usize) -> u64 {
        ring as u64 * RING_STRIDE
    }

    /// Offers the chain at `head`, and kicks.
    pub fn offer(&mut self, ring: usize, head: u16) {
        let avail = Self::table(ring) + 0x1000;
        let slot = u64::from(self.offered[ring] % SIZE);
        self.memory.write_obj(head, GuestAddress(avail + 4 + 2 * slot)).unwrap();
        self.offered[ring] = self.offered[ring].wrapping_add(1);
        self.set_offered(ring, self.offered[ring]);
    }

    /// Takes back what was offered and not taken, on every ring; they are stopped.
    pub fn rewind(&mut self) {
        self.offered.clone_from(&self.taken);
    }

    /// Writes the available index as it is given, and kicks.
    pub fn set_offered(&self, ring: usize, index: u16) {
        let avail = Self::table(ring) + 0x1000;
        self.memory.store(index, GuestAddress(avail + 2), std::sync::atomic::Ordering::Release).unwrap();
        self.kicks[ring].write(1).unwrap();
    }

    /// The driver kicks by this on ring `ring`, once it is started again.
    pub fn replace_kick(&mut self, ring: usize, kick: EventFd) {
        self.kicks[ring] = kick;
    }

    /// Has the device call somebody else on ring `ring` from now on.
    pub fn replace_call(&mut self, ring: usize) {
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        self.messages().set_vring_call(ring, &call).unwrap();
        self.calls[ring] = call;
    }

    /// Whether the device calls on ring `ring` within `timeout`; its calls so far are taken.
    pub fn is_called(&self, ring: usize, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            match self.calls[ring].read() {
                Ok(_) => return true,
                Err(_) if Instant::now() >= deadline => return false,
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// The next used entry (head and length), if there is one within `timeout`.
    pub fn used(&mut self, ring: usize, timeout: Duration) -> Option<(u32, u32)> {
        let (used, deadline) = (Self::table(ring) + 0x2000, Instant::now() + timeout);
        loop {
            let acquire = std::sync::atomic::Ordering::Acquire;
            let index: u16 = self.memory.load(GuestAddress(used + 2), acquire).unwrap();
            if index != self.taken[ring] {
                let slot = u64::from(self.taken[ring] % SIZE);
                self.taken[ring] = self.taken[ring].wrapping_add(1);
                let entry: [u32; 2] = self.memory.read_obj(GuestAddress(used + 4 + 8 * slot)).unwrap();
                return Some((entry[0], entry[1]));
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}
