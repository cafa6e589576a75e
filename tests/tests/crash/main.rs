//! Loss of power, explored: at any place in the life of a chain (in the middle of a flush, a snapshot, a commit, a
//! stream, a resize), whatever of the unsynced sectors reached the disks, the chain opens again, `qemu-img check`
//! finds no error, what was flushed is there, every other sector holds its old or its new bytes, and sealed snapshots
//! are what they were.
//!
//! `FRAZIL_CRASH_STATES=N` explores about N states in place of the usual ones.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what fails here fails the test")]

mod base;
mod explore;
mod left;
mod timeline;
mod world;

use explore::explore;
use timeline::Forget;

/// States that one run looks at, all together.
const STATES: usize = 6000;
/// They are divided among so many tests, for several processors.
const PARTS: usize = 4;

/// A part of the usual exploration.
fn part(number: u64) {
    let asked = std::env::var("FRAZIL_CRASH_STATES").ok().and_then(|count| count.parse().ok());
    let wanted = asked.unwrap_or(STATES).div_ceil(PARTS);
    let (mut seen, mut seed) = (0, number);
    while seen < wanted {
        seen += explore(seed, None).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        seed += PARTS as u64;
    }
    eprintln!("{seen} states after a loss of power, in {} lives", seed / PARTS as u64);
}

#[test]
fn nothing_is_lost_one() {
    part(0);
}

#[test]
fn nothing_is_lost_two() {
    part(1);
}

#[test]
fn nothing_is_lost_three() {
    part(2);
}

#[test]
fn nothing_is_lost_four() {
    part(3);
}

/// The explorer sees a fault when there is one: each of these syncs is needed. (The one that links a new refcount block
/// is rare in these lives: the crate's own test leaves it out.)
#[test]
fn a_sync_that_is_left_out_is_found() {
    for (operation, nth) in
        [("flush", 0), ("flush", 1), ("create", 0), ("seal", 0), ("commit", 0), ("grow", 0)]
    {
        let forget = Forget { operation, nth };
        let found = (0..5).any(|seed| explore(seed, Some(forget)).is_err());
        assert!(found, "{forget:?} was left out, and nobody noticed");
    }
}
