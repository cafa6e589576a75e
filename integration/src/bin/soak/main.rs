//! Hours of all at once, on a real guest: snapshots, increments over NBD, bitmaps, deletes that merge layers, kills. At
//! the end nothing is lost, and nothing has grown.
//!
//! ```text
//! soak [--minutes N] [--seed N]        two hours if nothing is said
//!
//!   kills    two thirds of the time: rounds of half a minute; in some the daemon is killed at a random moment
//!   steady   the last third, one life of the daemon: memory, descriptors and threads stay what they were
//! ```
//! In each round: a snapshot with a freeze, the increment since the one before pulled over NBD onto a copy of each disk,
//! a dirty bitmap cleared, a checkpoint moved on, all but the newest snapshots deleted. Now and then the copies are
//! compared with exports, and a second guest boots with a snapshot to prove that all its writers had synced is in it.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use frazil_integration::{Context, Error, Result, Scratch};

use block::testing::Random;
use health::Health;
use tally::Tally;
use world::World;

mod health;
mod tally;
mod world;

/// From the beginning of a round to that of the next.
const ROUND: Duration = Duration::from_secs(30);
/// The daemon is killed in one of so many rounds.
const KILL_ONE_IN: u64 = 3;
/// So many rounds apart are the proofs that take a second guest.
const PROOF: u64 = 20;

fn main() -> ExitCode {
    match options().and_then(|(time, seed)| Scratch::with("soak", |scratch| soak(scratch, time, seed))) {
        Ok(tally) => {
            println!("{tally}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<(Duration, u64)> {
    let (mut minutes, mut seed) = (120, 1);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value: u64 =
            words.next().unwrap_or_default().parse().context(format!("{word} takes a number"))?;
        match word.as_str() {
            "--minutes" => minutes = value,
            "--seed" => seed = value,
            _ => return Err(Error::new(format!("unknown option {word}"))),
        }
    }
    Ok((Duration::from_secs(minutes * 60), seed))
}

fn soak(scratch: &Scratch, time: Duration, seed: u64) -> Result<Tally> {
    let (start, mut dice) = (Instant::now(), Random(seed));
    let mut world = World::start(scratch)?;
    let mut tally = Tally::default();
    let mut steady: Option<Health> = None;
    while start.elapsed() < time {
        let began = Instant::now();
        let with_kills = start.elapsed() < time * 2 / 3;
        match with_kills && dice.one_in(KILL_ONE_IN) {
            true => world.round_with_a_kill(&mut tally, &mut dice)?,
            false => world.round(&mut tally)?,
        }
        let now = world.rest()?;
        say(start, tally.rounds, &now);
        tally.saw(&now);
        if !with_kills {
            // The first rounds of a life fill caches that are bounded.
            match &steady {
                Some(first) => now.check_against(first)?,
                None => steady = Some(now),
            }
        }
        tally.rounds += 1;
        if tally.rounds.is_multiple_of(PROOF) {
            world.prove(&mut tally)?;
        }
        std::thread::sleep(ROUND.saturating_sub(began.elapsed()));
    }
    world.prove(&mut tally)?;
    world.finish()?;
    tally.time = start.elapsed();
    Ok(tally)
}

fn say(start: Instant, round: u64, health: &Health) {
    eprintln!("soak: {:>5} s, round {round}: {health}", start.elapsed().as_secs());
}
