//! What fuzz targets are made with, and their bodies driven for a moment in ordinary tests.
#![allow(clippy::unwrap_used, reason = "seeds that are not there are a test's failure")]

use std::fs;
use std::panic::{catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::Random;

/// Bytes of the longest input, as for `make fuzz`.
const LONGEST: usize = 1 << 16;

/// Mutations that are tried at least.
const LEAST: u64 = 100;

/// A fuzzer's bytes taken as numbers; zeroes once they are used up.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.number(1) as u8
    }

    /// The next `len` bytes, at most eight, the highest first.
    pub fn number(&mut self, len: usize) -> u64 {
        self.bytes(len).iter().fold(0, |number, byte| (number << 8) | u64::from(*byte))
    }

    /// The next `len` bytes, or as many as there are.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        now
    }

    /// Whether all are used up.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Changes `data` as a fuzzer does: bits, bytes, words, pieces moved, left out, and put in twice.
pub fn mutate(random: &mut Random, data: &mut Vec<u8>) {
    const VALUES: [u8; 9] = [0, 1, 0x7f, 0x80, 0xfe, 0xff, 2, 8, 0x40];
    let mut below = |bound: usize| random.below(bound as u64) as usize;
    let at = below(data.len());
    match below(8) {
        0 if !data.is_empty() => data[at] ^= 1 << below(8),
        1 | 2 if !data.is_empty() => data[at] = VALUES[below(VALUES.len())],
        3 if !data.is_empty() => data[at] = below(256) as u8,
        4 => {
            let end = (at + below(9)).min(data.len());
            data[at.min(end)..end].fill(VALUES[below(VALUES.len())]);
        }
        5 => data.truncate(below(data.len() + 1)),
        6 => {
            let piece: Vec<u8> = data[at..].iter().take(1 + below(32)).copied().collect();
            let to = below(data.len() + 1);
            data.splice(to..to, piece);
        }
        _ => data.extend((0..below(24)).map(|_| VALUES[below(VALUES.len())]).collect::<Vec<u8>>()),
    }
    data.truncate(LONGEST);
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(name)
}

/// The seeds of the target `name`, in `fuzz/seeds`.
fn seeds(name: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Sees that the seeds of the target `name` are these, by their names. They are written when the variable
/// `FRAZIL_WRITE_SEEDS` is set.
pub fn keep_seeds(name: &str, made: &[(&str, Vec<u8>)]) {
    let folder = folder(name);
    if std::env::var_os("FRAZIL_WRITE_SEEDS").is_some() {
        fs::create_dir_all(&folder).unwrap();
        made.iter().for_each(|(seed, bytes)| fs::write(folder.join(seed), bytes).unwrap());
    }
    for (seed, bytes) in made {
        let kept = fs::read(folder.join(seed)).unwrap_or_default();
        assert!(kept == *bytes, "{name}/{seed} is old: set FRAZIL_WRITE_SEEDS");
    }
}

/// Runs the body of the target `name` on its seeds, and for `time` on mutations of them. A panic is passed on, with the
/// input that led to it.
pub fn drive(name: &str, target: fn(&[u8]), time: Duration) {
    let seeds = seeds(name);
    assert!(!seeds.is_empty(), "{name} has no seeds");
    let run = |data: &[u8], round: u64| {
        if let Err(panic) = catch_unwind(|| target(data)) {
            eprintln!("{name}, round {round}: {data:02x?}");
            resume_unwind(panic);
        }
    };
    seeds.iter().for_each(|seed| run(seed, 0));
    let (mut random, began, mut rounds) = (Random(1), Instant::now(), 0_u64);
    // However slow the machine is, some are.
    while rounds < LEAST || began.elapsed() < time {
        let mut data = seeds[random.below(seeds.len() as u64) as usize].clone();
        (0..=random.below(8)).for_each(|_| mutate(&mut random, &mut data));
        rounds += 1;
        run(&data, rounds);
    }
    eprintln!("{name}: {rounds} mutations in {:?}", began.elapsed());
}
