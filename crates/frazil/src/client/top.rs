//! `frazil top`: what the disks do just now, live in the terminal.
//!
//! Two looks at the daemon's counts make a sample; the first is taken at once and shows nothing yet. On a terminal the
//! table is drawn over the one before, by escapes that every terminal of the last decades knows, or printed beneath it where
//! `TERM` is `dumb`; elsewhere there is one sample.

use std::io::{self, IsTerminal};
use std::thread;
use std::time::{Duration, Instant};

use control::DaemonStatus;
use serde::{Deserialize, Serialize};
use serde_json::json;
use snapshot::{DiskStatus, JobInfo};

use super::print::{decode, print};
use super::table;
use super::via::Connection;
use crate::cli::Top;
use crate::failure::{Failure, printable};

/// Home, then what is left of the line and of the screen is cleared as it is drawn.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";
const CLEAR_ALL: &str = "\x1b[2J";

/// What the daemon says at one instant.
struct Look {
    at: Instant,
    status: Status,
    stats: Vec<BlockStats>,
    jobs: Vec<JobInfo>,
}

#[derive(Deserialize)]
struct Status {
    #[serde(flatten)]
    daemon: DaemonStatus,
    disks: Vec<DiskStatus>,
}

/// As much of `query-blockstats` as is shown.
#[derive(Deserialize)]
struct BlockStats {
    device: String,
    stats: Counts,
}

#[derive(Clone, Copy, Default, Deserialize)]
struct Counts {
    rd_operations: u64,
    wr_operations: u64,
    flush_operations: u64,
    rd_bytes: u64,
    wr_bytes: u64,
    rd_total_time_ns: u64,
    wr_total_time_ns: u64,
    flush_total_time_ns: u64,
}

/// What is shown.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Sample {
    /// Seconds that it is of.
    seconds: f64,
    thaw_owed: bool,
    prepared: Option<String>,
    free: u64,
    snapshots: u64,
    pub(super) disks: Vec<DiskSample>,
    jobs: Vec<JobInfo>,
}

/// A disk's share. Rates are of a second, latencies in microseconds and absent where nothing was timed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct DiskSample {
    pub(super) id: String,
    connected: bool,
    layers: usize,
    parked: u64,
    reads: f64,
    writes: f64,
    flushes: f64,
    read_bytes: f64,
    written_bytes: f64,
    read_latency: Option<f64>,
    write_latency: Option<f64>,
    flush_latency: Option<f64>,
}

/// `frazil top`.
pub(crate) fn top(command: &Top) -> Result<(), Failure> {
    let mut connection = Connection::open(&command.daemon)?;
    let terminal = io::stdout().is_terminal();
    let once = command.once || command.json || !terminal;
    let redrawn = !once && std::env::var_os("TERM").is_some_and(|term| term != "dumb");
    let mut before = look(&mut connection)?;
    if redrawn {
        print(CLEAR_ALL)?;
    }
    loop {
        thread::sleep(command.interval);
        let now = look(&mut connection)?;
        let sample = sample(&before, &now);
        let text = match command.json {
            true => format!("{:#}\n", json!(sample)),
            false => printable(&drawn(&sample)),
        };
        match redrawn {
            true => print(&format!("{HOME}{}{CLEAR_BELOW}", text.replace('\n', &format!("{CLEAR_LINE}\n"))))?,
            false => print(&text)?,
        }
        if once {
            return Ok(());
        }
        before = now;
    }
}

fn look(connection: &mut Connection) -> Result<Look, Failure> {
    let mut ask = |command| connection.ask("look at the disks", command, json!({}));
    let what = "look at the disks";
    Ok(Look {
        stats: decode(what, &ask("query-blockstats")?)?,
        at: Instant::now(),
        status: decode(what, &ask("query-frazil")?)?,
        jobs: decode(what, &ask("query-jobs")?)?,
    })
}

fn sample(before: &Look, now: &Look) -> Sample {
    let time = now.at - before.at;
    let counts = |look: &Look, id: &str| {
        look.stats.iter().find(|disk| disk.device == id).map(|disk| disk.stats).unwrap_or_default()
    };
    let Status { daemon, disks } = &now.status;
    Sample {
        seconds: time.as_secs_f64(),
        thaw_owed: daemon.thaw_owed,
        prepared: daemon.prepared.clone(),
        free: daemon.free,
        snapshots: daemon.snapshots,
        disks: disks
            .iter()
            .map(|disk| disk_sample(disk, &counts(before, &disk.id), &counts(now, &disk.id), time))
            .collect(),
        jobs: now.jobs.clone(),
    }
}

fn disk_sample(disk: &DiskStatus, before: &Counts, now: &Counts, time: Duration) -> DiskSample {
    let grown = |count: fn(&Counts) -> u64| count(now).saturating_sub(count(before)) as f64;
    let rate = |count| grown(count) / time.as_secs_f64().max(f64::EPSILON);
    let latency = |nanos, count| {
        let (nanos, count) = (grown(nanos), grown(count));
        (nanos > 0.0 && count > 0.0).then(|| nanos / count / 1000.0)
    };
    DiskSample {
        id: disk.id.clone(),
        connected: disk.connected,
        layers: disk.layers.len(),
        parked: disk.parked,
        reads: rate(|counts| counts.rd_operations),
        writes: rate(|counts| counts.wr_operations),
        flushes: rate(|counts| counts.flush_operations),
        read_bytes: rate(|counts| counts.rd_bytes),
        written_bytes: rate(|counts| counts.wr_bytes),
        read_latency: latency(|counts| counts.rd_total_time_ns, |counts| counts.rd_operations),
        write_latency: latency(|counts| counts.wr_total_time_ns, |counts| counts.wr_operations),
        flush_latency: latency(|counts| counts.flush_total_time_ns, |counts| counts.flush_operations),
    }
}

fn drawn(sample: &Sample) -> String {
    let mut line = format!("{} free, {} snapshots", table::bytes(sample.free), sample.snapshots);
    if sample.thaw_owed {
        line += ", THAW OWED";
    }
    if let Some(name) = &sample.prepared {
        line += &format!(", {name} is prepared and waits for its release");
    }
    let latency =
        |micros: Option<f64>| micros.map_or("-".to_owned(), |micros| table::duration(micros / 1000.0));
    let rows = sample.disks.iter().map(|disk| {
        vec![
            disk.id.clone(),
            if disk.connected { "connected" } else { "waiting" }.to_owned(),
            format!("{:.0}", disk.reads),
            format!("{:.0}", disk.writes),
            format!("{:.0}", disk.flushes),
            format!("{:.1}", disk.read_bytes / 1e6),
            format!("{:.1}", disk.written_bytes / 1e6),
            latency(disk.read_latency),
            latency(disk.write_latency),
            latency(disk.flush_latency),
            disk.parked.to_string(),
            disk.layers.to_string(),
        ]
    });
    let head = [
        "DISK",
        "FRONT-END",
        "READ/S",
        "WRITE/S",
        "FLUSH/S",
        "READ MB/S",
        "WRITE MB/S",
        "READ",
        "WRITE",
        "FLUSH",
        "PARKED",
        "LAYERS",
    ];
    let right: Vec<_> = (2..head.len()).collect();
    let mut text = format!("{line}\n\n{}", table::table(&head, rows, &right));
    if !sample.jobs.is_empty() {
        text += &format!("\n{}", table::jobs(&sample.jobs));
    }
    text
}
