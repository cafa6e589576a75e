//! One queue and two: what a request costs must not rise, and on free processors two do nearly twice as much.
//!
//! The drivers poll, a thread a queue. So one queue keeps two processors busy and two queues four: with fewer, the
//! figure to look at is the processor time of a request.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use frazil_integration::{Context, Daemon, Error, Result, Scratch};
use frazil_tests::{Load, Measured};
use serde_json::{Value, json};

use crate::{Tables, median, say, table};

/// Runs of each, in turns.
const ROUNDS: usize = 5;
const RUN: Duration = Duration::from_millis(800);

pub(crate) fn measure(folder: &Path) -> Result<Tables> {
    Scratch::with_in(folder, "queues", |scratch| {
        let daemon = Daemon::start_with(scratch, "none", &["vda"], &["--freeze", "never"])?;
        let socket = daemon.sockets().first().ok_or_else(|| Error::new("no disk"))?;
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let mut rows = table(["4 KiB, QD 32", "QUEUES", "IOPS", "CPU µs/REQ", "IOPS RATIO", "CPU RATIO"]);
        let mut figures: Vec<Value> = Vec::new();
        // All blocks are there, and so is an overlay that holds them all.
        let fill = Load { write: true, block: 4096, depth: 32 };
        for image in ["raw", "overlay"] {
            if image == "overlay" {
                daemon.snapshot("overlay", "never")?;
            }
            fill.once(socket, None, 4096).context("frazil")?;
            for (write, name) in [(false, "randread"), (true, "randwrite")] {
                let load = Load { write, ..fill };
                let mut pairs = Vec::new();
                for _ in 0..ROUNDS {
                    let run = |queues| {
                        load.spread(socket, Some(daemon.id()), queues, Instant::now() + RUN).context("frazil")
                    };
                    pairs.push((run(1)?, run(2)?));
                }
                let ratio =
                    |of: fn(&Measured) -> f64| median(pairs.iter().map(|(one, two)| of(two) / of(one)));
                let (iops, cpu) = (ratio(|run| run.iops), ratio(|run| run.cpu_us));
                let one = medians(pairs.iter().map(|(one, _)| one));
                let two = medians(pairs.iter().map(|(_, two)| two));
                let row = |queues: &str, [iops, cpu]: [f64; 2], ratios: [String; 2]| {
                    let name = format!("{image} {name}");
                    [name, queues.to_owned(), format!("{iops:.0}"), format!("{cpu:.2}")]
                        .into_iter()
                        .chain(ratios)
                };
                rows.add_row(row("1", one, [String::new(), String::new()]));
                rows.add_row(row("2", two, [format!("{iops:.2}"), format!("{cpu:.2}")]));
                figures
                    .push(json!({ "load": format!("{image} {name}"), "iops-ratio": iops, "cpu-ratio": cpu }));
                say(&format!("{image} {name}, two queues by one: CPU {cpu:.2}, IOPS {iops:.2}"));
            }
        }
        Ok((rows, json!({ "processors": processors, "rows": figures })))
    })
}

/// IOPS, processor time.
fn medians<'a>(runs: impl Iterator<Item = &'a Measured> + Clone) -> [f64; 2] {
    [median(runs.clone().map(|run| run.iops)), median(runs.map(|run| run.cpu_us))]
}
