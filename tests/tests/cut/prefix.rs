//! Every snapshot, of several disks under load, is a prefix of what was acknowledged.

use std::sync::Arc;
use std::time::Duration;

use crate::images::{check_clean, same};
use crate::ledger::{Clock, Cut, Ledger, prove};
use crate::load::{Load, Mix};
use crate::served::{Served, Wanted};

const DISKS: usize = 3;
const QUEUES: usize = 2;
const SNAPSHOTS: usize = 20;

struct Drill {
    format: &'static str,
    cache: &'static str,
    /// Of a block, in bytes.
    size: usize,
    /// Blocks of a queue. Few are written again and again; of many, most are new to each overlay.
    places: usize,
    mix: Mix,
}

impl Drill {
    fn run(self) {
        let bytes = (self.size * self.places * QUEUES) as u64;
        let Self { format, cache, .. } = self;
        let mut served = Served::start(Wanted { format, cache, disks: DISKS, queues: QUEUES, bytes });
        let clock = Arc::new(Clock::new());
        let new = |queue| Ledger::new(self.size, queue, QUEUES, self.places);
        let ledgers = vec![(0..QUEUES).map(new).collect(); DISKS];
        let load = Load::connect(&served.sockets, ledgers, self.mix, &clock);
        let mut cuts = Vec::new();
        for number in 0..SNAPSHOTS {
            // Some right after the other, some with time for much to happen.
            std::thread::sleep(Duration::from_millis([0, 5, 20][number % 3]));
            cuts.push(served.snapshot(&format!("s{number}"), &clock));
        }
        // An export must not see what is written meanwhile.
        let early = served.export_all(&cuts[0].name);
        let ledgers = load.finish();
        let written: usize = ledgers.iter().flatten().map(Ledger::count).sum();
        assert!(written > 50 * SNAPSHOTS, "only {written} changes: that was no load");
        assert!(served.export_all(&cuts[0].name) == early);
        verify(&mut served, &cuts, &ledgers);
    }
}

/// Proves each snapshot; then, with the daemon gone, that QEMU's tools find the same in sound images.
fn verify(served: &mut Served, cuts: &[Cut], ledgers: &[Vec<Ledger>]) {
    for cut in cuts {
        let images = served.export_all(&cut.name).into_iter();
        let disks: Vec<_> = images.zip(ledgers).map(|(image, all)| (image, all.iter().collect())).collect();
        prove(cut, &disks);
    }
    let some: Vec<_> = cuts.iter().enumerate().step_by(5).collect();
    let ids = served.ids();
    let exports: Vec<_> =
        some.iter().flat_map(|(_, cut)| ids.iter().map(|id| served.export_file(&cut.name, id))).collect();
    served.stop();
    let chains: Vec<_> = ids.iter().map(|id| served.layers(id)).collect();
    for (path, _) in chains.iter().flatten().filter(|(_, format)| format == "qcow2") {
        check_clean(path);
    }
    let layers = some.iter().flat_map(|(number, _)| chains.iter().map(|chain| &chain[*number]));
    for (export, (path, format)) in exports.iter().zip(layers) {
        same(export, path, format);
    }
    for (disk, id) in ids.iter().enumerate() {
        let (cut, out) = (&cuts[7].name, served.path(&format!("offline.{id}")));
        let words = ["snapshot", "export", cut, "--disk", id, "--format", "raw", out.to_str().unwrap()];
        let output = served.command(&[&words[..], &["--state", "state"]].concat());
        assert!(output.status.success(), "{output:?}");
        same(&out, &chains[disk][7].0, &chains[disk][7].1);
    }
}

#[test]
fn blocks_on_a_raw_base() {
    Drill { format: "raw", cache: "writeback", size: 4096, places: 512, mix: Mix::Stamps }.run();
}

#[test]
fn blocks_again_and_again_with_zeroes_and_discards_past_the_page_cache() {
    Drill { format: "raw", cache: "none", size: 4096, places: 32, mix: Mix::Discards }.run();
}

#[test]
fn sectors_with_zeroes_on_a_qcow2_base() {
    Drill { format: "qcow2", cache: "writeback", size: 512, places: 1024, mix: Mix::Zeroes }.run();
}

#[test]
fn sectors_on_a_qcow2_base_past_the_page_cache() {
    Drill { format: "qcow2", cache: "none", size: 512, places: 1024, mix: Mix::Zeroes }.run();
}
