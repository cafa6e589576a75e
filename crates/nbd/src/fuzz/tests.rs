//! Each target on its seeds and on mutations of them, for a moment.

use super::*;
use crate::testing::{info_data, meta_data, option};
use std::path::PathBuf;
use std::time::Instant;

/// How long the mutations of one target may take.
const MOMENT: Duration = Duration::from_secs(3);

/// The seeds that `fuzz/` begins with. They are written by this test when the variable `FRAZIL_WRITE_SEEDS` is set.
fn seeds(target: &str, made: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
    if std::env::var_os("FRAZIL_WRITE_SEEDS").is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        for (number, seed) in made.iter().enumerate() {
            std::fs::write(folder.join(number.to_string()), seed).unwrap();
        }
    }
    for (number, seed) in made.iter().enumerate() {
        assert!(std::fs::read(folder.join(number.to_string())).unwrap() == *seed, "the seeds are old");
    }
    made
}

fn next(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize
}

fn mutate(seeds: &[Vec<u8>], state: &mut u64) -> Vec<u8> {
    let mut bytes = seeds[next(state) % seeds.len()].clone();
    for _ in 0..1 + next(state) % 6 {
        let at = next(state) % (bytes.len() + 1);
        match next(state) % 5 {
            0 if at < bytes.len() => bytes[at] ^= 1 << (next(state) % 8),
            1 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][next(state) % 5],
            2 => bytes.truncate(at),
            3 => bytes.insert(at, next(state) as u8),
            _ => {
                let other = &seeds[next(state) % seeds.len()];
                let from = next(state) % (other.len() + 1);
                bytes.splice(at.., other[from..].iter().copied());
            }
        }
    }
    bytes
}

fn run(target: Target, seeds: &[Vec<u8>]) {
    seeds.iter().for_each(|seed| target(seed));
    let (begin, mut state) = (Instant::now(), 7);
    while begin.elapsed() < MOMENT {
        target(&mutate(seeds, &mut state));
    }
}

#[test]
fn negotiations_go_as_the_model_says() {
    let talk = |mode: u8, options: &[Vec<u8>]| [&[mode, 0, 0, 0, 3][..], &options.concat()].concat();
    let made = vec![
        talk(0, &[option(3, &[]), option(8, &[]), option(9, &meta_data("a", &[])), option(2, &[])]),
        talk(0, &[option(11, &[]), option(10, &meta_data("a", &["base:allocation", "qemu:"]))]),
        talk(2, &[option(6, &info_data("a", &[1, 2, 3])), option(5, &[]), option(7, &info_data("a", &[3]))]),
        talk(1, &[option(3, &[]), option(7, &info_data("a", &[])), option(5, &[])]),
        talk(0, &[option(1, b"a")]),
    ];
    run(negotiation, &seeds("nbd_negotiation", made));
}

#[test]
fn requests_do_what_the_model_says() {
    let asks = [
        [1, 0, 0, 0, 0, 0, 0, 0, 16, 0],
        [0, 4, 0, 0, 0, 7, 0, 4, 0, 0],
        [1, 32, 0, 1, 0, 0, 0, 1, 0, 1],
        [6, 3, 0, 0, 64, 0, 0, 1, 0, 0],
        [4, 1, 62, 0, 0, 9, 0, 0, 0, 8],
        [7, 8, 0, 0, 0, 0, 0, 3, 0, 0],
        [5, 0, 0, 0, 0, 0, 63, 0, 0, 0],
        [3, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ];
    let made = [0, 1, 2, 0x81].map(|mode| [&[mode][..], &asks.concat()].concat()).to_vec();
    run(requests, &seeds("nbd_requests", made));
}
