//! Whether the guest believes in a volatile write cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use crate::config::has;

/// The cache mode (virtio 1.3, section 5.2.5.2).
///
/// What a driver set stays from one session to the next: a front-end that lost its connection and comes back with the
/// same guest, or another one that the guest was moved to, tells of features anew, but not of the field that the guest
/// once wrote.
///
/// A driver that has turned the cache off, or that knows neither how to turn it off nor how to flush, sends no flushes
/// and believes that what was acknowledged is on stable storage. So every write is flushed before it is acknowledged.
#[derive(Debug)]
pub(crate) struct CacheMode {
    /// This session's.
    features: AtomicU64,
    /// The disk's.
    field: Arc<Field>,
}

/// The field of the configuration space, which outlives sessions.
#[derive(Debug)]
pub(crate) struct Field(AtomicBool);

impl Default for Field {
    /// On, as the first driver finds it.
    fn default() -> Self {
        Self(AtomicBool::new(true))
    }
}

impl CacheMode {
    /// A session's. Until features are negotiated, a driver that knows of the field is assumed.
    pub(crate) fn new(field: Arc<Field>) -> Self {
        Self { features: AtomicU64::new(1 << VIRTIO_BLK_F_CONFIG_WCE), field }
    }

    pub(crate) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    pub(crate) fn set_writeback(&self, on: bool) {
        self.field.0.store(on, Ordering::Release);
    }

    /// The field, as the driver reads it.
    pub(crate) fn field(&self) -> bool {
        self.field.0.load(Ordering::Acquire)
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
            let mode = CacheMode::new(Arc::default());
            mode.set_features(features);
            mode.set_writeback(field);
            assert_eq!(mode.is_writeback(), expected, "{features:#x} {field}");
        }
    }
}
