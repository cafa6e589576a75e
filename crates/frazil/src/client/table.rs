//! Answers as people read them.

use block::IoStatus;
use comfy_table::{CellAlignment, Table, presets};
use control::DaemonStatus;
use serde::{Deserialize, Serialize};
use snapshot::{CheckpointRecord, DiskLayer, DiskProbe, DiskStatus, Grade, JobInfo, SnapshotRecord, Timing};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::marks::Found;
use crate::config::Word;

/// A snapshot as `show` tells it: what was recorded, and what a look into it finds.
#[derive(Debug, Deserialize)]
pub(super) struct Shown {
    #[serde(flatten)]
    record: SnapshotRecord,
    probe: Option<Vec<DiskProbe>>,
}

/// What `status` tells: of the daemon, and of each disk.
#[derive(Debug, Deserialize)]
pub(super) struct Status {
    #[serde(flatten)]
    daemon: DaemonStatus,
    disks: Vec<DiskStatus>,
}

/// Lines under a head, columns apart by two blanks. Never folded: paths are there to be copied.
pub(super) fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>, right: &[usize]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(head).add_rows(rows);
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// `frazil snapshot list`.
pub(super) fn list(records: &[SnapshotRecord]) -> String {
    if records.is_empty() {
        return "no snapshots\n".to_owned();
    }
    let rows = records.iter().map(|record| {
        vec![
            record.name.clone(),
            moment(record.time),
            grade(record.grade).to_owned(),
            record.timing.frozen.map_or("-".to_owned(), duration),
            duration(record.timing.gate_closed),
            duration(record.timing.longest_wait),
            record.disks.iter().map(|disk| disk.id.as_str()).collect::<Vec<_>>().join(","),
        ]
    });
    table(&["NAME", "TIME", "GRADE", "FROZEN", "GATE", "WAIT", "DISKS"], rows, &[3, 4, 5])
}

/// `frazil checkpoint list` and `create`.
pub(super) fn checkpoints(records: &[CheckpointRecord]) -> String {
    if records.is_empty() {
        return "no checkpoints\n".to_owned();
    }
    let rows = records.iter().map(|record| {
        let disks = record.disks.iter().map(|disk| disk.id.as_str()).collect::<Vec<_>>();
        vec![record.name.clone(), moment(record.time), grade(record.grade).to_owned(), disks.join(",")]
    });
    table(&["NAME", "TIME", "GRADE", "DISKS"], rows, &[])
}

/// `frazil changes`.
pub(super) fn changes(found: &Found) -> String {
    let rows = found.ranges.iter().map(|range| vec![range.offset.to_string(), range.length.to_string()]);
    let changed: u64 = found.ranges.iter().map(|range| range.length).sum();
    let mut text = match found.ranges.is_empty() {
        true => String::new(),
        false => table(&["OFFSET", "LENGTH"], rows, &[0, 1]),
    };
    text += &format!("{} of {} changed\n", bytes(changed), bytes(found.capacity));
    text
}

/// `frazil snapshot create`, `release` and `show`.
pub(super) fn snapshot(shown: &Shown) -> String {
    let Shown { record, probe } = shown;
    let counts = match (record.frozen_count, record.thawed_count) {
        (Some(frozen), Some(thawed)) => format!("{frozen} frozen, {thawed} thawed"),
        (Some(frozen), None) => format!("{frozen} frozen, thaw not confirmed"),
        (None, _) => "not asked to freeze".to_owned(),
    };
    let durable = if record.sealed { "yes" } else { "not yet: the old layers are being synced" };
    let facts = [
        ("name", record.name.clone()),
        ("time", moment(record.time)),
        ("grade", grade(record.grade).to_owned()),
        ("reason", record.reason.clone()),
        ("agent", counts),
        ("durable", durable.to_owned()),
    ];
    let mut text = list_of(&facts);
    let images = record
        .disks
        .iter()
        .map(|disk| vec![disk.id.clone(), disk.format.word().to_owned(), disk.path.display().to_string()]);
    text.push('\n');
    text += &table(&["DISK", "FORMAT", "IMAGE"], images, &[]);
    text.push('\n');
    text += &table(&["STEP", "TOOK"], steps(&record.timing), &[1]);
    if let Some(probe) = probe {
        text.push('\n');
        text += &volumes(probe);
    }
    text
}

fn volumes(probe: &[DiskProbe]) -> String {
    let rows = probe.iter().flat_map(|disk| {
        disk.volumes.iter().map(|volume| {
            let number = volume.partition.map_or_else(|| "-".to_owned(), |number| number.to_string());
            vec![
                disk.id.clone(),
                number,
                bytes(volume.size),
                word(&volume.kind),
                word(&volume.verdict),
                volume.detail.clone(),
            ]
        })
    });
    table(&["DISK", "PART", "SIZE", "CONTENT", "PROBE", "WHY"], rows, &[1, 2])
}

/// An enumerated value as QMP spells it.
fn word(value: &impl Serialize) -> String {
    let spelled = serde_json::to_value(value).ok();
    spelled.and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

/// `frazil status`.
pub(super) fn status(status: &Status) -> String {
    let Status { daemon, disks } = status;
    let owed =
        if daemon.thaw_owed { "OWED: the guest may be frozen, Frazil keeps trying" } else { "not owed" };
    let mut facts = vec![
        ("up for", span(daemon.uptime)),
        ("state", daemon.state.display().to_string()),
        ("free", bytes(daemon.free)),
        ("freeze by", daemon.freeze_owner.word().to_owned()),
        ("agent", daemon.agent.as_ref().map_or("none given".to_owned(), |path| path.display().to_string())),
        ("thaw", owed.to_owned()),
        ("snapshots", daemon.snapshots.to_string()),
        (
            "sandbox",
            format!("Landlock {}, seccomp {}", word(&daemon.sandbox.landlock), word(&daemon.sandbox.seccomp)),
        ),
    ];
    facts.extend(daemon.sandbox.missing.iter().map(|what| ("not closed", what.clone())));
    facts.extend(daemon.prepared.iter().map(|name| ("prepared", format!("{name}, waits for its release"))));
    let waiting = disks.iter().filter(|disk| disk.parked > 0).map(|disk| {
        let why = if disk.io_status == IoStatus::NoSpace { "room on the host" } else { "the host" };
        ("waiting", format!("{} requests of disk {} wait for {why}", disk.parked, disk.id))
    });
    facts.extend(waiting);
    let rows = disks.iter().map(|disk| {
        let active = disk.layers.last();
        vec![
            disk.id.clone(),
            bytes(disk.capacity),
            if disk.read_only { "read-only" } else { "read-write" }.to_owned(),
            if disk.connected { "connected" } else { "waiting" }.to_owned(),
            disk.layers.len().to_string(),
            active.map_or(String::new(), |layer| layer.path.display().to_string()),
        ]
    });
    list_of(&facts)
        + "\n"
        + &table(&["DISK", "SIZE", "ACCESS", "FRONT-END", "LAYERS", "ACTIVE"], rows, &[1, 4])
}

/// `frazil job list`.
pub(super) fn jobs(jobs: &[JobInfo]) -> String {
    if jobs.is_empty() {
        return "no jobs\n".to_owned();
    }
    let rows = jobs.iter().map(|job| {
        let (done, total) = (bytes(job.current_progress), bytes(job.total_progress));
        let error = job.error.clone().unwrap_or_else(|| "-".to_owned());
        vec![job.id.clone(), word(&job.r#type), word(&job.status), done, total, error]
    });
    table(&["JOB", "TYPE", "STATUS", "COPIED", "OF", "ERROR"], rows, &[3, 4])
}

/// `frazil chain list`.
pub(super) fn layers(layers: &[DiskLayer]) -> String {
    let rows = layers.iter().map(|layer| {
        let taken = layer.actual_size.map_or_else(|| "-".to_owned(), bytes);
        let failed = if layer.sync_failed { " (a sync of it has failed)" } else { "" };
        let (format, file) = (word(&layer.format), format!("{}{failed}", layer.path.display()));
        vec![layer.node_name.clone(), format, bytes(layer.virtual_size), taken, file]
    });
    table(&["NODE", "FORMAT", "SIZE", "TAKEN", "FILE"], rows, &[2, 3])
}

/// Bytes a second.
pub(super) fn speed(bytes_a_second: u64) -> String {
    match bytes_a_second {
        0 => "full speed".to_owned(),
        limited => format!("{} a second at most", bytes(limited)),
    }
}

/// A name and its value a line.
fn list_of(facts: &[(&str, String)]) -> String {
    facts.iter().map(|(name, value)| format!("{name:<11}{value}\n")).collect()
}

/// Seconds as days, hours and minutes, the two that say most.
fn span(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min {} s", seconds % 60),
        (0, hours, minutes) => format!("{hours} h {} min", minutes % 60),
        (days, hours, _) => format!("{days} d {} h", hours % 24),
    }
}

fn steps(timing: &Timing) -> Vec<Vec<String>> {
    let steps = [
        ("prepare", Some(timing.prepare)),
        ("pre-sync", timing.pre_sync),
        ("freeze", timing.freeze),
        ("gate", Some(timing.gate)),
        ("drain", Some(timing.drain)),
        ("pivot", Some(timing.pivot)),
        ("open", Some(timing.open)),
        ("thaw", timing.thaw),
        ("seal", Some(timing.seal)),
        ("gate closed in all", Some(timing.gate_closed)),
        ("guest frozen in all", timing.frozen),
        ("longest request wait", Some(timing.longest_wait)),
    ];
    let row =
        |(name, took): (&str, Option<f64>)| vec![name.to_owned(), took.map_or("-".to_owned(), duration)];
    steps.into_iter().map(row).collect()
}

fn grade(grade: Grade) -> &'static str {
    match grade {
        Grade::Filesystem => "filesystem",
        Grade::Crash => "crash",
    }
}

/// To the second, in UTC, sortable.
fn moment(time: OffsetDateTime) -> String {
    let whole = time.replace_nanosecond(0).unwrap_or(time);
    whole.format(&Rfc3339).unwrap_or_else(|_| time.to_string())
}

/// Milliseconds as three digits and a unit that fits.
pub(super) fn duration(millis: f64) -> String {
    match millis {
        ms if ms < 1.0 => format!("{:.0} µs", ms * 1e3),
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 100.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.2} s", ms / 1e3),
    }
}

/// Bytes with a binary unit, whole if it comes out even.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = count as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).unwrap_or(&"B");
    if value.fract() == 0.0 { format!("{value} {name}") } else { format!("{value:.1} {name}") }
}

#[cfg(test)]
mod tests;
