//! Whether the guest believes in a volatile write cache.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use crate::config::has;

/// The cache mode (virtio 1.3, section 5.2.5.2).
///
/// What a driver set stays from one session to the next: a front-end that lost its connection and comes back with the
/// same guest tells of features again, but not of the field that the guest once wrote.
///
/// A driver that has turned the cache off, or that knows neither how to turn it off nor how to flush, sends no flushes
/// and believes that what was acknowledged is on stable storage. So every write is flushed before it is acknowledged.
#[derive(Debug)]
pub(crate) struct CacheMode {
    features: AtomicU64,
    /// The field of the configuration space.
    writeback: AtomicBool,
}

impl CacheMode {
    /// On, as the first driver finds it.
    pub(crate) fn new() -> Self {
        let mode = Self { features: AtomicU64::new(0), writeback: AtomicBool::new(true) };
        mode.begin_session();
        mode
    }

    /// Forgets the features. Until they are negotiated, a driver that knows of the field is assumed.
    pub(crate) fn begin_session(&self) {
        self.set_features(1 << VIRTIO_BLK_F_CONFIG_WCE);
    }

    pub(crate) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    pub(crate) fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Release);
    }

    /// The field, as the driver reads it.
    pub(crate) fn field(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    /// Whether writes may be acknowledged before they are on stable storage.
    pub(crate) fn is_writeback(&self) -> bool {
        let features = self.features.load(Ordering::Acquire);
        match has(features, VIRTIO_BLK_F_CONFIG_WCE) {
            true => self.field(),
            false => has(features, VIRTIO_BLK_F_FLUSH),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_cached_only_for_who_can_flush() {
        let (wce, flush) = (1 << VIRTIO_BLK_F_CONFIG_WCE, 1 << VIRTIO_BLK_F_FLUSH);
        let cases =
            [(wce | flush, true, true), (wce | flush, false, false), (flush, false, true), (0, true, false)];
        for (features, field, expected) in cases {
            let mode = CacheMode::new();
            mode.set_features(features);
            mode.set_writeback(field);
            assert_eq!(mode.is_writeback(), expected, "{features:#x} {field}");
        }
    }
}
