//! Reading compressed clusters: whole, unpacked, and the last few kept.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use block::{ByteRange, Context, Extent, Result, Source};

use crate::compressed::{Compression, Packed, decompress};
use crate::entry::{GuestCluster, Home};
use crate::image::Inner;

/// Unpacked bytes that are kept, at most; of large clusters two.
const ROOM: usize = 2 << 20;

/// The clusters unpacked last, by the word that says where they are in the file. What a word says stays true as long as an
/// entry has it, or somebody who looked it up; who writes something else there has it [forgotten](Self::forget).
#[derive(Debug)]
pub(crate) struct PackedCache {
    compression: Compression,
    recent: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
}

impl PackedCache {
    pub(crate) fn new(compression: Compression) -> Self {
        Self { compression, recent: Mutex::default() }
    }

    pub(crate) fn compression(&self) -> Compression {
        self.compression
    }

    /// Forgets what was at this place. The room has been used again, so all are gone who unpacked it for an earlier entry.
    pub(crate) fn forget(&self, word: u64) {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).retain(|(kept, _)| *kept != word);
    }

    fn find(&self, word: u64) -> Option<Arc<[u8]>> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.iter().find(|(kept, _)| *kept == word).map(|(_, bytes)| Arc::clone(bytes))
    }

    fn keep(&self, word: u64, bytes: &Arc<[u8]>) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.truncate((ROOM / bytes.len().max(1)).max(2) - 1);
        recent.push_front((word, Arc::clone(bytes)));
    }
}

impl Inner {
    /// Appends the bytes of `range`, in which clusters were compressed a moment ago. Whoever calls has an epoch from
    /// before that moment.
    pub(crate) fn resolve_packed(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<()> {
        for (cluster, piece) in self.geometry.pieces(range) {
            let home = self.look(cluster, |entries| entries.first().map(|entry| entry.home))?;
            match home.filter(|home| home.is_compressed()) {
                Some(home) => {
                    let offset = (piece.offset & (self.geometry.cluster_size() - 1)) as usize;
                    let bytes = self.unpack(cluster, home)?;
                    out.push(Extent { len: piece.len, source: Source::Bytes { bytes, offset } });
                }
                // It has been written or discarded since.
                None => self.resolve_read(piece, out)?,
            }
        }
        Ok(())
    }

    /// The bytes of a compressed cluster.
    pub(crate) fn unpack(&self, cluster: GuestCluster, home: Home) -> Result<Arc<[u8]>> {
        if let Some(bytes) = self.packed.find(home.0) {
            return Ok(bytes);
        }
        let unpack = || {
            let Packed { offset, len } = Packed::decode(self.geometry, home.0)?;
            // The file may end within the last sector.
            let there = self.storage.len()?.saturating_sub(offset).min(len);
            let mut packed = vec![0; there as usize];
            self.storage.read_at(&mut packed, offset)?;
            let mut bytes = vec![0; self.geometry.cluster_size() as usize];
            decompress(self.packed.compression, &packed, &mut bytes).map(|()| Arc::<[u8]>::from(bytes))
        };
        let bytes = unpack().context(|| format!("read the compressed cluster {}", cluster.0))?;
        self.packed.keep(home.0, &bytes);
        Ok(bytes)
    }
}
