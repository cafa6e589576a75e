//! `kill -9` under load. The guest lives on: whatever was acknowledged must be there when the daemon is back, flushed or
//! not.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use control::client::Client;
use serde_json::json;

use crate::images::{check_sound, same};
use crate::ledger::{Clock, Cut, Ledger, prove};
use crate::load::{Load, Mix};
use crate::served::{Served, Wanted};

const DISKS: usize = 2;
const QUEUES: usize = 2;
const KILLS: usize = 10;

/// A snapshot is taken to last no longer, so that the drill does not either.
const MAX_PACE: Duration = Duration::from_millis(200);

/// Snapshots that are asked for until the daemon dies; their names are `k` and the number of the kill, then a letter.
struct Asker(thread::JoinHandle<Vec<Cut>>);

impl Asker {
    fn start(served: &Served, kill: usize, clock: &Arc<Clock>) -> Self {
        let (mut client, clock) = (served.qmp(), Arc::clone(clock));
        Self(thread::spawn(move || ask(&mut client, kill, &clock)))
    }
}

fn ask(client: &mut Client, kill: usize, clock: &Clock) -> Vec<Cut> {
    let mut cuts = Vec::new();
    for letter in 'a'..='z' {
        let (name, asked) = (format!("k{kill}{letter}"), clock.now());
        let taken = client.execute("snapshot-create", json!({ "name": name }), |_, _| {});
        // Killed before the answer: the cut was at any time until now, if it was.
        cuts.push(Cut { name, asked, answered: clock.now() });
        if taken.is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    cuts
}

/// Kills the daemon again and again; proves after each kill that nothing was lost, and at last each snapshot.
fn drill(format: &'static str, cache: &'static str, size: usize, mix: Mix) {
    let places = 64;
    let bytes = (size * places * QUEUES) as u64;
    let mut served = Served::start(Wanted { format, cache, disks: DISKS, queues: QUEUES, bytes });
    let clock = Arc::new(Clock::new());
    let new = |queue| Ledger::new(size, queue, QUEUES, places);
    let mut ledgers: Vec<Vec<Ledger>> = vec![(0..QUEUES).map(new).collect(); DISKS];
    let begin = Instant::now();
    let mut cuts = vec![served.snapshot("first", &clock)];
    let pace = begin.elapsed().min(MAX_PACE);
    for kill in 0..KILLS {
        let load = Load::connect(&served.sockets, ledgers, mix, &clock);
        // With and without snapshots under way.
        let asker = (kill % 3 != 2).then(|| Asker::start(&served, kill, &clock));
        // At a time of its own within the first snapshot, or the second.
        thread::sleep(pace * (kill as u32 * 7 % 20 + 1) / 10 + Duration::from_millis(3));
        served.kill();
        ledgers = load.leave();
        let asked = asker.map_or_else(Vec::new, |asker| asker.0.join().unwrap());
        after_kill(&served);
        served.restart();
        let found = served.names();
        for (disk, ledgers) in ledgers.iter_mut().enumerate() {
            let image = served.read(disk);
            ledgers.iter_mut().for_each(|ledger| ledger.settle(&image, clock.now()));
        }
        // Only the last one may be missing: its answer is.
        let certain = asked.len().saturating_sub(1);
        for (number, cut) in asked.into_iter().enumerate() {
            let listed = found.contains(&cut.name);
            assert!(listed || number >= certain, "{cut:?} was answered and is not there: {found:?}");
            cuts.extend(listed.then_some(cut));
        }
        assert_eq!(found.len(), cuts.len(), "{found:?}");
    }
    for cut in &cuts {
        let images = served.export_all(&cut.name).into_iter();
        let disks: Vec<_> = images.zip(&ledgers).map(|(image, all)| (image, all.iter().collect())).collect();
        prove(cut, &disks);
    }
    the_end(served);
}

/// QEMU's tools find no errors in what a kill leaves: in the layers that were in use, the others have not changed.
fn after_kill(served: &Served) {
    for id in served.ids() {
        let layers = served.layers(&id);
        let qcow2 = layers.iter().rev().filter(|(_, format)| format == "qcow2");
        qcow2.take(3).for_each(|(path, _)| check_sound(path));
    }
}

/// After a clean end the images are whole, but for what leaked in a kill, and read as the disk did.
fn the_end(mut served: Served) {
    let disks: Vec<_> = (0..DISKS).map(|disk| served.read(disk)).collect();
    served.stop();
    for (disk, id) in served.ids().iter().enumerate() {
        let layers = served.layers(id);
        let (top, format) = layers.last().unwrap();
        check_sound(top);
        let raw = served.path("last.raw");
        std::fs::write(&raw, &disks[disk]).unwrap();
        same(&raw, top, format);
    }
}

#[test]
fn blocks_with_discards_on_a_raw_base_are_all_there() {
    drill("raw", "writeback", 4096, Mix::Discards);
}

#[test]
fn sectors_with_zeroes_on_a_qcow2_base_past_the_page_cache_are_all_there() {
    drill("qcow2", "none", 512, Mix::Zeroes);
}

#[test]
fn sectors_on_a_qcow2_base_are_all_there() {
    drill("qcow2", "writeback", 512, Mix::Stamps);
}
