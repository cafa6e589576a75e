//! A list of runs, as small as it gets: the map of a disk in crumbs has to fit the processor's caches.

use super::Found;

/// The unit of a small run's numbers, in bytes: no table of any image says where anything is more exactly.
const SECTOR: u64 = 512;

/// A run, which ends where the next one begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Bytes from the start of the list's range.
    pub(super) start: u32,
    pub(super) found: Found,
}

/// Runs in order, each in 8 bytes if all of them fit.
#[derive(Clone, Debug)]
pub(super) enum List {
    Small(Box<[Small]>),
    Large(Box<[Large]>),
}

impl List {
    pub(super) fn new(runs: &[Run]) -> Self {
        let small: Option<Box<[Small]>> = runs.iter().map(|run| Small::new(*run)).collect();
        small.map_or_else(|| Self::Large(runs.iter().map(|run| Large::new(*run)).collect()), Self::Small)
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Small(list) => list.len(),
            Self::Large(list) => list.len(),
        }
    }

    /// Bytes of memory that it takes.
    pub(super) fn memory(&self) -> u64 {
        match self {
            Self::Small(list) => size_of_val(&**list) as u64,
            Self::Large(list) => size_of_val(&**list) as u64,
        }
    }

    /// Where a run starts, if there are so many.
    pub(super) fn start(&self, index: usize) -> Option<u32> {
        match self {
            Self::Small(list) => list.get(index).map(|run| run.start()),
            Self::Large(list) => list.get(index).map(|run| run.start),
        }
    }

    pub(super) fn get(&self, index: usize) -> Option<Run> {
        match self {
            Self::Small(list) => list.get(index).map(|run| run.unpacked()),
            Self::Large(list) => list.get(index).map(|run| run.unpacked()),
        }
    }
}

/// A run in 8 bytes, its numbers in sectors: within 32 MiB, of one of 65,535 layers, in the first 2 TiB of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Small {
    start: u16,
    layer: u16,
    offset: u32,
}

impl Small {
    /// In the place of a layer: the bytes are zero.
    const NOBODY: u16 = u16::MAX;
    /// In the place of an offset: the bytes are packed.
    const PACKED: u32 = u32::MAX;

    /// `None` if it does not fit.
    fn new(run: Run) -> Option<Self> {
        let (layer, offset) = match run.found {
            Found::Zero => (Self::NOBODY, 0),
            Found::Data { layer, offset } => {
                (Self::layer(layer)?, sectors(offset).filter(|sectors| *sectors != Self::PACKED)?)
            }
            Found::Packed { layer } => (Self::layer(layer)?, Self::PACKED),
        };
        Some(Self { start: sectors(run.start.into())?.try_into().ok()?, layer, offset })
    }

    fn layer(layer: usize) -> Option<u16> {
        u16::try_from(layer).ok().filter(|layer| *layer != Self::NOBODY)
    }

    fn start(self) -> u32 {
        u32::from(self.start) * SECTOR as u32
    }

    fn unpacked(self) -> Run {
        let found = match (self.layer, self.offset) {
            (Self::NOBODY, _) => Found::Zero,
            (layer, Self::PACKED) => Found::Packed { layer: layer.into() },
            (layer, offset) => Found::Data { layer: layer.into(), offset: u64::from(offset) * SECTOR },
        };
        Run { start: self.start(), found }
    }
}

fn sectors(bytes: u64) -> Option<u32> {
    u32::try_from(bytes / SECTOR).ok().filter(|_| bytes.is_multiple_of(SECTOR))
}

/// A run in 16 bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Large {
    start: u32,
    layer: u32,
    offset: u64,
}

impl Large {
    const NOBODY: u32 = u32::MAX;
    /// No file is that long.
    const PACKED: u64 = u64::MAX;

    fn new(run: Run) -> Self {
        // A chain of 2^32 layers is longer than any that a process can open.
        let (layer, offset) = match run.found {
            Found::Zero => (Self::NOBODY, 0),
            Found::Data { layer, offset } => (layer as u32, offset),
            Found::Packed { layer } => (layer as u32, Self::PACKED),
        };
        Self { start: run.start, layer, offset }
    }

    fn unpacked(self) -> Run {
        let found = match (self.layer, self.offset) {
            (Self::NOBODY, _) => Found::Zero,
            (layer, Self::PACKED) => Found::Packed { layer: layer as usize },
            (layer, offset) => Found::Data { layer: layer as usize, offset },
        };
        Run { start: self.start, found }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u32 = (u16::MAX as u32) * 512;

    fn size_of_runs(runs: &[Run]) -> u64 {
        let list = List::new(runs);
        assert_eq!(list.len(), runs.len());
        for (index, run) in runs.iter().enumerate() {
            let found = list.get(index).unwrap();
            assert_eq!((found.start, found.found), (run.start, run.found));
            assert_eq!(list.start(index), Some(run.start));
        }
        assert!(list.get(runs.len()).is_none() && list.start(runs.len()).is_none());
        list.memory() / runs.len() as u64
    }

    #[test]
    fn what_fits_takes_eight_bytes_and_nothing_is_lost_at_the_edges() {
        let data = |layer, offset| Found::Data { layer, offset };
        let small = [
            Found::Zero,
            Found::Packed { layer: 65_534 },
            data(0, 0),
            data(65_534, (u64::from(u32::MAX) - 1) * 512),
        ];
        for found in small {
            assert_eq!(size_of_runs(&[Run { start: 0, found }, Run { start: MOST, found }]), 8);
        }
        let large = [
            Found::Packed { layer: 65_535 },
            data(65_535, 0),
            data(0, u64::from(u32::MAX) * 512),
            data(0, 511),
        ];
        for found in large {
            assert_eq!(size_of_runs(&[Run { start: 0, found: Found::Zero }, Run { start: 512, found }]), 16);
        }
        for start in [1, MOST + 512] {
            let runs = [Run { start: 0, found: data(7, 512) }, Run { start, found: Found::Zero }];
            assert_eq!(size_of_runs(&runs), 16);
        }
    }
}
