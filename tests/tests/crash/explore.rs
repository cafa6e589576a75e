//! Walks along a life, losing the power on the way.

use std::sync::Arc;

use block::testing::Random;

use crate::left::{Judge, Left, inspect};
use crate::timeline::{Disks, Event, Forget, Timeline};
use crate::world::{Mark, Named, Snapshot, World};

/// Steps of a life.
const STEPS: usize = 40;
/// One in so many writes is a place where the power is lost; each sync is.
const PLACES: u64 = 40;
/// Chances, in percent, of an unsynced sector to be on the disk: none, all, and some.
const CHANCES: [u64; 4] = [0, 100, 50, 15];

/// What is promised at a moment.
#[derive(Default)]
struct Promised {
    /// Contents that may show, the oldest first.
    contents: Vec<Arc<Vec<u8>>>,
    /// The number of the first of them.
    first: usize,
    images: Vec<Named>,
    snapshots: Vec<Snapshot>,
}

impl Promised {
    fn advance(&mut self, mark: &Mark) {
        match mark {
            Mark::Contents(contents) => self.contents.push(Arc::clone(contents)),
            Mark::Flushed(number) => {
                self.contents.drain(..number.saturating_sub(self.first));
                self.first = self.first.max(*number);
            }
            Mark::Manifest(images, snapshots) => {
                self.images.clone_from(images);
                self.snapshots.clone_from(snapshots);
            }
        }
    }

    /// Whether the disk may show this.
    fn allows(&self, found: &[u8]) -> Result<(), String> {
        let sizes: Vec<usize> = self.contents.iter().map(|contents| contents.len()).collect();
        if !sizes.contains(&found.len()) {
            return Err(format!("the disk has {} bytes, not one of {sizes:?}", found.len()));
        }
        // A write of a part of a sector reads the rest of it, so bytes count each for themselves. Past the end of a
        // smaller one there was nothing: zeroes.
        let known = |at: usize, byte: u8| {
            self.contents.iter().any(|contents| contents.get(at).copied().unwrap_or(0) == byte)
        };
        match found.iter().enumerate().find(|(at, byte)| !known(*at, **byte)) {
            None => Ok(()),
            Some((at, byte)) => Err(format!("byte {at:#x} is {byte}, neither old nor new")),
        }
    }
}

/// Lives the life of that seed, and looks at what losing the power could have left: how many states were seen.
pub(crate) fn explore(seed: u64, forget: Option<Forget>) -> Result<usize, String> {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut world = World::new(seed, forget, folder.path());
    world.live(STEPS);
    let events = Timeline::events(&world.timeline);
    let (mut disks, mut promised, mut random) = (Disks::default(), Promised::default(), Random(seed));
    let (mut judge, mut states) = (Judge::default(), 0);
    for (place, event) in events.iter().enumerate() {
        let is_sync = matches!(event, Event::Sync { .. } | Event::Mark(Mark::Manifest(..)));
        if !promised.images.is_empty() && disks.is_at_risk() && (is_sync || random.one_in(PLACES)) {
            for chance in CHANCES {
                states += 1;
                look(&disks, &promised, chance, &mut random, &mut judge, folder.path())
                    .map_err(|error| format!("power lost before event {place}, {chance} %: {error}"))?;
            }
        }
        disks.advance(event);
        if let Event::Mark(mark) = event {
            promised.advance(mark);
        }
    }
    Ok(states)
}

fn look(
    disks: &Disks,
    promised: &Promised,
    chance: u64,
    random: &mut Random,
    judge: &mut Judge,
    folder: &std::path::Path,
) -> Result<(), String> {
    let chain = promised.images.iter().map(|image| Left {
        number: image.number,
        raw: image.raw,
        bytes: disks.left(image.number, chance, random),
    });
    let shown: Vec<u32> = promised.snapshots.iter().map(|(number, _)| *number).collect();
    let (found, snapshots) = inspect(judge, folder, chain.collect(), &shown)?;
    promised.allows(&found)?;
    for ((number, expected), found) in promised.snapshots.iter().zip(snapshots) {
        if **expected != found {
            return Err(format!("the snapshot that image {number} holds has changed"));
        }
    }
    Ok(())
}
