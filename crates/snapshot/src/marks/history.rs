//! A disk's history, in numbers: which layers, and which folded changes, tell what changed between two instants.
//!
//! Layers' numbers grow along a chain and are never used again, so a number names an instant too: *boundary* `n` is the
//! one before which no layer numbered `n` or higher was written. What changed between two boundaries is what the layers
//! numbered from the one up to the other hold themselves.
//!
//! Two things disturb that, and are written down here:
//! - A job merges layers, and what boundary a change lies on which side of is lost. So before that the changes are
//!   *folded*: written to bits files, each for a range of numbers without a boundary inside that anybody may still ask
//!   for. A layer whose number lies in such a range does not count any more, whatever a job writes to it.
//! - A disk is reverted, and its history branches. The *lineage* of a boundary is the set of numbers whose changes make up
//!   the disk's content then; two contents differ where numbers of one lineage and not of the other have changes.

use std::collections::BTreeSet;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// An instant in a disk's life: the lowest number that a layer which was active after it can have.
pub(crate) type Boundary = u32;

/// After everything.
pub(crate) const NOW: Boundary = u32::MAX;

/// What is known of a disk's past apart from its layers.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct History {
    /// Ranges do not overlap.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    folded: Vec<Folded>,
    /// The oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    reverts: Vec<Revert>,
}

/// What the layers with these numbers held.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Folded {
    from: Boundary,
    to: Boundary,
    /// The bits file; `None` if what it held is lost.
    pub(crate) bits: Option<u64>,
}

/// The disk was brought back.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Revert {
    /// Its content became again what it had been at this boundary.
    to: Boundary,
    /// The first number after it.
    at: Boundary,
}

/// Where changes are found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Cover {
    /// In these layers, by number.
    pub(crate) layers: Vec<u32>,
    /// In these bits files; a `None` is lost.
    pub(crate) bits: Vec<Option<u64>>,
}

/// Layers, and what was folded before, that are to become one folded range.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Piece {
    from: Boundary,
    to: Boundary,
    /// By number.
    pub(crate) layers: Vec<u32>,
    pub(crate) joins: Vec<Folded>,
}

impl Piece {
    fn of(number: u32) -> Self {
        Self { from: number, to: number + 1, layers: vec![number], joins: Vec::new() }
    }

    fn known(folded: &Folded) -> Self {
        Self { from: folded.from, to: folded.to, layers: Vec::new(), joins: vec![folded.clone()] }
    }
}

impl History {
    /// Whether there is nothing to remember.
    pub(crate) fn is_empty(&self) -> bool {
        self.folded.is_empty() && self.reverts.is_empty()
    }

    /// Whether all is of instants that a disk can have had whose next layer has the number `next`.
    pub(crate) fn is_sound(&self, next: u32) -> bool {
        self.folded.iter().all(|folded| folded.from < folded.to && folded.to <= next)
            && self.reverts.iter().all(|revert| revert.to <= revert.at && revert.at < next)
    }

    /// The bits files that it names.
    pub(crate) fn files(&self) -> impl Iterator<Item = u64> {
        self.folded.iter().filter_map(|folded| folded.bits)
    }

    /// Where the changes between two boundaries are, for a chain of these layers.
    pub(crate) fn between(&self, layers: &[u32], from: Boundary, to: Boundary) -> Cover {
        let numbers = difference(&self.lineage(from), &self.lineage(to));
        let counts = |number: &u32| contains(&numbers, *number) && !self.is_folded(*number);
        let touches =
            |folded: &&Folded| numbers.iter().any(|range| range.start < folded.to && folded.from < range.end);
        Cover {
            layers: layers.iter().copied().filter(counts).collect(),
            bits: self.folded.iter().filter(touches).map(|folded| folded.bits).collect(),
        }
    }

    /// Whether the changes of layers with this number are told by bits.
    pub(crate) fn is_folded(&self, number: u32) -> bool {
        self.folded.iter().any(|folded| (folded.from..folded.to).contains(&number))
    }

    /// What is to be folded before `layers`, neighbours in the chain, become one. `points` are the boundaries that may
    /// still be asked for, `chain` are all layers.
    pub(crate) fn pieces_of_merge(
        &self,
        layers: &[u32],
        chain: &[u32],
        points: &BTreeSet<Boundary>,
    ) -> Vec<Piece> {
        let (Some(&lowest), Some(&highest)) = (layers.first(), layers.last()) else { return Vec::new() };
        let divides = self.splits(points).range(lowest + 1..=highest).next().is_some();
        match divides || layers.iter().any(|number| self.is_folded(*number)) {
            true => self.pieces(layers, chain, points),
            false => Vec::new(),
        }
    }

    /// What is to be folded of layers that are about to leave the chain, or to take in others. What was folded before becomes
    /// one with it, and with one another, as far as nobody can ask about the boundaries between: so the files are not more
    /// than there are questions.
    pub(crate) fn pieces(&self, layers: &[u32], chain: &[u32], points: &BTreeSet<Boundary>) -> Vec<Piece> {
        let splits = self.splits(points);
        let cell = |number: u32| splits.range(..=number).next_back().copied();
        let is_apart = |one: &Piece, next: &Piece| {
            let stays = |number: &u32| (one.to..next.from).contains(number) && !layers.contains(number);
            cell(one.from) != cell(next.from) || chain.iter().any(stays)
        };
        let own = layers.iter().filter(|number| !self.is_folded(**number)).map(|number| Piece::of(*number));
        let mut parts: Vec<_> = own.chain(self.folded.iter().map(Piece::known)).collect();
        parts.sort_by_key(|part| part.from);
        let mut pieces: Vec<Piece> = Vec::new();
        for part in parts {
            match pieces.last_mut().filter(|last| !is_apart(last, &part)) {
                Some(last) => {
                    last.to = part.to;
                    last.layers.extend(part.layers);
                    last.joins.extend(part.joins);
                }
                None => pieces.push(part),
            }
        }
        let is_new = |piece: &Piece| !piece.layers.is_empty() || piece.joins.len() > 1;
        pieces.retain(|piece| is_new(piece) && self.is_needed(piece.from, points));
        pieces
    }

    /// A piece is folded: its changes are in this bits file, or lost.
    pub(crate) fn fold(&mut self, piece: &Piece, bits: Option<u64>) {
        self.folded.retain(|folded| !piece.joins.contains(folded));
        self.folded.push(Folded { from: piece.from, to: piece.to, bits });
        self.folded.sort_by_key(|folded| folded.from);
    }

    /// The disk's content is from now on that of the boundary `to`; `at` is the number of the layer that was put there.
    pub(crate) fn revert(&mut self, to: Boundary, at: Boundary) {
        self.reverts.push(Revert { to, at });
    }

    /// Forgets what no question between two of `points`, or one of them and now, can be about.
    pub(crate) fn prune(&mut self, points: &BTreeSet<Boundary>) {
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.reverts)
            .into_iter()
            .partition(|revert| points.range(revert.to + 1..).next().is_some_and(|point| *point < revert.at));
        self.reverts = kept;
        // Nobody asks for the branch: without the revert it would lie on the way to now.
        self.folded.retain(|folded| !gone.iter().any(|revert| (revert.to..revert.at).contains(&folded.from)));
        let needed: Vec<_> =
            self.folded.iter().filter(|folded| self.is_needed(folded.from, points)).cloned().collect();
        self.folded = needed;
    }

    /// The numbers whose changes make up the content at a boundary, newest first.
    fn lineage(&self, point: Boundary) -> Vec<Range<u32>> {
        let (mut lineage, mut end) = (Vec::new(), point);
        for revert in self.reverts.iter().rev() {
            if end >= revert.at {
                lineage.push(revert.at..end);
                end = revert.to;
            }
        }
        lineage.push(0..end);
        lineage
    }

    /// Whether some of `points`, or now, have the number in their lineage and others have not.
    fn is_needed(&self, number: u32, points: &BTreeSet<Boundary>) -> bool {
        let has = |point: &Boundary| contains(&self.lineage(*point), number);
        let now = has(&NOW);
        points.iter().any(|point| has(point) != now)
    }

    /// The boundaries between which all numbers are alike.
    fn splits(&self, points: &BTreeSet<Boundary>) -> BTreeSet<Boundary> {
        let reverts = self.reverts.iter().flat_map(|revert| [revert.to, revert.at]);
        points.iter().copied().chain(reverts).collect()
    }
}

fn contains(ranges: &[Range<u32>], number: u32) -> bool {
    ranges.iter().any(|range| range.contains(&number))
}

/// The numbers that are in one of the lists and not in the other.
fn difference(one: &[Range<u32>], other: &[Range<u32>]) -> Vec<Range<u32>> {
    let ends: BTreeSet<_> = one.iter().chain(other).flat_map(|range| [range.start, range.end]).collect();
    let ends: Vec<_> = ends.into_iter().collect();
    let differs =
        |pair: &&[u32]| matches!(pair, [start, _] if contains(one, *start) != contains(other, *start));
    ends.windows(2).filter(differs).filter_map(|pair| Some(*pair.first()?..*pair.last()?)).collect()
}

#[cfg(test)]
mod tests;
