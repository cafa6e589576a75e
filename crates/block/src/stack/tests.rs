use std::sync::atomic::Ordering;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::*;
use crate::{Place, read_disk};
use sheet::{Kind, Pattern, Sheet};

mod sheet;

fn layers(sheets: &[Arc<Sheet>]) -> Vec<Arc<dyn Layer>> {
    sheets.iter().map(|sheet| Arc::clone(sheet) as _).collect()
}

/// The model: one byte, looked for in one layer after the other.
fn byte(sheets: &[Arc<Sheet>], offset: u64) -> u8 {
    for sheet in sheets.iter().rev() {
        if offset >= sheet.capacity() {
            return 0;
        }
        let (start, _, place) = sheet.find(offset);
        match place {
            Place::Absent => {}
            Place::Zero => return 0,
            Place::Data(at) => return sheet.data.byte(at + (offset - start)),
            Place::Packed => return sheet.packed.byte(offset),
        }
    }
    0
}

fn check(stack: &Stack, sheets: &[Arc<Sheet>], range: ByteRange) {
    let mut found = vec![0xee; range.len as usize];
    read_disk(stack, range.offset, &mut found).unwrap();
    for (at, found) in (range.offset..).zip(found) {
        assert_eq!(found, byte(sheets, at), "the byte at {at} of {} layers", sheets.len());
    }
}

fn sheet() -> impl Strategy<Value = Vec<(u64, Kind, u64)>> {
    let kind = prop_oneof![
        4 => Just(Kind::Absent), 1 => Just(Kind::Zero), 3 => Just(Kind::Data), 1 => Just(Kind::Packed)
    ];
    let len = prop_oneof![
        4 => (1_u64..40).prop_map(|sectors| sectors * 512), 1 => 1_u64..3000, 3 => 65_536_u64..SEGMENT * 2
    ];
    let gap = prop_oneof![Just(0), 0_u64..100_000];
    vec((len, kind, gap), 1..12)
}

#[derive(Clone, Debug)]
enum Step {
    /// Reads from the newest view, or one before it.
    Read { view: Index, at: Index, near_border: bool, len: u64 },
    /// A cut.
    Push(Vec<(u64, Kind, u64)>),
    /// A job ends: the layers are numbered otherwise, and read the same.
    Replace { above: Index },
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![1_u64..20_000, 1_u64..600];
    let read = (any::<Index>(), any::<Index>(), any::<bool>(), len)
        .prop_map(|(view, at, near_border, len)| Step::Read { view, at, near_border, len });
    prop_oneof![
        12 => read,
        2 => sheet().prop_map(Step::Push),
        1 => any::<Index>().prop_map(|above| Step::Replace { above })
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_stack_reads_as_its_layers_one_on_the_other(
        first in vec(sheet(), 1..5),
        budget in prop_oneof![Just(0), Just(200), 1000_u64..4000, Just(1 << 20)],
        steps in vec(step(), 1..60),
    ) {
        let mut seed = 0;
        let mut next = |pieces: &[_]| { seed += 1; Sheet::spread(seed, pieces) };
        let sheets: Vec<_> = first.iter().map(|pieces| next(pieces)).collect();
        let mut views = vec![(Stack::new(layers(&sheets), budget), sheets)];
        for step in steps {
            let newest = views.len() - 1;
            match step {
                Step::Read { view, at, near_border, len } => {
                    let (stack, sheets) = &views[newest - view.index(views.len()).min(2).min(newest)];
                    let at = at.index(stack.capacity() as usize) as u64;
                    let border = (at / SEGMENT * SEGMENT).saturating_sub(len / 2);
                    let offset = if near_border { border } else { at };
                    check(stack, sheets, ByteRange { offset, len: len.min(stack.capacity() - offset) });
                }
                Step::Push(pieces) => {
                    let (stack, sheets) = &views[newest];
                    let top = next(&pieces);
                    let stack = stack.with_layer(Arc::clone(&top) as _);
                    let sheets = sheets.iter().cloned().chain([top]).collect();
                    views.push((stack, sheets));
                }
                Step::Replace { above } => {
                    let (stack, sheets) = &mut views[newest];
                    let above = above.index(sheets.len());
                    let empty = Sheet::plain(0, sheets[above].capacity(), Place::Absent);
                    sheets.insert(above + 1, empty);
                    stack.replace(&Stack::new(layers(sheets), budget));
                    prop_assert_eq!(stack.layers().len(), sheets.len());
                }
            }
        }
    }
}

/// Workers read, cuts are made, and the memory is so short that segments come and go.
#[test]
fn many_threads_find_what_one_finds() {
    let mut runner = TestRunner::deterministic();
    let mut pieces = || vec(sheet(), 12).new_tree(&mut runner).unwrap().current();
    let sheets: Vec<_> = (0..).zip(pieces()).map(|(seed, pieces)| Sheet::spread(seed, &pieces)).collect();
    let base = Stack::new(layers(&sheets[..1]), 2000);
    let mut views = vec![base];
    for sheet in &sheets[1..] {
        views.push(views.last().unwrap().with_layer(Arc::clone(sheet) as _));
    }
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (views, sheets) = (&views, &sheets);
            scope.spawn(move || {
                let mut dice = Pattern(thread);
                for round in 0..1500 {
                    dice.0 = dice.0.wrapping_add(0x1234_5678_9abc);
                    // The views grow with time, and some reads come late.
                    let view = (round * sheets.len() / 1500).saturating_sub(usize::from(dice.byte(1)) / 85);
                    let capacity = views[view].capacity();
                    let offset = u64::from(dice.byte(2)) * capacity / 256;
                    let len = (u64::from(dice.byte(3)) * 16).min(capacity - offset);
                    check(&views[view], &sheets[..=view], ByteRange { offset, len });
                }
            });
        }
    });
}

const WHOLE: ByteRange = ByteRange { offset: 0, len: 2 * SEGMENT };

#[test]
fn a_hit_asks_nobody_and_a_cut_throws_nothing_away() {
    let half = [(SEGMENT / 2, Kind::Absent, 0), (SEGMENT * 3 / 2, Kind::Data, 7)];
    let sheets = [
        Sheet::plain(1, WHOLE.len, Place::Data(0)),
        Sheet::spread(2, &half),
        Sheet::plain(3, WHOLE.len, Place::Absent),
    ];
    let stack = Stack::new(layers(&sheets[..2]), 1 << 20);
    check(&stack, &sheets[..2], WHOLE);
    let asked = [sheets[0].asked(), sheets[1].asked()];
    check(&stack, &sheets[..2], WHOLE);
    assert_eq!([sheets[0].asked(), sheets[1].asked()], asked);

    let after = stack.with_layer(Arc::clone(&sheets[2]) as _);
    check(&after, &sheets, WHOLE);
    assert_eq!([sheets[0].asked(), sheets[1].asked()], asked, "old layers are asked again after a cut");
    assert_eq!(sheets[2].asked(), 2, "once a segment");
    // What was known before the cut may be read still, and must not spoil what is known now.
    check(&stack, &sheets[..2], WHOLE);
    let asked = sheets[2].asked();
    check(&after, &sheets, WHOLE);
    assert_eq!(sheets[2].asked(), asked);
}

#[test]
fn nobody_is_asked_for_what_a_newer_layer_has() {
    let hidden = Sheet::plain(1, WHOLE.len, Place::Data(0));
    let shown = Sheet::spread(2, &[(SEGMENT, Kind::Data, 0), (SEGMENT, Kind::Zero, 0)]);
    let sheets = [Arc::clone(&hidden), shown];
    let stack = Stack::new(layers(&sheets), 1 << 20);
    check(&stack, &sheets, WHOLE);
    assert_eq!(hidden.asked(), 0);
}

#[test]
fn gaps_that_a_run_spans_are_asked_for_together_if_all_of_it_can_be() {
    let crumbs = [(4096, Kind::Data, 0), (4096, Kind::Absent, 0)].repeat((WHOLE.len / 8192) as usize);
    let sheets = [
        Sheet::plain(1, WHOLE.len, Place::Data(0)),
        Sheet::plain(2, WHOLE.len, Place::Absent),
        Sheet::spread(3, &crumbs),
    ];
    check(&Stack::new(layers(&sheets), 1 << 20), &sheets, WHOLE);
    assert_eq!(sheets[1].asked(), 1);
    *sheets[1].failing.lock().unwrap() = Some(ByteRange { offset: 8192, len: 4096 });
    check(&Stack::new(layers(&sheets), 1 << 20), &sheets, WHOLE);
}

#[test]
fn what_lies_past_a_shorter_layer_is_zero_and_a_longer_one_beneath_is_cut_off() {
    let sheets = [
        Sheet::plain(1, 9000, Place::Data(0)),
        Sheet::plain(2, 700, Place::Absent),
        Sheet::plain(3, 8000, Place::Absent),
    ];
    let stack = Stack::new(layers(&sheets), 1 << 20);
    assert_eq!(stack.capacity(), 8000);
    let mut bytes = [9; 8000];
    read_disk(&stack, 0, &mut bytes).unwrap();
    assert!((0..700).all(|at| bytes[at] == sheets[0].data.byte(at as u64)));
    assert!(bytes[700..].iter().all(|&byte| byte == 0));
    let error = read_disk(&stack, 7999, &mut [0; 2]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
}

#[test]
fn an_error_is_returned_to_who_reads_there_and_not_kept() {
    let sheets = [Sheet::plain(1, WHOLE.len, Place::Data(0)), Sheet::plain(2, WHOLE.len, Place::Absent)];
    let stack = Stack::new(layers(&sheets), 1 << 20);
    let bad = ByteRange { offset: 4096, len: 512 };
    *sheets[0].failing.lock().unwrap() = Some(bad);
    assert_eq!(read_disk(&stack, bad.offset, &mut [0; 512]).unwrap_err().kind(), ErrorKind::Io);
    for beside in [0, 8192, SEGMENT] {
        check(&stack, &sheets, ByteRange { offset: beside, len: 512 });
    }
    *sheets[0].failing.lock().unwrap() = None;
    check(&stack, &sheets, bad);
}

#[test]
fn segments_are_looked_up_some_at_a_time() {
    let len = (4 * AROUND - 1) * SEGMENT + 5000;
    let sheets = [Sheet::plain(1, len, Place::Data(0)), Sheet::plain(2, len, Place::Absent)];
    let stack = Stack::new(layers(&sheets), 1 << 20);
    let last = len / SEGMENT;
    for segment in (0..=last).rev().chain(0..=last) {
        let offset = segment * SEGMENT;
        check(&stack, &sheets, ByteRange { offset, len: 512 });
    }
    assert_eq!(sheets[1].asked(), 4, "once for each {AROUND} segments");
    let forgotten = || sheets.each_ref().map(|sheet| sheet.forgotten.load(Ordering::SeqCst));
    assert_eq!(forgotten(), [4, 4], "what a layer keeps for one look-up is of no use to another");
    check(&Stack::new(layers(&sheets), 0), &sheets, ByteRange { offset: 0, len: SEGMENT });
    assert_eq!(forgotten(), [4, 4], "who keeps no runs comes again");
}

#[test]
fn the_map_keeps_its_bound_and_what_is_used_most() {
    const SEGMENTS: u64 = 400;
    let crumbs: Vec<_> = (0..SEGMENTS * 40)
        .flat_map(|_| [(SEGMENT / 80, Kind::Data, 1), (SEGMENT / 80, Kind::Absent, 0)])
        .collect();
    let sheets = [Sheet::spread(1, &crumbs)];
    let budget = 100_000;
    let stack = Stack::new(layers(&sheets), budget);
    let hot = ByteRange { offset: 0, len: 512 };
    check(&stack, &sheets, hot);
    let mut asked_for_hot = 0;
    for segment in 1..SEGMENTS - 1 {
        check(&stack, &sheets, ByteRange { offset: segment * SEGMENT, len: 512 });
        let asked = sheets[0].asked();
        check(&stack, &sheets, hot);
        asked_for_hot += sheets[0].asked() - asked;
        let taken = stack.0.load().map.taken();
        assert!(taken <= budget, "{taken} bytes are taken");
    }
    assert!(stack.0.load().map.taken() > budget / 2, "the map is hardly used");
    assert_eq!(asked_for_hot, 0, "what is read all the time was thrown away");
    let asked = sheets[0].asked();
    check(&stack, &sheets, ByteRange { offset: SEGMENT, len: 512 });
    assert!(sheets[0].asked() > asked, "the bound is not that tight");
}

/// A layer beneath the active one was active once, and holds a stack of all that is beneath it.
#[test]
fn a_long_chain_is_dropped_without_nesting() {
    let drop_it = || {
        let mut stack = Stack::new(Vec::new(), 1 << 20);
        for seed in 0..1500 {
            let mut sheet = Arc::into_inner(Sheet::plain(seed, 512, Place::Absent)).unwrap();
            let above = Stack::new(stack.layers(), 0);
            sheet._beneath = Some(std::mem::replace(&mut stack, above));
            stack = stack.with_layer(Arc::new(sheet));
        }
        check(&stack, &[], ByteRange { offset: 0, len: 512 });
    };
    let small = std::thread::Builder::new().stack_size(128 << 10);
    small.spawn(drop_it).unwrap().join().unwrap();
}

#[test]
fn a_layer_that_does_not_get_on_is_an_error() {
    let sheet = Sheet::plain(1, SEGMENT, Place::Absent);
    sheet.stuck.store(true, Ordering::SeqCst);
    let stack = Stack::new(layers(&[sheet]), 1 << 20);
    assert_eq!(read_disk(&stack, 0, &mut [0; 512]).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn it_is_never_written() {
    let stack = Stack::new(layers(&[Sheet::plain(1, SEGMENT, Place::Data(0))]), 1 << 20);
    let range = ByteRange { offset: 0, len: 512 };
    assert!(stack.read_only());
    assert_eq!(crate::write_disk(&stack, 0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
    for asked in [stack.discard(range, Waker::noop()), stack.write_zeroes(range, true, Waker::noop())] {
        assert!(matches!(asked, Poll::Ready(Err(error)) if error.kind() == ErrorKind::ReadOnly));
    }
    stack.flush().run().unwrap();
}
