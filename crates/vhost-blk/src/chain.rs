//! The descriptors of a chain, by its head (virtio 1.3, section 2.7.5).
//!
//! `virtio-queue` walks chains too, but only those that it finds in the available ring. One that is submitted again after
//! a restart is known by its head alone: the driver may have used its place in that ring for another since.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use crate::guest::Memory;

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// Where a ring's descriptors are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    pub(crate) addr: GuestAddress,
    pub(crate) size: u16,
}

/// One chain, descriptor by descriptor, each read once; an indirect table takes its descriptor's place.
///
/// Ends without a word at a loop, an index past the table, a table out of memory or an indirect table in another, and
/// where the chain is longer than 2^32 bytes. All of these leave a last descriptor that says that another follows, or
/// none at all.
pub(crate) struct Chain<'a> {
    memory: &'a Memory,
    table: Table,
    /// The next descriptor's index, while there is one.
    next: Option<u16>,
    /// Descriptors that may still come: more would be a loop.
    left: u16,
    indirect: bool,
    bytes: u32,
}

impl<'a> Chain<'a> {
    pub(crate) fn new(memory: &'a Memory, table: Table, head: u16) -> Self {
        Self { memory, table, next: Some(head), left: table.size, indirect: false, bytes: 0 }
    }

    fn read(&self, index: u16) -> Option<Descriptor> {
        if index >= self.table.size {
            return None;
        }
        let addr = self.table.addr.checked_add(u64::from(index) * u64::from(DESCRIPTOR))?;
        self.memory.read_obj(addr).ok()
    }

    /// Goes on with the table that `descriptor` names; its first descriptor.
    fn enter(&mut self, descriptor: Descriptor) -> Option<Descriptor> {
        if self.indirect || !descriptor.len().is_multiple_of(DESCRIPTOR) {
            return None;
        }
        let size = u16::try_from(descriptor.len() / DESCRIPTOR).ok()?;
        self.table = Table { addr: descriptor.addr(), size };
        (self.indirect, self.left) = (true, size);
        self.read(0).filter(|first| !first.refers_to_indirect_table())
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let index = self.next.take()?;
        let mut descriptor = self.read(index)?;
        if descriptor.refers_to_indirect_table() {
            descriptor = self.enter(descriptor)?;
        }
        // Section 2.7.5.2.
        self.bytes = self.bytes.checked_add(descriptor.len())?;
        self.left = self.left.checked_sub(1)?;
        self.next = descriptor.has_next().then(|| descriptor.next());
        Some(descriptor)
    }
}
