//! How long a cut holds requests: snapshots without a guest's freeze, of disks that a driver reads or writes.

use std::path::Path;
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
const LOAD: Load = Load { write: true, block: 4096, depth: 32 };
/// Microseconds of a drain that found requests in flight; looking for them takes 2 to 5.
const BUSY: f64 = 10.0;
const DISKS: [&str; 2] = ["vda", "vdb"];

pub(crate) fn measure(folder: &Path) -> Result<Tables> {
    let mut table = table([
        "CUT",
        "DISKS",
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
    for count in 1..=DISKS.len() {
        let disks = DISKS.get(..count).unwrap_or_default();
        for loaded in [false, true] {
            let row = Scratch::with_in(folder, "cuts", |scratch| cuts(scratch, disks, loaded, &mut table))?;
            figures.push(row);
        }
    }
    Ok((table, Value::Array(figures)))
}

fn cuts(scratch: &Scratch, disks: &[&str], loaded: bool, table: &mut Table) -> Result<Value> {
    let daemon = Daemon::start_with(scratch, "none", disks, &["--freeze", "never"])?;
    let (taken, with, without) = match loaded {
        true => {
            // Without cuts first: all that follows is on overlays, where first writes cost more.
            daemon.snapshot("before", "never")?;
            let (_, without) = under_load(&daemon, || {
                thread::sleep(PAUSE * SNAPSHOTS as u32);
                Ok(Vec::new())
            })?;
            let (taken, with) = under_load(&daemon, || take(&daemon))?;
            (taken, with, without)
        }
        false => {
            let connect = |socket| Driver::connect(socket, 1, 1, 4096).context("connect");
            let _connected: Vec<Driver> =
                daemon.sockets().iter().map(|socket| connect(socket)).collect::<Result<_>>()?;
            (take(&daemon)?, Vec::new(), Vec::new())
        }
    };
    let step = |step: &str| -> Vec<f64> {
        taken.iter().filter_map(|cut| cut.timing.get(step)).map(|millis| millis * 1e3).collect()
    };
    let mut cells =
        vec![if loaded { "QD32 random writes" } else { "idle" }.to_owned(), disks.len().to_string()];
    let mut figures = json!({ "loaded": loaded, "disks": disks.len(), "snapshots": taken.len() });
    for name in ["gate-closed", "longest-wait"] {
        let (middle, most) = (median(step(name)), largest(step(name)));
        cells.extend([format!("{middle:.0}"), format!("{most:.0}")]);
        figures[format!("{name}-us")] = json!({ "median": middle, "max": most });
        if name == "gate-closed" {
            // A processor that is kept from the driver leaves the device idle, and the cut with nothing to wait for.
            let both = step(name).into_iter().zip(step("drain"));
            let busy: Vec<f64> = both.filter(|&(_, drain)| drain > BUSY).map(|(gate, _)| gate).collect();
            let middle = median(busy.iter().copied());
            cells.extend([
                busy.len().to_string(),
                if busy.is_empty() { "-".to_owned() } else { format!("{middle:.0}") },
            ]);
            figures["busy"] = json!({ "snapshots": busy.len(), "gate-closed-us": middle });
        }
    }
    for (name, runs) in [("driver", &with), ("driver-without-cuts", &without)] {
        let (p999, most) = (worst(runs, |run| run.p999_us), worst(runs, |run| run.max_us));
        cells.extend([p999, most].map(|us| us.map_or("-".to_owned(), |us| us.to_string())));
        figures[name] = json!({ "p99.9-us": p999, "max-us": most });
    }
    say(&format!("cuts: {}", cells.join(" ")));
    table.add_row(cells);
    Ok(figures)
}

fn worst(runs: &[Measured], figure: fn(&Measured) -> u32) -> Option<u32> {
    runs.iter().map(figure).max()
}

fn take(daemon: &Daemon) -> Result<Vec<Snapshot>> {
    let one = |number| {
        thread::sleep(PAUSE);
        daemon.snapshot(&format!("cut-{number}"), "never")
    };
    (0..SNAPSHOTS).map(one).collect()
}

/// Does `work` while every disk has its load.
fn under_load(
    daemon: &Daemon,
    work: impl FnOnce() -> Result<Vec<Snapshot>>,
) -> Result<(Vec<Snapshot>, Vec<Measured>)> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = |socket| LOAD.random(socket, None, || !stop.load(Ordering::Relaxed));
        let loads: Vec<_> = daemon.sockets().iter().map(|socket| scope.spawn(move || load(socket))).collect();
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
