use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use block::testing::Random;

use super::*;

/// How long each target runs here. `make fuzz` runs them longer.
const TIME: Duration = Duration::from_secs(2);

/// Changes `data` as a fuzzer does: bits, bytes, words, pieces moved, left out, and put in twice.
fn mutate(random: &mut Random, data: &mut Vec<u8>) {
    const VALUES: [u8; 8] = [0, 1, 0x7f, 0x80, 0xff, 2, 8, 0x40];
    let mut below = |bound: usize| random.below(bound as u64) as usize;
    let at = below(data.len());
    match below(8) {
        0 if !data.is_empty() => data[at] ^= 1 << below(8),
        1 | 2 if !data.is_empty() => data[at] = VALUES[below(8)],
        3 if !data.is_empty() => data[at] = below(256) as u8,
        4 => {
            let end = (at + below(9)).min(data.len());
            data[at.min(end)..end].fill(VALUES[below(8)]);
        }
        5 => data.truncate(below(data.len() + 1)),
        6 => {
            let piece: Vec<u8> = data[at..].iter().take(1 + below(32)).copied().collect();
            let to = below(data.len() + 1);
            data.splice(to..to, piece);
        }
        _ => data.extend((0..below(24)).map(|_| VALUES[below(8)]).collect::<Vec<u8>>()),
    }
    data.truncate(1 << 16);
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
        let mut data = seeds[random.below(seeds.len() as u64) as usize].clone();
        (0..=random.below(8)).for_each(|_| mutate(&mut random, &mut data));
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
