use super::*;

const SIZE: u16 = 8;

fn asked(queues: u16, queue_size: u16) -> Shape {
    Shape { size: 0, offset: 0, queues, queue_size }
}

/// A record as a front-end keeps it: each look at it is another process's.
struct Kept(OwnedFd, Shape);

impl Kept {
    fn new() -> Self {
        let (file, shape) = create(asked(2, SIZE), 4).unwrap();
        Self(file, shape)
    }

    fn map(&self) -> Arc<Record> {
        Arc::new(Record::map(self.0.try_clone().unwrap(), self.1, 4).unwrap())
    }

    fn queue(&self) -> QueueRecord {
        self.map().queue(1).unwrap()
    }
}

#[test]
fn what_was_taken_and_not_answered_is_found_in_its_order() {
    let kept = Kept::new();
    let mut queue = kept.queue();
    assert_eq!(queue.recover(5), None, "a new record knows nothing");
    for head in [3, 0, 7, 2] {
        queue.taken(head);
    }
    queue.answering(0);
    queue.answered(0, 6);
    queue.taken(0);
    let mut later = kept.queue();
    assert_eq!(later.recover(6), Some(vec![3, 7, 2, 0]));
    // And after another life in which nothing was answered, behind what is taken next.
    later.taken(1);
    assert_eq!(kept.queue().recover(6), Some(vec![3, 7, 2, 0, 1]));
}

/// A process may be killed between any two stores of an answer.
#[test]
fn an_answer_cut_short_is_found_by_the_index_of_the_used_ring() {
    for step in 0..3 {
        let kept = Kept::new();
        let mut queue = kept.queue();
        queue.recover(9);
        [4, 5].into_iter().for_each(|head| queue.taken(head));
        queue.answering(4);
        // The used ring's index goes up here, after step 0.
        if step == 2 {
            queue.mark(4, false);
        }
        let (used_idx, expected) = if step == 0 { (9, vec![4, 5]) } else { (10, vec![5]) };
        assert_eq!(kept.queue().recover(used_idx), Some(expected.clone()), "step {step}");
        assert_eq!(kept.queue().recover(used_idx), Some(expected), "step {step}, once more");
    }
}

/// Another back-end may answer several at once.
#[test]
fn a_batch_cut_short_is_ended() {
    let kept = Kept::new();
    let mut queue = kept.queue();
    queue.recover(u16::MAX);
    (0..6).for_each(|head| queue.taken(head));
    [1, 4, 2].into_iter().for_each(|head| queue.answering(head));
    queue.mark(4, false);
    assert_eq!(kept.queue().recover(2), Some(vec![0, 3, 5]));
}

#[test]
fn garbage_is_bounded() {
    let kept = Kept::new();
    let mut queue = kept.queue();
    queue.recover(0);
    let record = Arc::clone(&queue.record);
    // All in flight with counters that make no sense, and a batch that goes round for ever or leaves the table.
    for head in 0..SIZE {
        queue.mark(head, true);
        let at = queue.at(head).unwrap();
        record.store::<AtomicU64>(at + COUNTER_AT, u64::MAX - u64::from(head % 2));
        record.store16(at + NEXT_AT, head ^ 1);
    }
    record.store16(queue.base + LAST_BATCH_HEAD_AT, 6);
    assert_eq!(queue.recover(60_000), Some(vec![1, 3, 5, 0, 2, 4]));
    assert_eq!(queue.counter, 0);
    record.store16(queue.base + LAST_BATCH_HEAD_AT, 60_000);
    assert_eq!(queue.recover(3).unwrap().len(), 6);
    queue.taken(SIZE);
    queue.answering(u16::MAX);
    queue.answered(u16::MAX, 4);
    assert_eq!(queue.recover(4).unwrap().len(), 6);
    // A version that changes after it was looked at: as new.
    record.store16(queue.base + VERSION_AT, 9);
    assert_eq!(queue.recover(4), None);
    assert_eq!(queue.recover(4), Some(Vec::new()));
}

#[test]
fn shapes_that_make_no_sense_are_refused() {
    for (queues, size) in [(0, 8), (5, 8), (1, 0), (1, MAX_QUEUE_SIZE + 1), (u16::MAX, u16::MAX)] {
        assert!(create(asked(queues, size), 4).is_err(), "{queues} {size}");
    }
    let Kept(file, good) = Kept::new();
    let shapes = [
        Shape { size: 16, ..good },
        Shape { size: u64::MAX, ..good },
        Shape { size: good.size + 1, ..good },
        Shape { offset: 4096, ..good },
        Shape { offset: u64::MAX, ..good },
        Shape { offset: 1, ..good },
        Shape { queue_size: 1024, ..good },
        Shape { queues: 5, ..good },
    ];
    for shape in shapes {
        assert!(Record::map(file.try_clone().unwrap(), shape, 4).is_err(), "{shape:?}");
    }
    let kept = Kept(file, good);
    let record = kept.map();
    for (at, value) in [(VERSION_AT, 2), (FEATURES_AT, 1)] {
        record.store16(at, value);
        assert!(kept.map().check().is_err());
        record.store16(at, 0);
        kept.map().check().unwrap();
    }
    rustix::fs::ftruncate(&kept.0, 0).unwrap_err();
}

#[test]
fn the_write_cache_is_remembered_where_there_is_room_for_it() {
    let kept = Kept::new();
    assert_eq!(kept.map().writeback(), None);
    for on in [false, true] {
        kept.map().set_writeback(on);
        assert_eq!(kept.map().writeback(), Some(on));
    }
    let short = Shape { size: kept.1.cache_at() as u64, ..kept.1 };
    let record = Record::map(kept.0.try_clone().unwrap(), short, 4).unwrap();
    record.set_writeback(false);
    assert_eq!(record.writeback(), None);
    assert_eq!(kept.map().writeback(), Some(true));
}
