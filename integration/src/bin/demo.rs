//! The main job, once, on a real guest: two disks, writers of three kinds, one snapshot without the agent and one with
//! it, both proved with the file systems' own tools.

use std::process::ExitCode;
use std::time::Duration;

use comfy_table::{Table, presets::NOTHING};
use frazil_integration::{Error, FileSystem, Result, Rig, Scratch, Snapshot};
use serde_json::Value;

const DISKS: [(&str, FileSystem); 2] = [("vda", FileSystem::Ext4), ("vdb", FileSystem::Xfs)];
/// Name and `--freeze` of each snapshot, and the grade that it must get.
const SNAPSHOTS: [(&str, &str, &str); 2] =
    [("without-agent", "never", "crash"), ("with-agent", "require", "filesystem")];

fn main() -> ExitCode {
    match Scratch::with("demo", demo) {
        Ok(table) => {
            println!("{table}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo(scratch: &Scratch) -> Result<Table> {
    say("booting a guest on two disks, ext4 and xfs, and starting buffered, direct and mmap writers");
    let mut rig = Rig::start(scratch, &DISKS)?;
    let mut table = Table::new();
    table.load_style(NOTHING).set_header([
        "SNAPSHOT",
        "DISK",
        "FS",
        "GRADE",
        "PROBE",
        "FSCK",
        "FROZEN MS",
        "GATE µs",
        "LONGEST WAIT MS",
    ]);
    for (name, freeze, grade) in SNAPSHOTS {
        say(&format!("snapshot {name}: frazil snapshot create {name} --freeze {freeze}"));
        let expected = rig.expectation()?;
        let snapshot = rig.daemon.snapshot(name, freeze)?;
        if snapshot.grade != grade {
            return Err(Error::new(format!("{name} has grade {}: {}", snapshot.grade, snapshot.reason)));
        }
        rig.wait_until_all_write(Duration::from_secs(30))?;
        say(&format!("snapshot {name}: exporting and checking both disks"));
        let verdicts = rig.verify(&snapshot, &expected)?;
        let shown = rig.daemon.show(name)?;
        for ((disk, file_system), verdict) in DISKS.into_iter().zip(verdicts) {
            let [frozen, gate, wait] = times(&snapshot);
            let probe = probe_of(&shown, disk)?;
            let row = [name, disk, file_system.name(), grade, &probe, &verdict, &frozen, &gate, &wait];
            table.add_row(row);
        }
    }
    rig.finish()?;
    Ok(table)
}

fn say(what: &str) {
    eprintln!("demo: {what}");
}

/// Milliseconds frozen, microseconds of closed gates, milliseconds of the longest wait of a request.
fn times(snapshot: &Snapshot) -> [String; 3] {
    let time = |step: &str, factor: f64, digits: usize| {
        snapshot.timing.get(step).map_or("-".to_owned(), |millis| format!("{:.digits$}", millis * factor))
    };
    [time("frozen", 1.0, 1), time("gate-closed", 1e3, 0), time("longest-wait", 1.0, 2)]
}

/// What the file-system probe said of a disk: `snapshot show` lists the disks, and the file systems on each.
fn probe_of(shown: &Value, disk: &str) -> Result<String> {
    let disks = shown["probe"].as_array().into_iter().flatten();
    let verdicts: Vec<&str> = disks
        .filter(|probe| probe["id"] == disk)
        .flat_map(|probe| probe["volumes"].as_array().into_iter().flatten())
        .filter_map(|volume| volume["verdict"].as_str())
        .collect();
    if verdicts.is_empty() {
        Err(Error::new(format!("no probe of {disk} in {shown}")))
    } else {
        Ok(verdicts.join(", "))
    }
}
