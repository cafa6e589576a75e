//! Backups against qemu-storage-daemon's, asked for by the same commands: of a whole disk, of 1 % of it that has changed, and
//! beside a guest, to a target that is slow.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use comfy_table::Table;
use frazil_integration::{Context, Error, Process, Result, Scratch, eventually};
use frazil_tests::{Load, Measured};
use serde_json::{Value, json};

use crate::server::{DISK, Server, Taken};
use crate::{Tables, median, say, table};

/// Runs of each, in turns.
const ROUNDS: usize = 5;
const DISK_BYTES: u64 = 1 << 30;
const MIB: f64 = 1_048_576.0;
const BLOCK: u64 = 4096;
/// The first block of each of these makes 1 % of the disk.
const STRIDE: u64 = 100 * BLOCK;
/// Bytes a second that the slow target takes.
const SLOW: u64 = 20 << 20;
/// How long a guest is measured.
const BESIDE: Duration = Duration::from_secs(3);

pub(crate) fn measure(folder: &Path) -> Result<Tables> {
    Scratch::with_in(folder, "backups", |scratch| {
        let mut bench = Bench::start(scratch)?;
        let mut rows = Rows { table: header(), figures: Vec::new() };
        bench.whole(&mut rows)?;
        bench.changed(&mut rows)?;
        bench.beside(&mut rows)?;
        Ok((rows.table, json!({ "rows": rows.figures })))
    })
}

struct Bench<'a> {
    scratch: &'a Scratch,
    /// Ours, theirs.
    servers: [Server; 2],
}

impl<'a> Bench<'a> {
    /// Each has a disk of its own that is all data.
    fn start(scratch: &'a Scratch) -> Result<Self> {
        let disk = |name: &str| -> Result<PathBuf> {
            let path = scratch.path(name);
            let bytes: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 4096 % 251) as u8 | 1).collect();
            std::fs::write(&path, bytes).context(path.display())?;
            Ok(path)
        };
        let ours = Server::frazil(scratch, "ours", &disk("ours.raw")?)?;
        let theirs = Server::peer(scratch, "theirs", &[disk("theirs.raw")?])?;
        Ok(Self { scratch, servers: [ours, theirs] })
    }

    /// Of the whole disk: to files, and over NBD to nothing.
    fn whole(&mut self, rows: &mut Rows) -> Result<()> {
        for format in ["raw", "qcow2"] {
            let taken = self.in_turns(|scratch, server| {
                let target = new_target(scratch, format)?;
                server.add_target(&target, format)?;
                let taken = server.back_up(&json!({ "sync": "full" }))?;
                server.remove_target()?;
                Ok(taken)
            })?;
            rows.add(&format!("full, to {format}"), &taken, Some(DISK_BYTES));
        }
        let taken = self.in_turns(|_, server| {
            server.export(|uri| {
                let status = Command::new("nbdcopy").args([uri, "null:"]).status().context("nbdcopy")?;
                if status.success() { Ok(()) } else { Err(Error::new(format!("nbdcopy: {status}"))) }
            })
        })?;
        rows.add("full, `nbdcopy` to null", &taken, Some(DISK_BYTES));
        Ok(())
    }

    /// Of what a bitmap tells, which is then clean: to a new image.
    fn changed(&mut self, rows: &mut Rows) -> Result<()> {
        let bitmap = json!({ "node": DISK, "name": "changed", "granularity": 65_536 });
        for server in &mut self.servers {
            server.execute("block-dirty-bitmap-add", bitmap.clone())?;
        }
        for (name, within) in [("scattered", DISK_BYTES), ("in one range", DISK_BYTES / 100)] {
            let taken = self.in_turns(|scratch, server| {
                let load = Load { write: true, block: BLOCK as usize, depth: 32 };
                let stride = if within == DISK_BYTES { STRIDE } else { BLOCK };
                load.once_within(&server.socket, None, stride, within).context(server.name)?;
                let target = new_target(scratch, "qcow2")?;
                server.add_target(&target, "qcow2")?;
                let taken = server.back_up(&json!({ "sync": "incremental", "bitmap": "changed" }))?;
                server.remove_target()?;
                Ok(taken)
            })?;
            rows.add(&format!("1 % changed, {name}"), &taken, None);
        }
        for server in &mut self.servers {
            server.execute("block-dirty-bitmap-remove", json!({ "node": DISK, "name": "changed" }))?;
        }
        Ok(())
    }

    /// A guest that writes, alone and while a backup waits for its target.
    fn beside(&mut self, rows: &mut Rows) -> Result<()> {
        let slow = Slow::start(self.scratch)?;
        for depth in [1, 32] {
            let load = Load { write: true, block: BLOCK as usize, depth };
            let run = |server: &Server| {
                let end = Instant::now() + BESIDE;
                load.random(&server.socket, Some(server.id()), || Instant::now() < end).context(server.name)
            };
            let alone = self.in_turns(|_, server| run(server))?;
            let beside = self.in_turns(|_, server| {
                server.add_target(&slow.file, "raw")?;
                server.begin_backup(&json!({ "sync": "full" }))?;
                let measured = run(server)?;
                server.cancel_backup()?;
                server.remove_target()?;
                Ok(measured)
            })?;
            rows.add_guest(depth, "alone", &alone);
            rows.add_guest(depth, "slow target", &beside);
        }
        Ok(())
    }

    /// What `measure` finds of each server, round by round.
    fn in_turns<T>(
        &mut self,
        mut measure: impl FnMut(&Scratch, &mut Server) -> Result<T>,
    ) -> Result<Vec<[T; 2]>> {
        let scratch = self.scratch;
        let mut found = Vec::new();
        for _ in 0..ROUNDS {
            let [ours, theirs] = &mut self.servers;
            found.push([measure(scratch, ours)?, measure(scratch, theirs)?]);
        }
        Ok(found)
    }
}

/// A new image for a backup.
fn new_target(scratch: &Scratch, format: &str) -> Result<PathBuf> {
    let path = scratch.path(&format!("target.{format}"));
    let _ = std::fs::remove_file(&path);
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format]).arg(&path).arg(DISK_BYTES.to_string());
    let status = command.status().context("qemu-img")?;
    if status.success() { Ok(path) } else { Err(Error::new(format!("{command:?}: {status}"))) }
}

/// A file that takes few bytes a second: a throttled one, offered by another qemu-storage-daemon through FUSE.
struct Slow {
    process: Process,
    file: PathBuf,
}

impl Slow {
    fn start(scratch: &Scratch) -> Result<Self> {
        let (beneath, file) = (new_target(scratch, "raw")?, scratch.path("slow.raw"));
        std::fs::write(&file, "").context(file.display())?;
        let limits = json!({ "qom-type": "throttle-group", "id": "slow", "limits": { "bps-write": SLOW } });
        let words = [
            ("--object", limits.to_string()),
            ("--blockdev", format!("driver=file,node-name=file,filename={}", beneath.display())),
            ("--blockdev", "driver=throttle,node-name=slow,file=file,throttle-group=slow".to_owned()),
            ("--export", format!("fuse,id=fuse,node-name=slow,writable=on,mountpoint={}", file.display())),
        ];
        let words = words.into_iter().flat_map(|(option, value)| [option.to_owned(), value]);
        let mut process = Process::spawn(Path::new("qemu-storage-daemon"), words, scratch.path("slow.log"))?;
        eventually("a file in FUSE", Duration::from_secs(20), || {
            process.check_alive()?;
            Ok(std::fs::metadata(&file).is_ok_and(|found| found.len() == DISK_BYTES).then_some(()))
        })?;
        Ok(Self { process, file })
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // Ended, it takes its mount away; killed, as it is if this takes too long, it would leave it.
        let _ = self.process.terminate();
        if self.process.wait_for_exit(Duration::from_secs(60)).is_err() {
            let _ = Command::new("umount").arg("--lazy").arg(&self.file).status();
        }
    }
}

fn header() -> Table {
    table(["", "FRAZIL", "QEMU-STORAGE-DAEMON", "CPU", "PEAK MiB", "RATIO", "CPU RATIO"])
}

struct Rows {
    table: Table,
    figures: Vec<Value>,
}

impl Rows {
    /// A backup of so many bytes, told as MiB a second; without, in milliseconds.
    fn add(&mut self, name: &str, taken: &[[Taken; 2]], bytes: Option<u64>) {
        let of = |figure: fn(&Taken) -> f64| {
            [0, 1].map(|who| median(taken.iter().filter_map(|pair| pair.get(who)).map(figure)))
        };
        let (seconds, cpu, mib) = (of(|taken| taken.seconds), of(|taken| taken.cpu), of(|taken| taken.mib));
        let ratio = median(taken.iter().map(|[ours, theirs]| ours.seconds / theirs.seconds));
        let cpu_ratio = median(taken.iter().map(|[ours, theirs]| ours.cpu / theirs.cpu));
        let told = |seconds: f64| match bytes {
            Some(bytes) => format!("{:.0} MiB/s", bytes as f64 / MIB / seconds),
            None => format!("{:.1} ms", seconds * 1e3),
        };
        let [ours, theirs] = seconds.map(told);
        let [cpu_told, mib_told] = [cpu.map(|cpu| format!("{cpu:.2}")), mib.map(|mib| format!("{mib:.0}"))];
        self.table.add_row([
            name.to_owned(),
            ours.clone(),
            theirs.clone(),
            cpu_told.join(" / "),
            mib_told.join(" / "),
            format!("{ratio:.2}"),
            format!("{cpu_ratio:.2}"),
        ]);
        self.figures.push(json!({
            "name": name, "seconds": seconds, "cpu-seconds": cpu, "peak-mib": mib, "ratio": ratio, "cpu-ratio": cpu_ratio,
        }));
        say(&format!("{name}: {ours}, theirs {theirs}: {ratio:.2} of their time"));
    }

    fn add_guest(&mut self, depth: usize, how: &str, runs: &[[Measured; 2]]) {
        let of = |figure: fn(&Measured) -> f64| {
            [0, 1].map(|who| median(runs.iter().filter_map(|pair| pair.get(who)).map(figure)))
        };
        let (iops, p99) = (of(|run| run.iops), of(|run| f64::from(run.p99_us)));
        let cpu = of(|run| run.cpu_us);
        let ratio = median(runs.iter().map(|[ours, theirs]| ours.iops / theirs.iops));
        let cells = [0, 1].map(|who| {
            let [iops, p99] = [&iops, &p99].map(|figures| figures.get(who).copied().unwrap_or(f64::NAN));
            format!("{iops:.0}/s, p99 {p99:.0} µs")
        });
        let [ours, theirs] = cells;
        let name = format!("guest's writes, {depth} in flight, {how}");
        let cpu_told = cpu.map(|cpu| format!("{cpu:.1} µs")).join(" / ");
        self.table.add_row([
            name.clone(),
            ours.clone(),
            theirs.clone(),
            cpu_told,
            String::new(),
            format!("{ratio:.2}"),
            String::new(),
        ]);
        self.figures.push(json!({
            "name": name, "iops": iops, "p99-us": p99, "cpu-us": cpu, "ratio": ratio,
        }));
        say(&format!("{name}: {ours}; theirs {theirs}"));
    }
}
