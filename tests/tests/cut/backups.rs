//! Backups by a program that speaks QMP to QEMU (`tests/python/backup_client.py`), while the guest writes: what is restored
//! is the disks at one instant.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use frazil_tests::python_programs;
use serde_json::{Value, json};

use crate::images::qemu_img;
use crate::ledger::{Clock, Cut, Ledger, prove};
use crate::load::{Load, Mix};
use crate::served::{Served, Wanted};

const DISKS: usize = 2;
const QUEUES: usize = 2;
const SIZE: usize = 4096;
const PLACES: usize = 512;
const BYTES: u64 = (SIZE * PLACES * QUEUES) as u64;

/// Bytes a second: slow enough to be killed in the midst.
const SLOW: u64 = 1 << 20;

/// The program, in the midst of a backup. It is killed when it is dropped.
pub(crate) struct Program {
    child: Child,
    said: BufReader<ChildStdout>,
    told: ChildStdin,
}

impl Program {
    /// Starts a script of `tests/python`; it is ready.
    pub(crate) fn start(script: &str, arguments: impl FnOnce(&mut Command)) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python").join(script);
        let python = python_programs(Path::new(env!("CARGO_TARGET_TMPDIR"))).join("python");
        let mut command = Command::new(python);
        command.arg(script);
        arguments(&mut command);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (said, told) = (BufReader::new(child.stdout.take().unwrap()), child.stdin.take().unwrap());
        let mut program = Self { child, said, told };
        program.hear("ready");
        program
    }

    /// Gives the word for the instant; when it was.
    pub(crate) fn take(&mut self, clock: &Clock) -> Cut {
        let asked = clock.now();
        self.tell();
        self.hear("taken");
        Cut { name: "backup".to_owned(), asked, answered: clock.now() }
    }

    pub(crate) fn tell(&mut self) {
        self.told.write_all(b"\n").unwrap();
    }

    pub(crate) fn ends_well(&mut self) -> bool {
        self.child.wait().unwrap().success()
    }

    pub(crate) fn hear(&mut self, expected: &str) {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), expected, "the program says why");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended, as it should.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Drill {
    served: Served,
    clock: Arc<Clock>,
    ledgers: Vec<Vec<Ledger>>,
    load: Option<Load>,
    /// How the program reads the disks.
    way: &'static str,
    /// The last backup, by disk.
    last: Vec<PathBuf>,
}

impl Drill {
    fn start(way: &'static str, cache: &'static str) -> Self {
        let served =
            Served::start(Wanted { format: "qcow2", cache, disks: DISKS, queues: QUEUES, bytes: BYTES });
        let ledgers = |_| (0..QUEUES).map(|queue| Ledger::new(SIZE, queue, QUEUES, PLACES)).collect();
        let ledgers = (0..DISKS).map(ledgers).collect();
        let clock = Arc::new(Clock::new());
        let mut drill = Self { served, clock, ledgers, load: None, way, last: Vec::new() };
        drill.write();
        drill
    }

    /// The guest begins to write.
    fn write(&mut self) {
        let ledgers = std::mem::take(&mut self.ledgers);
        self.load = Some(Load::connect(&self.served.sockets, ledgers, Mix::Discards, &self.clock));
        thread::sleep(Duration::from_millis(30));
    }

    fn rest(&mut self) {
        self.ledgers = self.load.take().unwrap().finish();
    }

    /// Images for a backup: the first raw, the others qcow2 with nothing beneath, as `qemu-img rebase` wants them.
    fn targets(&self, name: &str, format: &str) -> Vec<PathBuf> {
        let make = |id: String| {
            let path = self.served.path(&format!("{name}.{id}.{format}"));
            succeeds(&["create", "-q", "-f", format, text(&path), &BYTES.to_string()]);
            path
        };
        self.served.ids().into_iter().map(make).collect()
    }

    /// Has the program begin a backup; it waits for the word.
    fn begin(&self, kind: &str, speed: u64, targets: &[PathBuf]) -> Program {
        let fleece = self.served.path("fleece");
        std::fs::create_dir_all(&fleece).unwrap();
        let (control, words) = (self.served.path("control"), [self.way, kind, &speed.to_string()]);
        Program::start("backup_client.py", |command| {
            command.arg(control).args(words).arg(fleece).args(targets);
        })
    }

    /// A backup under load, from its begin to its end, restored and proved.
    fn back_up(&mut self, kind: &str, name: &str, format: &str) {
        let targets = self.targets(name, format);
        let mut program = self.begin(kind, 0, &targets);
        let cut = program.take(&self.clock);
        program.hear("done");
        assert!(program.ends_well());
        assert_eq!(self.served.ask("query-block-jobs", json!({})), json!([]));
        if kind == "incremental" {
            for (target, before) in targets.iter().zip(&self.last) {
                succeeds(&["check", "-q", text(target)]);
                let format = suffix(before);
                succeeds(&["rebase", "-u", "-f", "qcow2", "-F", format, "-b", text(before), text(target)]);
            }
        }
        self.rest();
        self.prove(&cut, &targets);
        if kind != "copy" {
            self.last = targets;
        }
        self.write();
    }

    /// What is restored from these images is the disks at one instant of the cut.
    fn prove(&self, cut: &Cut, images: &[PathBuf]) {
        let restore = |image: &PathBuf| {
            let raw = self.served.path("restored");
            succeeds(&["convert", "-f", suffix(image), "-O", "raw", text(image), text(&raw)]);
            std::fs::read(raw).unwrap()
        };
        let restored = images.iter().map(restore);
        let disks: Vec<_> =
            restored.zip(&self.ledgers).map(|(image, all)| (image, all.iter().collect())).collect();
        prove(cut, &disks);
    }

    /// Kills the daemon in the midst of a backup, which leaves nothing but what the next one can do without.
    fn kill_in_the_midst(&mut self, kind: &str) {
        let targets = self.targets("lost", "qcow2");
        let mut program = self.begin(kind, SLOW, &targets);
        program.take(&self.clock);
        thread::sleep(Duration::from_millis(100));
        let jobs = self.served.ask("query-block-jobs", json!({}));
        let running = jobs.as_array().unwrap().iter().filter(|job| job["status"] == "running").count();
        assert!(running > 0, "no job is left to be killed: {jobs}");
        self.served.kill();
        drop(program);
        self.ledgers = self.load.take().unwrap().leave();
        self.served.restart();
        for disk in 0..DISKS {
            let image = self.served.read(disk);
            self.ledgers[disk].iter_mut().for_each(|ledger| ledger.settle(&image, self.clock.now()));
        }
        targets.iter().for_each(|target| std::fs::remove_file(target).unwrap());
        assert_eq!(self.served.ask("query-block-jobs", json!({})), json!([]));
        self.write();
    }

    /// What the daemon says of the bitmap of each disk.
    fn bitmaps(&self) -> Vec<Value> {
        let blocks = self.served.ask("query-block", json!({}));
        let bitmap = |block: &Value| block["inserted"]["dirty-bitmaps"][0].clone();
        blocks.as_array().unwrap().iter().map(bitmap).collect()
    }
}

fn drill(way: &'static str, cache: &'static str) {
    let mut drill = Drill::start(way, cache);
    drill.back_up("full", "full", "raw");
    for bitmap in drill.bitmaps() {
        assert_eq!(bitmap["name"], "nightly");
        let state = ["recording", "persistent", "busy"].map(|member| bitmap[member] == true);
        assert_eq!(state, [true, true, false], "{bitmap}");
    }
    drill.back_up("incremental", "first", "qcow2");
    drill.kill_in_the_midst("copy");
    drill.back_up("incremental", "second", "qcow2");
    drill.back_up("copy", "aside", "qcow2");
    drill.kill_in_the_midst("incremental");
    drill.back_up("incremental", "third", "qcow2");
    drill.back_up("full", "again", "qcow2");
    drill.back_up("incremental", "fourth", "qcow2");
    drill.rest();
    drill.served.stop();
}

pub(crate) fn succeeds(arguments: &[&str]) {
    let output = qemu_img(arguments);
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
}

fn suffix(path: &Path) -> &str {
    path.extension().unwrap().to_str().unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn backups_of_the_disks_themselves_are_the_disks_at_one_instant() {
    drill("direct", "writeback");
}

#[test]
fn backups_through_filters_are_the_disks_at_one_instant() {
    drill("filter", "writeback");
}
