//! Random lives of a small disk, against a model that remembers each write by itself.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const BLOCKS: u8 = 12;

type Blocks = BTreeSet<u8>;

#[derive(Clone, Copy, Debug)]
enum Act {
    Write(u8),
    /// A cut; the mark of this boundary may be kept, as a checkpoint or as a snapshot.
    Cut {
        checkpoint: bool,
        snapshot: bool,
    },
    Merge {
        at: u8,
        count: u8,
        up: bool,
        /// Called off when so many blocks were copied.
        stops: Option<u8>,
    },
    DropCheckpoint(u8),
    DropSnapshot(u8),
    /// A checkpoint of a snapshot's instant.
    Adopt(u8),
    Revert(u8),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (0..BLOCKS).prop_map(Act::Write),
        4 => (any::<bool>(), any::<bool>()).prop_map(|(checkpoint, snapshot)| Act::Cut { checkpoint, snapshot }),
        3 => (any::<u8>(), 2..5_u8, any::<bool>(), proptest::option::weighted(0.2, 0..4_u8))
            .prop_map(|(at, count, up, stops)| Act::Merge { at, count, up, stops }),
        1 => any::<u8>().prop_map(Act::DropCheckpoint),
        2 => any::<u8>().prop_map(Act::DropSnapshot),
        1 => any::<u8>().prop_map(Act::Adopt),
        1 => any::<u8>().prop_map(Act::Revert),
    ]
}

/// What a boundary was like: the writes that led to it, each by a number of its own, and the content they made.
#[derive(Clone, Debug, Default)]
struct Past {
    writes: BTreeMap<u32, u8>,
    content: BTreeMap<u8, u32>,
}

struct Layer {
    number: u32,
    /// The highest number that was merged down into it.
    last: u32,
    holds: Blocks,
}

struct World {
    chain: Vec<Layer>,
    next: u32,
    history: History,
    files: Vec<Blocks>,
    now: Past,
    count: u32,
    /// Boundaries with what they were like.
    checkpoints: Vec<(Boundary, Past)>,
    /// The same by the number of the layer that holds them.
    snapshots: Vec<(u32, Past)>,
}

impl World {
    fn new() -> Self {
        let base = Layer { number: 0, last: 0, holds: (0..BLOCKS).collect() };
        Self {
            chain: vec![base],
            next: 1,
            history: History::default(),
            files: Vec::new(),
            now: Past::default(),
            count: 0,
            checkpoints: Vec::new(),
            snapshots: Vec::new(),
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Write(block) => {
                self.count += 1;
                self.now.writes.insert(self.count, block);
                self.now.content.insert(block, self.count);
                self.chain.last_mut().unwrap().holds.insert(block);
            }
            Act::Cut { checkpoint, snapshot } => {
                let held = self.chain.last().unwrap();
                let now = self.now.clone();
                checkpoint.then(|| self.checkpoints.push((held.last + 1, now.clone())));
                snapshot.then(|| self.snapshots.push((held.number, now)));
                self.push();
            }
            Act::Merge { at, count, up, stops } => self.merge(at as usize, count as usize, up, stops),
            Act::DropCheckpoint(which) => drop_one(&mut self.checkpoints, which),
            Act::DropSnapshot(which) => drop_one(&mut self.snapshots, which),
            Act::Adopt(which) => {
                if let Some((held, past)) = pick(&self.snapshots, which) {
                    let held = self.chain.iter().find(|layer| layer.number == held).unwrap();
                    self.checkpoints.push((held.last + 1, past));
                }
            }
            Act::Revert(which) => self.revert(which),
        }
        self.history.prune(&self.points());
    }

    fn push(&mut self) {
        // Now and then a number is skipped.
        self.next += self.next.is_multiple_of(5) as u32;
        self.chain.push(Layer { number: self.next, last: self.next, holds: Blocks::new() });
        self.next += 1;
    }

    fn numbers(&self) -> Vec<u32> {
        self.chain.iter().map(|layer| layer.number).collect()
    }

    fn boundary_of(&self, held: u32) -> Boundary {
        self.chain.iter().find(|layer| layer.number == held).unwrap().last + 1
    }

    fn points(&self) -> BTreeSet<Boundary> {
        let snapshots = self.snapshots.iter().map(|(held, _)| self.boundary_of(*held));
        self.checkpoints.iter().map(|(boundary, _)| *boundary).chain(snapshots).collect()
    }

    fn fold(&mut self, pieces: Vec<Piece>) {
        for piece in pieces {
            let layers = self.chain.iter().filter(|layer| piece.layers.contains(&layer.number));
            let mut bits: Blocks = layers.flat_map(|layer| layer.holds.clone()).collect();
            for folded in &piece.joins {
                bits.extend(&self.files[folded.bits.unwrap() as usize]);
            }
            self.files.push(bits);
            self.history.fold(&piece, Some(self.files.len() as u64 - 1));
        }
    }

    fn merge(&mut self, at: usize, count: usize, up: bool, stops: Option<u8>) {
        // The active layer never takes part.
        let frozen = self.chain.len() - 1;
        if frozen < 2 {
            return;
        }
        let low = at % (frozen - 1);
        let high = (low + count - 1).min(frozen - 1);
        let numbers: Vec<_> = self.chain[low..=high].iter().map(|layer| layer.number).collect();
        if self.snapshots.iter().any(|(held, _)| numbers[..numbers.len() - 1].contains(held)) {
            return;
        }
        let pieces = self.history.pieces_of_merge(&numbers, &self.numbers(), &self.points());
        self.fold(pieces);
        let all: Blocks = self.chain[low..=high].iter().flat_map(|layer| layer.holds.clone()).collect();
        let target = if up { high } else { low };
        if let Some(copied) = stops {
            self.chain[target].holds.extend(all.iter().take(copied as usize));
            return;
        }
        let last = self.chain[high].last;
        self.chain[target].holds = all;
        self.chain[target].last = last;
        let (from, to) = (self.chain[high].number, self.chain[target].number);
        self.snapshots.iter_mut().filter(|(held, _)| *held == from).for_each(|(held, _)| *held = to);
        self.chain.retain(|layer| layer.number == to || !numbers.contains(&layer.number));
    }

    fn revert(&mut self, which: u8) {
        let Some((held, past)) = pick(&self.snapshots, which) else { return };
        let at = self.chain.iter().position(|layer| layer.number == held).unwrap();
        let gone: Vec<_> = self.chain[at + 1..].iter().map(|layer| layer.number).collect();
        self.snapshots.retain(|(held, _)| !gone.contains(held));
        self.history.revert(self.boundary_of(held), self.next);
        let pieces = self.history.pieces(&gone, &self.numbers()[..=at], &self.points());
        self.fold(pieces);
        self.chain.truncate(at + 1);
        self.next += 1;
        let number = self.next - 1;
        self.chain.push(Layer { number, last: number, holds: Blocks::new() });
        self.now = past;
    }

    fn changes(&self, from: Boundary, to: Boundary) -> Blocks {
        let cover = self.history.between(&self.numbers(), from, to);
        let mut found = Blocks::new();
        let layers = self.chain.iter().filter(|layer| cover.layers.contains(&layer.number));
        layers.for_each(|layer| found.extend(&layer.holds));
        cover.bits.iter().for_each(|bits| found.extend(&self.files[bits.unwrap() as usize]));
        found
    }

    fn check(&self) {
        let snapshots = self.snapshots.iter().map(|(held, past)| (self.boundary_of(*held), past));
        let mut points: Vec<_> = self.checkpoints.iter().map(|(at, past)| (*at, past)).collect();
        points.extend(snapshots);
        points.push((NOW, &self.now));
        for (from, before) in &points {
            for (to, after) in &points {
                let found = self.changes(*from, *to);
                let differs = |block: &u8| before.content.get(block) != after.content.get(block);
                let must: Blocks = (0..BLOCKS).filter(differs).collect();
                assert!(found.is_superset(&must), "{from} to {to}: {found:?} lacks some of {must:?}");
                let lacks = |(number, block): (&u32, &u8), other: &Past| {
                    (!other.writes.contains_key(number)).then_some(*block)
                };
                let here = before.writes.iter().filter_map(|write| lacks(write, after));
                let there = after.writes.iter().filter_map(|write| lacks(write, before));
                let touched: Blocks = here.chain(there).collect();
                assert_eq!(found, touched, "{from} to {to}: {:?}", self.history);
            }
        }
    }
}

fn pick(list: &[(u32, Past)], which: u8) -> Option<(u32, Past)> {
    list.get(which as usize % list.len().max(1)).cloned()
}

fn drop_one(list: &mut Vec<(u32, Past)>, which: u8) {
    if !list.is_empty() {
        list.remove(which as usize % list.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// What differs between any two instants is found, and nothing else but what was written on the way from the one to
    /// the other: after merges in both directions, some called off in their midst, deletes and reverts.
    #[test]
    fn changes_between_any_two_instants_are_what_was_written_between(acts in proptest::collection::vec(act(), 1..60)) {
        let mut world = World::new();
        for act in acts {
            world.act(act);
            world.check();
        }
    }
}

/// Each night a checkpoint replaces the one of the night before, beside one that stays, and the layers are merged.
#[test]
fn what_is_remembered_does_not_grow_with_time() {
    for (up, drops_first) in [(false, true), (false, false), (true, true), (true, false)] {
        let mut world = World::new();
        world.act(Act::Cut { checkpoint: true, snapshot: false });
        world.act(Act::Cut { checkpoint: true, snapshot: false });
        for night in 0..50_u8 {
            world.act(Act::Write(night % BLOCKS));
            world.act(Act::Cut { checkpoint: true, snapshot: false });
            let mut acts = [Act::DropCheckpoint(1), Act::Merge { at: 0, count: 4, up, stops: None }];
            if !drops_first {
                acts.reverse();
            }
            acts.into_iter().for_each(|act| world.act(act));
            world.check();
            assert!(world.history.folded.len() <= 3, "{:?}", world.history);
            assert!(world.chain.len() <= 3);
        }
        world.checkpoints.clear();
        world.history.prune(&world.points());
        assert!(world.history.is_empty(), "{:?}", world.history);
    }
}
