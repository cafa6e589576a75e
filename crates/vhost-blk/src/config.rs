//! What the device tells of itself: features and configuration space (virtio 1.3, sections 5.2.3 and 5.2.4).

use block::{Disk, SECTOR};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The largest ring that a driver may set up, what QEMU allows for `queue-size=`.
pub(crate) const MAX_QUEUE_SIZE: u16 = 1024;

/// Data segments in a request. Header, data and status fit a ring of 128 without indirect descriptors, which is the
/// smallest that front-ends set up by default.
pub(crate) const SEG_MAX: u32 = 126;

/// Bytes in a data segment.
const SIZE_MAX: u32 = 1 << 20;

/// Bytes of data in a request: more than a driver that keeps to the two limits above can ask for.
pub(crate) const MAX_DATA: u64 = 128 << 20;

/// Sectors of one discard or write-zeroes, 16 MiB as QEMU has it. Such a request is worked off in one go, and a cut
/// waits for it.
pub(crate) const MAX_ZERO_SECTORS: u32 = 32768;

/// Bytes of `struct virtio_blk_config` up to `write_zeroes_may_unmap` and its padding; what follows belongs to
/// features that are not offered, and reads as zero.
const CONFIG_LEN: usize = 60;

/// Where `writeback` is, the one byte that the driver may write.
pub(crate) const WRITEBACK_OFFSET: u32 = 32;

/// The logical block: sectors, for a disk that was formatted with them must stay readable.
const LOGICAL_BLOCK: u32 = SECTOR as u32;

/// Whether the driver accepted a feature.
pub(crate) fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// The features offered for `disk`.
pub(crate) fn features(disk: &dyn Disk) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_MQ,
    ];
    if disk.read_only() {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    let offered = bits.into_iter().fold(0, |all, bit| all | 1 << bit);
    offered | (VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL).bits()
}

/// The vhost-user protocol features offered.
///
/// `INFLIGHT_SHMFD` and `LOG_SHMFD` are not the framework's doing: their messages do not get that far (see
/// [`inspect`](crate::inspect)).
/// Not `RESET_DEVICE`: the framework would forget the negotiated features without stopping the rings.
pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
}

/// The bytes `offset..offset + size` of the configuration space, zeroes past its end. The message layer has checked
/// that they are within its 256 bytes.
pub(crate) fn space(disk: &dyn Disk, queues: u16, writeback: bool, offset: u32, size: u32) -> Vec<u8> {
    let granularity = disk.discard_granularity().max(LOGICAL_BLOCK);
    let mut space = Vec::with_capacity(CONFIG_LEN);
    space.extend((disk.capacity() / SECTOR).to_le_bytes());
    space.extend(SIZE_MAX.to_le_bytes());
    space.extend(SEG_MAX.to_le_bytes());
    space.extend([0; 4]); // geometry, not offered
    space.extend(LOGICAL_BLOCK.to_le_bytes());
    // Topology: 4 KiB physical blocks (8 logical ones), none before the first aligned one, and one of them is the
    // least that I/O should be.
    space.extend([3, 0]);
    space.extend(8_u16.to_le_bytes());
    space.extend(0_u32.to_le_bytes()); // no optimal size
    space.extend([u8::from(writeback), 0]);
    space.extend(queues.to_le_bytes());
    space.extend(MAX_ZERO_SECTORS.to_le_bytes());
    space.extend(1_u32.to_le_bytes()); // ranges in a discard
    space.extend((granularity / LOGICAL_BLOCK).to_le_bytes());
    space.extend(MAX_ZERO_SECTORS.to_le_bytes());
    space.extend(1_u32.to_le_bytes()); // ranges in a write-zeroes
    space.extend([1, 0, 0, 0]); // write-zeroes may unmap
    debug_assert_eq!(space.len(), CONFIG_LEN);
    space.into_iter().chain(std::iter::repeat(0)).skip(offset as usize).take(size as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::RawDisk;
    use block::testing::MemStorage;
    use std::sync::Arc;

    fn disk(read_only: bool) -> RawDisk {
        RawDisk::new(Arc::new(MemStorage::new(1 << 20)), read_only).unwrap()
    }

    #[test]
    fn as_many_bytes_as_asked_for() {
        let disk = disk(false);
        for (offset, size) in [(0, 57), (0, 60), (0, 96), (0, 256), (32, 1), (59, 10), (200, 56)] {
            assert_eq!(space(&disk, 4, true, offset, size).len(), size as usize);
        }
        assert_eq!(space(&disk, 4, true, 0, 8), 2048_u64.to_le_bytes());
        assert_eq!(space(&disk, 4, true, WRITEBACK_OFFSET, 4), [1, 0, 4, 0]);
        assert_eq!(space(&disk, 4, true, 56, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        assert!(has(features(&disk(true)), VIRTIO_BLK_F_RO));
        assert!(!has(features(&disk(true)), VIRTIO_BLK_F_DISCARD));
        assert!(!has(features(&disk(false)), VIRTIO_BLK_F_RO));
        assert!(has(features(&disk(false)), VIRTIO_BLK_F_WRITE_ZEROES));
    }
}
