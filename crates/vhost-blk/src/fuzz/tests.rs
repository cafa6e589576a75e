//! Each target on its seeds and on mutations of them, for a moment.

use std::time::Duration;

use block::testing::{drive, keep_seeds};

use super::guest::{AVAIL, MEMORY};
use super::*;

/// How long the mutations of one target run here. `make fuzz` runs them longer.
const MOMENT: Duration = Duration::from_secs(3);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A guest's memory in which the ring offers these heads, and has these descriptors and these headers, from 0x200 on.
fn guest(mode: u8, heads: &[u16], table: &[(u64, u32, u16, u16)], headers: &[(u32, u64)]) -> Vec<u8> {
    let mut memory = vec![0; 0x300];
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    for (index, (addr, len, flags, next)) in table.iter().enumerate() {
        put(16 * index, &addr.to_le_bytes());
        put(16 * index + 8, &len.to_le_bytes());
        put(16 * index + 12, &[flags.to_le_bytes(), next.to_le_bytes()].concat());
    }
    put(AVAIL as usize + 2, &(heads.len() as u16).to_le_bytes());
    for (index, head) in heads.iter().enumerate() {
        put(AVAIL as usize + 4 + 2 * index, &head.to_le_bytes());
    }
    for (index, (kind, sector)) in headers.iter().enumerate() {
        put(0x200 + 16 * index, &kind.to_le_bytes());
        put(0x208 + 16 * index, &sector.to_le_bytes());
    }
    assert!(memory.len() <= MEMORY);
    [&[mode][..], &memory].concat()
}

#[test]
fn requests_do_what_the_model_says() {
    let transfer = |data: u16| [(0x200, 16, NEXT, 1), (0x1e00, 1024, NEXT | data, 2), (0x2f0, 1, WRITE, 0)];
    let zeroes = [(0x200, 32, NEXT, 1), (0x2f0, 1, WRITE, 0)];
    // Its own table, behind what is a ring of four.
    let mut nested = vec![(0x50, 48, INDIRECT, 0); 5];
    nested.extend([(0x200, 16, NEXT, 1), (0x4000, 20, NEXT | WRITE, 2), (0x2f0, 1, WRITE, 0)]);
    let anywhere = [&[2, 3][..], &[0, 0, 0, 0, 1, 0, 0, 1, 0x40]].concat();
    let made = [
        ("read", guest(8, &[0], &transfer(WRITE), &[(0, 3)])),
        ("write", guest(8, &[0, 0], &transfer(0), &[(1, 3)])),
        ("flush", guest(4, &[0], &[(0x200, 16, NEXT, 1), (0x2f0, 1, WRITE, 0)], &[(4, 0)])),
        ("discard", guest(8, &[0], &zeroes, &[(11, 0), (4, 1 << 32 | 2)])),
        ("zeroes", guest(8, &[0], &zeroes, &[(13, 0), (1, 1 | 1 << 32)])),
        ("serial", guest(8, &[0], &nested, &[(8, 0)])),
        ("refused", guest(9, &[0], &transfer(0), &[(1, 3)])),
        ("anywhere", [&anywhere[..], &guest(0, &[0], &transfer(WRITE), &[(0, 3)])[1..]].concat()),
    ];
    keep_seeds("virtio_requests", &made);
    drive("virtio_requests", virtio_requests, MOMENT);
}

#[test]
fn records_say_what_the_model_says() {
    let record = |used: u16, last: u16, states: &[(u8, u16, u64)]| {
        let mut bytes = vec![0; 8];
        bytes.extend([1, states.len() as u16, last, used].map(u16::to_ne_bytes).concat());
        for (inflight, next, counter) in states {
            bytes.extend(
                [&[*inflight, 0, 0, 0, 0, 0][..], &next.to_ne_bytes(), &counter.to_ne_bytes()].concat(),
            );
        }
        bytes
    };
    let states = [(1, 2, 9), (0, 0, 0), (1, 0, 7), (1, 9, 8)];
    let acts = [0, 6, 0, 1, 0, 0, 1, 3, 0, 0, 2, 3, 0, 7, 3, 0];
    let seed = |acts: &[u8], record: Vec<u8>| [&[1, 4, 0, 0, acts.len() as u8 / 4], acts, &record].concat();
    let made = [
        ("new", seed(&acts, Vec::new())),
        ("in-flight", seed(&acts[..4], record(6, 0, &states))),
        ("answers", seed(&acts, record(4, 2, &states))),
        ("pages", [&[4, 0xf0, 1, 0, 0x90, 3, 0][..], &record(1, 0, &states)].concat()),
    ];
    keep_seeds("inflight", &made);
    drive("inflight", inflight, MOMENT);
}

#[test]
fn messages_go_where_the_model_says() {
    let message = |request: u32, flags: u32, payload: &[u8]| {
        [&[request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat()[..], payload].concat()
    };
    let piece = |how: u8, bytes: &[u8]| [&[how, bytes.len() as u8][..], bytes].concat();
    let (memory, two_memories, event, socket) = (8, 12, 9, 10);
    let features = piece(0, &message(16, 1, &(1_u64 << 12 | 8).to_ne_bytes()));
    let region = [0_u64, 8192, 0x7000, 4096].map(u64::to_ne_bytes).concat();
    let second = [0x2000_u64, 8192, 0x9000, 8192].map(u64::to_ne_bytes).concat();
    let table = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &region].concat();
    let tables = [&[2, 0, 0, 0, 0, 0, 0, 0][..], &region, &second].concat();
    let shape = |size: u64| [&[size, 0].map(u64::to_ne_bytes).concat()[..], &[2, 0, 16, 0]].concat();
    let ring = [0; 8];
    let log = [4096_u64, 0].map(u64::to_ne_bytes).concat();
    let cut = message(5, 1, &table);
    let made = [
        (
            "plain",
            [piece(0, &message(1, 1, &[])), features.clone(), piece(0, &message(2, 9, &ring))].concat(),
        ),
        ("memory", [piece(memory, &cut), piece(memory, &message(37, 9, &table))].concat()),
        ("memories", piece(two_memories, &message(5, 1, &tables))),
        ("cut", [piece(memory, &cut[..7]), piece(0, &cut[7..30]), piece(0, &cut[30..])].concat()),
        (
            "rings",
            [
                piece(event, &message(12, 1, &ring)),
                piece(event, &message(13, 1, &ring)),
                piece(0, &message(14, 1, &ring)),
            ]
            .concat(),
        ),
        ("channel", piece(socket, &message(21, 1, &[]))),
        ("record-asked", [features.clone(), piece(0, &message(31, 1, &shape(0)))].concat()),
        ("record-given", [features, piece(memory, &message(32, 9, &shape(4096)))].concat()),
        (
            "log",
            [
                piece(0, &message(16, 1, &10_u64.to_ne_bytes())),
                piece(memory, &message(6, 1, &log)),
                piece(event, &message(7, 9, &[])),
            ]
            .concat(),
        ),
        ("long", [&[0x80, 0x10, 0x0c][..], &message(24, 1, &[7; 4096])].concat()),
    ];
    keep_seeds("vhost_user_messages", &made);
    drive("vhost_user_messages", vhost_user_messages, MOMENT);
}
