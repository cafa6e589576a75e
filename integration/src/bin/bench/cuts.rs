//! How long a cut holds requests: snapshots without a guest's freeze, of disks that a driver reads or writes; of one disk
//! and of two, of long chains and of large disks.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use comfy_table::Table;
use frazil_integration::{Context, Daemon, Error, Result, Scratch, Snapshot};
use frazil_tests::{Driver, Load, Measured};
use serde_json::{Value, json};

use crate::{Tables, largest, median, say, table};

const SNAPSHOTS: usize = 24;
/// Between two snapshots.
const PAUSE: Duration = Duration::from_millis(50);
/// Without cuts it is measured for so long.
const ALONE: Duration = Duration::from_millis(1200);
/// Microseconds of a drain that found requests in flight; looking for them takes 2 to 5.
const BUSY: f64 = 10.0;
const SMALL: u64 = 1 << 30;
const LARGE: u64 = 1 << 40;

/// What is cut.
struct Case {
    load: Doing,
    disks: usize,
    /// Bytes of each.
    bytes: u64,
    /// Snapshots that there are before the first cut that counts.
    overlays: usize,
}

/// What drivers do meanwhile.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Doing {
    Nothing,
    /// So no entry of any table has changed since the cut before.
    Reads,
    /// All over the disk, so most are first writes, and as many entries have changed.
    Writes,
}

const CASES: [Case; 12] = [
    Case { load: Doing::Nothing, disks: 1, bytes: SMALL, overlays: 1 },
    Case { load: Doing::Nothing, disks: 2, bytes: SMALL, overlays: 1 },
    Case { load: Doing::Reads, disks: 1, bytes: SMALL, overlays: 1 },
    Case { load: Doing::Reads, disks: 1, bytes: SMALL, overlays: 200 },
    Case { load: Doing::Reads, disks: 1, bytes: LARGE, overlays: 1 },
    Case { load: Doing::Reads, disks: 1, bytes: LARGE, overlays: 200 },
    Case { load: Doing::Writes, disks: 1, bytes: SMALL, overlays: 1 },
    Case { load: Doing::Writes, disks: 1, bytes: SMALL, overlays: 200 },
    Case { load: Doing::Writes, disks: 1, bytes: LARGE, overlays: 1 },
    Case { load: Doing::Writes, disks: 1, bytes: LARGE, overlays: 200 },
    Case { load: Doing::Writes, disks: 2, bytes: SMALL, overlays: 1 },
    Case { load: Doing::Writes, disks: 2, bytes: SMALL, overlays: 200 },
];

/// A step of a cut in microseconds, of all cuts.
struct Step(Vec<f64>);

pub(crate) fn measure(folder: &Path) -> Result<Tables> {
    let mut table = table([
        "DRIVERS",
        "DISKS",
        "GiB",
        "OVERLAYS",
        "WRITES A CUT",
        "GATE µs",
        "MAX",
        "BUSY",
        "GATE µs",
        "LONGEST WAIT µs",
        "MAX",
        "DRIVER P99.9 µs",
        "MAX",
        "…WITHOUT CUTS",
        "MAX",
    ]);
    let mut figures = Vec::new();
    for case in &CASES {
        figures.push(Scratch::with_in(folder, "cuts", |scratch| case.measure(scratch, &mut table))?);
    }
    Ok((table, Value::Array(figures)))
}

/// A daemon with the disks of a case.
struct Served {
    daemon: Daemon,
    sockets: Vec<PathBuf>,
}

impl Doing {
    fn load(self) -> Option<Load> {
        match self {
            Self::Nothing => None,
            Self::Reads => Some(Load { write: false, block: 4096, depth: 32 }),
            Self::Writes => Some(Load { write: true, block: 4096, depth: 32 }),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "idle",
            Self::Reads => "QD32 random reads",
            Self::Writes => "QD32 random writes",
        }
    }
}

impl Case {
    fn measure(&self, scratch: &Scratch, table: &mut Table) -> Result<Value> {
        let served = self.serve(scratch)?;
        // Without cuts first, on an overlay as well, for there first writes cost more.
        for number in 0..self.overlays {
            served.daemon.snapshot(&format!("before-{number}"), "never")?;
        }
        let (taken, with, without) = match self.load.load() {
            Some(load) => {
                let (_, without) = served.under(load, || {
                    thread::sleep(ALONE);
                    Ok(Vec::new())
                })?;
                let (taken, with) = served.under(load, || served.cuts())?;
                (taken, with, without)
            }
            None => {
                let connect = |socket| Driver::connect(socket, 1, 1, 4096).context("connect");
                let _connected: Vec<Driver> =
                    served.sockets.iter().map(|socket| connect(socket)).collect::<Result<_>>()?;
                (served.cuts()?, Vec::new(), Vec::new())
            }
        };
        Ok(self.tell(&taken, &with, &without, table))
    }

    fn serve(&self, scratch: &Scratch) -> Result<Served> {
        let mut words = vec!["--freeze".to_owned(), "never".to_owned()];
        let mut sockets = Vec::new();
        for number in 0..self.disks {
            let image = scratch.sparse_file(&format!("{number}.raw"), self.bytes)?;
            let socket = scratch.path(&format!("{number}.sock"));
            let (path, at) = (image.display(), socket.display());
            words.extend(["--disk".to_owned(), format!("id=vd{number},path={path},format=raw,socket={at}")]);
            sockets.push(socket);
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Ok(Served { daemon: Daemon::start_with(scratch, "none", &[], &words)?, sockets })
    }

    fn tell(&self, taken: &[Snapshot], with: &[Measured], without: &[Measured], table: &mut Table) -> Value {
        let (gate, wait) = (Step::of(taken, "gate-closed"), Step::of(taken, "longest-wait"));
        // A processor that is kept from the driver leaves the device idle, and the cut with nothing to wait for.
        let drains = Step::of(taken, "drain").0;
        let busy = gate.0.iter().zip(drains).filter(|&(_, drain)| drain > BUSY).map(|(gate, _)| *gate);
        let busy = Step(busy.collect());
        let requests: usize = with.iter().map(|run| run.requests).sum();
        let writes = if self.load == Doing::Writes { requests / taken.len().max(1) } else { 0 };
        let mut cells = vec![self.load.name().to_owned()];
        cells.extend([self.disks, (self.bytes >> 30) as usize, self.overlays, writes].map(|n| n.to_string()));
        cells.extend([gate.median(), gate.most(), busy.0.len().to_string(), busy.median()]);
        cells.extend([wait.median(), wait.most()]);
        let mut figures = json!({
            "drivers": self.load.name(), "disks": self.disks, "bytes": self.bytes, "overlays": self.overlays,
            "snapshots": taken.len(), "writes-a-cut": writes, "gate-closed-us": gate.json(),
            "longest-wait-us": wait.json(), "busy": { "snapshots": busy.0.len(), "gate-closed-us": busy.json() },
        });
        for (name, runs) in [("driver", with), ("driver-without-cuts", without)] {
            let (p999, most) = (worst(runs, |run| run.p999_us), worst(runs, |run| run.max_us));
            cells.extend([p999, most].map(|us| us.map_or("-".to_owned(), |us| us.to_string())));
            figures[name] = json!({ "p99.9-us": p999, "max-us": most });
        }
        say(&format!("cuts: {}", cells.join(" ")));
        table.add_row(cells);
        figures
    }
}

impl Step {
    fn of(taken: &[Snapshot], name: &str) -> Self {
        Self(taken.iter().filter_map(|cut| cut.timing.get(name)).map(|millis| millis * 1e3).collect())
    }

    fn median(&self) -> String {
        self.cell(median(self.0.iter().copied()))
    }

    fn most(&self) -> String {
        self.cell(largest(self.0.iter().copied()))
    }

    fn cell(&self, figure: f64) -> String {
        if self.0.is_empty() { "-".to_owned() } else { format!("{figure:.0}") }
    }

    fn json(&self) -> Value {
        json!({ "median": median(self.0.iter().copied()), "max": largest(self.0.iter().copied()) })
    }
}

fn worst(runs: &[Measured], figure: fn(&Measured) -> u32) -> Option<u32> {
    runs.iter().map(figure).max()
}

impl Served {
    fn cuts(&self) -> Result<Vec<Snapshot>> {
        let one = |number| {
            thread::sleep(PAUSE);
            self.daemon.snapshot(&format!("cut-{number}"), "never")
        };
        (0..SNAPSHOTS).map(one).collect()
    }

    /// Does `work` while every disk has its load.
    fn under(
        &self,
        load: Load,
        work: impl FnOnce() -> Result<Vec<Snapshot>>,
    ) -> Result<(Vec<Snapshot>, Vec<Measured>)> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let run = |socket| load.random(socket, None, || !stop.load(Ordering::Relaxed));
            let loads: Vec<_> = self.sockets.iter().map(|socket| scope.spawn(move || run(socket))).collect();
            let done = work();
            stop.store(true, Ordering::Relaxed);
            let ended = loads.into_iter().map(|load| match load.join() {
                Ok(measured) => measured.context("a load"),
                Err(_) => Err(Error::new("a load panicked")),
            });
            let measured = ended.collect::<Result<_>>()?;
            Ok((done?, measured))
        })
    }
}
