//! How long a real guest stands frozen when it has much to write out, with and without the pre-sync.

use std::path::Path;

use frazil_integration::{Daemon, FileSystem, Guest, Kind, Result, Scratch};
use serde_json::{Value, json};

use crate::{Tables, largest, median, say, table};

const RUNS: usize = 3;
/// Written by the guest just before each snapshot; its disk has 384 MiB.
const DIRTY_MIB: u32 = 256;

/// Milliseconds of one snapshot: in the pre-sync, frozen, and of the longest step of a writer.
type Run = [f64; 3];

pub(crate) fn measure(folder: &Path) -> Result<Tables> {
    let mut table =
        table(["PRE-SYNC", "DIRTY MiB", "PRE-SYNC MS", "FROZEN MS", "MAX", "LONGEST STALL MS", "MAX"]);
    let mut figures = Vec::new();
    for switch in ["on", "off"] {
        let runs = Scratch::with_in(folder, "frozen", |scratch| snapshots(scratch, switch))?;
        let column = |index: usize| runs.iter().filter_map(move |run| run.get(index).copied());
        let cells =
            [median(column(0)), median(column(1)), largest(column(1)), median(column(2)), largest(column(2))];
        let shown = cells.map(|millis| format!("{millis:.0}"));
        table.add_row([switch.to_owned(), DIRTY_MIB.to_string()].into_iter().chain(shown));
        figures.push(json!({ "pre-sync": switch, "dirty-mib": DIRTY_MIB, "runs-ms": runs }));
    }
    Ok((table, Value::Array(figures)))
}

fn snapshots(scratch: &Scratch, switch: &str) -> Result<Vec<Run>> {
    say(&format!("frozen: booting a guest, pre-sync {switch}"));
    let daemon = Daemon::start_with(scratch, "guest", &["vda"], &["--pre-sync", switch])?;
    let mut guest = daemon.attach(Guest::builder(scratch, "guest")).boot()?;
    guest.make_and_mount("vda", FileSystem::Ext4)?;
    guest.start_workload(&["vda"])?;
    guest.start_agent()?;
    // Else the guest begins to write by itself.
    guest.run("echo 90 >/proc/sys/vm/dirty_ratio; echo 80 >/proc/sys/vm/dirty_background_ratio")?;
    let runs = (0..RUNS).map(|run| snapshot(&daemon, &mut guest, run)).collect();
    guest.shut_down()?;
    runs
}

fn snapshot(daemon: &Daemon, guest: &mut Guest, run: usize) -> Result<Run> {
    guest.run(&format!("rm -f /mnt/vda/much; sync; guest-workload dirty /mnt/vda/much {DIRTY_MIB}"))?;
    let since = guest.clock()?;
    let snapshot = daemon.snapshot(&format!("run-{run}"), "require")?;
    // A stalled step is reported once it has ended.
    guest.wait_for_progress("vda", Kind::Buffered, std::time::Duration::from_secs(30))?;
    let mut stall = 0.0_f64;
    for kind in Kind::ALL {
        stall = stall.max(guest.longest_gap("vda", kind, since)?.as_secs_f64() * 1e3);
    }
    let time = |step: &str| snapshot.timing.get(step).copied();
    let run = [time("pre-sync").unwrap_or(0.0), time("frozen").unwrap_or(f64::NAN), stall];
    say(&format!(
        "frozen: pre-sync {:.0} ms, frozen {:.0} ms, longest stall {:.0} ms",
        run[0], run[1], run[2]
    ));
    Ok(run)
}
