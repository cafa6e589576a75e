//! Reads and writes of 4 KiB, from a driver that polls, against qemu-storage-daemon.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use comfy_table::Table;
use frazil_integration::{Context, Daemon, Result, Scratch};
use frazil_tests::{Load, Measured};
use serde_json::{Value, json};

use crate::peer::{Image, Peer, Settings};
use crate::{Tables, median, say, table};

/// Runs of each, in turns.
const ROUNDS: usize = 5;
const RUN: Duration = Duration::from_millis(800);
const BLOCK: usize = 4096;
/// Of a first write: one in each cluster of the other's default size.
const STRIDE: u64 = 64 << 10;

pub(crate) fn measure(folder: &Path) -> Result<Tables> {
    Scratch::with_in(folder, "hits", |scratch| {
        let daemon = Daemon::start_with(scratch, "none", &["vda"], &["--freeze", "never"])?;
        let raw = scratch.path("vda.raw");
        fill(&raw)?;
        let settings = Settings::best(scratch, &raw)?;
        let mut rows = Rows { table: header(), figures: Vec::new() };
        let bench = Bench { scratch, daemon, raw, settings };
        bench.raw(&mut rows)?;
        bench.overlay(&mut rows)?;
        bench.first_writes(&mut rows)?;
        Ok((rows.table, json!({ "qemu-storage-daemon": settings.name(), "rows": rows.figures })))
    })
}

struct Bench<'a> {
    scratch: &'a Scratch,
    daemon: Daemon,
    raw: PathBuf,
    settings: Settings,
}

impl Bench<'_> {
    fn raw(&self, rows: &mut Rows) -> Result<()> {
        let peer = self.peer(&Image::Raw)?;
        for depth in [1, 32] {
            for (write, name) in [(false, "randread"), (true, "randwrite")] {
                self.hits(rows, &peer, &format!("raw {name}"), Load { write, block: BLOCK, depth })?;
            }
        }
        Ok(())
    }

    /// Each run on a new overlay.
    fn first_writes(&self, rows: &mut Rows) -> Result<()> {
        let load = Load { write: true, block: BLOCK, depth: 32 };
        let kinds = [("default", "lazy_refcounts=off"), ("extended L2", "extended_l2=on,cluster_size=128k")];
        for (name, options) in kinds {
            let mut pairs = Vec::new();
            for round in 0..ROUNDS {
                let snapshot = format!("{}-{round}", name.replace(' ', "-"));
                self.daemon.snapshot(&snapshot, "never")?;
                let ours = load.once(self.socket(), Some(self.daemon.id()), STRIDE).context("frazil")?;
                let theirs = self.peer(&Image::Overlay(options))?.run_once(load, STRIDE)?;
                pairs.push((ours, theirs));
            }
            rows.add(&format!("first writes, theirs {name}"), load, &pairs);
        }
        Ok(())
    }

    /// On an overlay that is empty, and on one that holds everything.
    fn overlay(&self, rows: &mut Rows) -> Result<()> {
        let load = |write| Load { write, block: BLOCK, depth: 32 };
        self.daemon.snapshot("overlay", "never")?;
        let peer = self.peer(&Image::Overlay("extended_l2=on,cluster_size=128k"))?;
        self.hits(rows, &peer, "overlay randread, falls through", load(false))?;
        load(true).once(self.socket(), None, BLOCK as u64).context("frazil")?;
        peer.run_once(load(true), BLOCK as u64)?;
        self.hits(rows, &peer, "overlay randread", load(false))?;
        self.hits(rows, &peer, "overlay randwrite", load(true))
    }

    fn hits(&self, rows: &mut Rows, peer: &Peer, name: &str, load: Load) -> Result<()> {
        let mut pairs = Vec::new();
        for _ in 0..ROUNDS {
            let go_on = || {
                let end = Instant::now() + RUN;
                move || Instant::now() < end
            };
            let ours = load.random(self.socket(), Some(self.daemon.id()), go_on()).context("frazil")?;
            pairs.push((ours, peer.run(load, go_on())?));
        }
        rows.add(name, load, &pairs);
        Ok(())
    }

    fn socket(&self) -> &Path {
        self.daemon.sockets().first().map_or(Path::new(""), PathBuf::as_path)
    }

    fn peer(&self, image: &Image<'_>) -> Result<Peer> {
        Peer::start(self.scratch, self.settings, &self.raw, image)
    }
}

/// Bytes that are no holes, so that a read is one.
fn fill(raw: &Path) -> Result<()> {
    let mut file = File::options().write(true).open(raw).context(raw.display())?;
    let chunk = vec![0xa5; 1 << 20];
    (0..Daemon::DISK_BYTES >> 20).try_for_each(|_| file.write_all(&chunk)).context(raw.display())
}

pub(crate) fn header() -> Table {
    table(["4 KiB", "QD", "", "IOPS", "P50 µs", "P99 µs", "CPU µs/REQ", "IOPS RATIO", "CPU RATIO"])
}

pub(crate) struct Rows {
    pub(crate) table: Table,
    pub(crate) figures: Vec<Value>,
}

impl Rows {
    /// Adds what the runs of ours and theirs gave: medians, and the medians of the ratios in each round.
    pub(crate) fn add(&mut self, name: &str, load: Load, pairs: &[(Measured, Measured)]) {
        let ratio =
            |of: fn(&Measured) -> f64| median(pairs.iter().map(|(ours, theirs)| of(ours) / of(theirs)));
        let (iops, cpu) = (ratio(|run| run.iops), ratio(|run| run.cpu_us));
        let ours: Vec<&Measured> = pairs.iter().map(|(ours, _)| ours).collect();
        let theirs: Vec<&Measured> = pairs.iter().map(|(_, theirs)| theirs).collect();
        let both = [("frazil", medians(&ours)), ("qemu-storage-daemon", medians(&theirs))];
        for (server, [median_iops, p50, p99, cpu_us]) in both {
            let ratios = match server {
                "frazil" => [format!("{iops:.2}"), format!("{cpu:.2}")],
                _ => [String::new(), String::new()],
            };
            let figures = [
                format!("{median_iops:.0}"),
                format!("{p50:.0}"),
                format!("{p99:.0}"),
                format!("{cpu_us:.2}"),
            ];
            let head = [name.to_owned(), load.depth.to_string(), server.to_owned()];
            self.table.add_row(head.into_iter().chain(figures).chain(ratios));
        }
        let figures = |[iops, p50, p99, cpu]: [f64; 4]| json!({ "iops": iops, "p50-us": p50, "p99-us": p99, "cpu-us": cpu });
        let [(_, ours), (_, theirs)] = both;
        self.figures.push(json!({
            "load": name, "depth": load.depth, "frazil": figures(ours), "qemu-storage-daemon": figures(theirs),
            "iops-ratio": iops, "cpu-ratio": cpu,
        }));
        say(&format!("{name}, {} in flight: CPU {cpu:.2}, IOPS {iops:.2}", load.depth));
    }
}

/// IOPS, p50, p99, processor time.
fn medians(runs: &[&Measured]) -> [f64; 4] {
    let of = |figure: fn(&Measured) -> f64| median(runs.iter().map(|run| figure(run)));
    [
        of(|run| run.iops),
        of(|run| f64::from(run.p50_us)),
        of(|run| f64::from(run.p99_us)),
        of(|run| run.cpu_us),
    ]
}
