use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::*;

/// How long each target runs here. `make fuzz` runs them longer.
const TIME: Duration = Duration::from_secs(2);

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize % bound.max(1)
    }

    /// Changes `data` as a fuzzer does: bits, bytes, words, pieces moved, left out, and put in twice.
    fn mutate(&mut self, data: &mut Vec<u8>) {
        const VALUES: [u8; 8] = [0, 1, 0x7f, 0x80, 0xff, 2, 8, 0x40];
        let at = self.below(data.len());
        match self.below(8) {
            0 if !data.is_empty() => data[at] ^= 1 << self.below(8),
            1 | 2 if !data.is_empty() => data[at] = VALUES[self.below(8)],
            3 if !data.is_empty() => data[at] = self.below(256) as u8,
            4 => {
                let end = (at + self.below(9)).min(data.len());
                data[at.min(end)..end].fill(VALUES[self.below(8)]);
            }
            5 => data.truncate(self.below(data.len() + 1)),
            6 => {
                let piece: Vec<u8> = data[at..].iter().take(1 + self.below(32)).copied().collect();
                let to = self.below(data.len() + 1);
                data.splice(to..to, piece);
            }
            _ => data.extend((0..self.below(24)).map(|_| VALUES[self.below(8)]).collect::<Vec<u8>>()),
        }
        data.truncate(1 << 16);
    }
}

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(name);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn drive(name: &str) {
    let (_, target) = TARGETS.iter().find(|(other, _)| *other == name).unwrap();
    let seeds = seeds(name);
    assert!(!seeds.is_empty());
    seeds.iter().for_each(|seed| target(seed));
    let (mut random, began, mut rounds) = (Random(1), Instant::now(), 0_u64);
    while began.elapsed() < TIME {
        let mut data = seeds[random.below(seeds.len())].clone();
        (0..=random.below(8)).for_each(|_| random.mutate(&mut data));
        let last = data.clone();
        if let Err(panic) = std::panic::catch_unwind(|| target(&data)) {
            eprintln!("{name}, round {rounds}: {last:02x?}");
            std::panic::resume_unwind(panic);
        }
        rounds += 1;
    }
    assert!(rounds > 100, "{name} is too slow: {rounds} rounds");
}

/// Each in a test of its own, so that they run beside each other and tell their names.
macro_rules! driven {
    ($($name:ident)*) => {
        $(#[test] fn $name() { drive(stringify!($name)); })*

        #[test]
        fn every_target_is_driven() {
            assert_eq!(TARGETS.map(|(name, _)| name), [$(stringify!($name)),*]);
        }
    };
}

driven!(header extensions directory bitmap refcounts compressed tables check);
