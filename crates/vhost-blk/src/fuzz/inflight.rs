//! An in-flight record of any shape and content.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use block::testing::Input;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::config::MAX_QUEUE_SIZE;
use crate::inflight::{QueueRecord, Record, Shape};

/// Queues of the device.
const QUEUES: usize = 4;

/// What the specification says of one queue's part: a header of 16 bytes, and 16 for each descriptor.
struct Model {
    bytes: Vec<u8>,
    base: usize,
    size: u16,
    counter: u64,
}

impl Model {
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        self.bytes[self.base + at..][..N].try_into().unwrap()
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[self.base + at..][..bytes.len()].copy_from_slice(bytes);
    }

    fn short(&self, at: usize) -> u16 {
        u16::from_ne_bytes(self.get(at))
    }

    /// Where a head's state is.
    fn at(&self, head: u16) -> Option<usize> {
        (head < self.size).then(|| 16 + 16 * usize::from(head))
    }

    fn mark(&mut self, head: u16, inflight: bool) {
        if let Some(at) = self.at(head) {
            self.put(at, &[inflight.into()]);
        }
    }

    fn recover(&mut self, used: u16) -> Option<Vec<u16>> {
        let is_known = (self.short(8), self.short(10)) == (1, self.size);
        let last = self.short(14);
        self.put(14, &used.to_ne_bytes());
        if !is_known {
            (0..self.size).for_each(|head| self.mark(head, false));
            self.put(8, &1_u16.to_ne_bytes());
            self.put(10, &self.size.to_ne_bytes());
            return None;
        }
        let mut head = self.short(12);
        for _ in 0..used.wrapping_sub(last).min(self.size) {
            let Some(at) = self.at(head) else { break };
            self.mark(head, false);
            head = self.short(at + 6);
        }
        let state = |head: &u16| self.at(*head).unwrap();
        let mut found: Vec<u16> = (0..self.size).filter(|head| self.get::<1>(state(head)) == [1]).collect();
        found.sort_by_key(|head| u64::from_ne_bytes(self.get(state(head) + 8)));
        let counter = found.last().map(|head| u64::from_ne_bytes(self.get(state(head) + 8)));
        self.counter = counter.map_or(0, |counter| counter.wrapping_add(1));
        Some(found)
    }

    fn taken(&mut self, head: u16) {
        if let Some(at) = self.at(head) {
            self.put(at + 8, &self.counter.to_ne_bytes());
            self.counter = self.counter.wrapping_add(1);
            self.mark(head, true);
        }
    }

    fn answering(&mut self, head: u16) {
        if let Some(at) = self.at(head) {
            let last = self.get::<2>(12);
            self.put(at + 6, &last);
            self.put(12, &head.to_ne_bytes());
        }
    }

    fn answered(&mut self, head: u16, used: u16) {
        self.mark(head, false);
        self.put(14, &used.to_ne_bytes());
    }
}

/// A record is mapped only if it is long enough and its file as well, and is accepted only if it is of the one known kind.
/// What it says of a queue, whatever that is, and what is written to it then, is what a plain reading of the specification
/// says.
pub fn inflight(data: &[u8]) {
    let mut input = Input(data);
    let queues = u16::from(input.byte() % 6);
    let queue_size = match input.byte() {
        size @ 0..=0xef => u16::from(size % 17),
        _ => input.number(2) as u16,
    };
    let stride = (16 + 16 * usize::from(queue_size)).next_multiple_of(64);
    let needed = stride * usize::from(queues) + 64;
    let (size, offset) = match input.byte() {
        0..=0x7f => (needed as u64, 0),
        0x80..=0xbf => (needed as u64 - 64, 4096),
        _ => (input.number(3), input.number(2)),
    };
    let (queue, ops) = (usize::from(input.byte()) % QUEUES, usize::from(input.byte() % 32));
    let (acts, content) = (Input(input.bytes(ops * 4)), input.0);
    let file = File::from(memfd_create("record", MemfdFlags::CLOEXEC).unwrap());
    let there = needed as u64 + if offset > 0 { 4096 } else { 0 };
    ftruncate(&file, there).unwrap();
    file.write_all_at(content.get(..needed).unwrap_or(content), offset.min(4096)).unwrap();
    let shape = Shape { size, offset, queues, queue_size };
    let mapped = Record::map(file.try_clone().unwrap().into(), shape, QUEUES);
    let sound = (1..=QUEUES).contains(&usize::from(queues)) && (1..=MAX_QUEUE_SIZE).contains(&queue_size);
    let least = needed as u64 - 64;
    // Files are mapped from a page's beginning on.
    let fits =
        size >= least && offset.is_multiple_of(4096) && offset + size <= file.metadata().unwrap().len();
    assert_eq!(mapped.is_ok(), sound && fits, "{shape:?}");
    let Ok(record) = mapped else { return };
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, offset).unwrap();
    let is_known = |part: &[u8]| {
        let version = [part[8], part[9]];
        part[..8] == [0; 8]
            && (version == [0, 0]
                || (version, &part[10..12]) == (1_u16.to_ne_bytes(), &queue_size.to_ne_bytes()))
    };
    let all_known = bytes.chunks(stride).take(usize::from(queues)).all(is_known);
    assert_eq!(record.check().is_ok(), all_known);
    let noted = bytes.get(needed - 64).filter(|byte| (1..=2).contains(*byte));
    assert_eq!(record.writeback(), noted.map(|byte| *byte == 2));
    let record = Arc::new(record);
    let part = record.queue(queue);
    assert_eq!(part.is_some(), queue < usize::from(queues));
    if let Some(part) = part {
        let model = Model { bytes, base: stride * queue, size: queue_size, counter: 0 };
        let expected = live(part, model, acts);
        let mut found = vec![0; size as usize];
        file.read_exact_at(&mut found, offset).unwrap();
        assert!(found == expected, "the record holds something else");
    }
}

/// Begins with what was in flight, and goes on; what the record holds in the end.
fn live(mut queue: QueueRecord, mut model: Model, mut acts: Input<'_>) -> Vec<u8> {
    let used = acts.number(2) as u16;
    assert_eq!(queue.recover(used), model.recover(used));
    while !acts.is_empty() {
        let (act, head, used) = (acts.byte(), u16::from(acts.byte()), acts.number(2) as u16);
        match act % 4 {
            0 => {
                queue.taken(head);
                model.taken(head);
            }
            1 => {
                queue.answering(head);
                model.answering(head);
            }
            2 => {
                queue.answered(head, used);
                model.answered(head, used);
            }
            _ => assert_eq!(queue.recover(used), model.recover(used)),
        }
    }
    model.bytes
}
