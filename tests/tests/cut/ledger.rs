//! What was asked of a disk and when, and the proof that an image is a prefix of it.
//!
//! All writers of all disks share a clock that only counts. A change of a place (a block of the disk) reads it before
//! it is submitted and after its answer was seen; whoever takes a snapshot reads it before asking and after the answer.
//! A place has one change in flight at most, so that its changes have an order, and what it holds tells how far it got.
//!
//! An image of all disks is the state at one instant if there is a choice of one change for each place, with the
//! content that was found there, such that
//! - all that was answered before the snapshot was asked for is in it,
//! - nothing that was submitted after the snapshot's answer is in it, and
//! - there is no pair of changes, on whichever disks, of which the first was answered before the second was submitted,
//!   and only the second is in it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Reads of it are unique and grow.
#[derive(Debug)]
pub(crate) struct Clock(AtomicU64);

impl Clock {
    pub(crate) fn new() -> Self {
        // 0 is the time of the zeroes that a new disk holds.
        Self(AtomicU64::new(1))
    }

    pub(crate) fn now(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }
}

/// One change of a place. What it wrote, if not zeroes, is known by the time of its submission.
#[derive(Clone, Copy, Debug)]
struct Change {
    zero: bool,
    submitted: u64,
    /// [`u64::MAX`] as long as there is no answer.
    answered: u64,
}

/// The places of one queue of one disk. Queues take turns, block by block, so that several share each subcluster if
/// blocks are smaller.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    size: usize,
    first: u64,
    stride: u64,
    places: Vec<Vec<Change>>,
}

impl Ledger {
    /// `places` blocks of `size` bytes, those of queue `queue` of `queues`.
    pub(crate) fn new(size: usize, queue: usize, queues: usize, places: usize) -> Self {
        let new = Change { zero: true, submitted: 0, answered: 0 };
        let (first, stride) = ((queue * size) as u64, (queues * size) as u64);
        Self { size, first, stride, places: vec![vec![new]; places] }
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    pub(crate) fn places(&self) -> usize {
        self.places.len()
    }

    /// Where a place is, in bytes.
    pub(crate) fn offset(&self, place: usize) -> u64 {
        self.first + place as u64 * self.stride
    }

    /// A stamp is about to be submitted: its bytes.
    pub(crate) fn stamp(&mut self, place: usize, now: u64) -> Vec<u8> {
        self.places[place].push(Change { zero: false, submitted: now, answered: u64::MAX });
        self.bytes(place, now)
    }

    /// Zeroes are about to be submitted.
    pub(crate) fn zero(&mut self, place: usize, now: u64) {
        self.places[place].push(Change { zero: true, submitted: now, answered: u64::MAX });
    }

    /// The change in flight has been answered.
    pub(crate) fn answered(&mut self, place: usize, now: u64) {
        self.places[place].last_mut().unwrap().answered = now;
    }

    /// What the place holds if no change of it is in flight.
    pub(crate) fn content(&self, place: usize) -> Vec<u8> {
        match self.places[place].last() {
            Some(Change { zero: false, submitted, .. }) => self.bytes(place, *submitted),
            _ => vec![0; self.size],
        }
    }

    /// How many changes were answered in all.
    pub(crate) fn count(&self) -> usize {
        let answered =
            |place: &Vec<Change>| place.iter().filter(|change| change.answered != u64::MAX).count();
        self.places.iter().map(answered).sum::<usize>() - self.places.len()
    }

    fn bytes(&self, place: usize, stamp: u64) -> Vec<u8> {
        let words = [stamp, self.offset(place), !stamp, 0x5eed];
        words.map(u64::to_le_bytes).concat().repeat(self.size / 32)
    }

    fn block<'a>(&self, image: &'a [u8], place: usize) -> &'a [u8] {
        let start = self.offset(place) as usize;
        &image[start..start + self.size]
    }

    /// The stamp that fills each place, 0 for zeroes; `None` where the block is neither.
    fn contents(&self, image: &[u8]) -> Vec<Option<u64>> {
        let zeroes = vec![0; self.size];
        let content = |place| {
            let block = self.block(image, place);
            let stamp = u64::from_le_bytes(block[..8].try_into().unwrap());
            (block == if stamp == 0 { zeroes.clone() } else { self.bytes(place, stamp) }).then_some(stamp)
        };
        (0..self.places.len()).map(content).collect()
    }

    /// The first change, at or after `from`, that left this content.
    fn found(&self, place: usize, content: Option<u64>, from: usize) -> Option<usize> {
        let changes = &self.places[place];
        match content? {
            0 => (from..changes.len()).find(|index| changes[*index].zero),
            stamp => {
                let index = changes.binary_search_by_key(&stamp, |change| change.submitted).ok()?;
                (!changes[index].zero && index >= from).then_some(index)
            }
        }
    }

    /// After the device was killed: whatever was answered is on the disk, of which `image` is the content, and of what
    /// was in flight the ledger now knows whether it is.
    pub(crate) fn settle(&mut self, image: &[u8], now: u64) {
        for (place, content) in self.contents(image).into_iter().enumerate() {
            let last = self.places[place].iter().rposition(|change| change.answered != u64::MAX).unwrap();
            let found = self.found(place, content, last);
            let found = found.unwrap_or_else(|| panic!("{} was lost", self.story(image, place)));
            let changes = &mut self.places[place];
            changes.truncate(found + 1);
            changes[found].answered = changes[found].answered.min(now);
        }
    }

    fn story(&self, image: &[u8], place: usize) -> String {
        let start = self.offset(place) as usize;
        let changes = &self.places[place];
        let tail = &changes[changes.len().saturating_sub(4)..];
        format!(
            "the block at {start} starts with {:?}; its last changes: {tail:?}",
            &image[start..start + 16]
        )
    }
}

/// When a snapshot was asked for, and when the answer was there.
#[derive(Clone, Debug)]
pub(crate) struct Cut {
    pub(crate) name: String,
    pub(crate) asked: u64,
    pub(crate) answered: u64,
}

/// Proves that the images, with all ledgers of their disk each, are the state of the disks at one instant of the cut.
pub(crate) fn prove(cut: &Cut, disks: &[(Vec<u8>, Vec<&Ledger>)]) {
    // All that was answered before `instant` must be there. What is found there may move it: the latest submission of
    // what is there, at least. The least choice is looked for, so it is found if there is one.
    let mut instant = cut.asked;
    let all: Vec<_> = disks
        .iter()
        .flat_map(|(image, ledgers)| {
            ledgers.iter().map(move |ledger| (image, ledger, ledger.contents(image)))
        })
        .collect();
    loop {
        let mut latest = instant;
        for (image, ledger, contents) in &all {
            for (place, changes) in ledger.places.iter().enumerate() {
                let due = changes.partition_point(|change| change.answered < instant) - 1;
                let Some(found) = ledger.found(place, contents[place], due) else {
                    panic!(
                        "{cut:?} lacks what was answered before {instant}: {}",
                        ledger.story(image, place)
                    );
                };
                latest = latest.max(changes[found].submitted);
            }
        }
        assert!(latest < cut.answered, "{cut:?} has a change that was submitted after it, at {latest}");
        if latest == instant {
            return;
        }
        instant = latest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two disks of one place each; on the first two changes, on the second one that came after the first of them.
    fn history() -> (Ledger, Ledger) {
        let (mut a, mut b) = (Ledger::new(512, 0, 1, 1), Ledger::new(512, 0, 1, 1));
        a.stamp(0, 1);
        a.answered(0, 2);
        b.stamp(0, 3);
        a.stamp(0, 4);
        a.answered(0, 5);
        b.answered(0, 6);
        (a, b)
    }

    fn holds(asked: u64, answered: u64, first: u64, second: u64) -> bool {
        // The clock of a real cut starts past the zeroes of a new disk.
        assert!(asked > 0);
        let (a, b) = history();
        let image = |ledger: &Ledger, stamp| match stamp {
            0 => vec![0; 512],
            stamp => ledger.bytes(0, stamp),
        };
        let disks = [(image(&a, first), vec![&a]), (image(&b, second), vec![&b])];
        let cut = Cut { name: "cut".to_owned(), asked, answered };
        std::panic::catch_unwind(|| prove(&cut, &disks)).is_ok()
    }

    #[test]
    fn the_proof_tells_a_prefix_from_what_is_none() {
        assert!(holds(1, 9, 0, 0));
        assert!(holds(1, 9, 1, 0));
        assert!(holds(1, 9, 1, 3));
        assert!(holds(1, 9, 4, 0), "both were in flight");
        assert!(holds(7, 9, 4, 3));
        assert!(!holds(1, 9, 0, 3), "the second disk has what was submitted after an answer of the first");
        assert!(!holds(7, 9, 1, 3), "an answer is missing");
        assert!(!holds(1, 4, 4, 3), "submitted after the cut");
        assert!(!holds(1, 9, 2, 3), "nobody wrote that");
    }
}
