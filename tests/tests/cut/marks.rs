//! Incremental backups by checkpoints: whatever is done to the daemon and its layers between two of them, what is copied by
//! the changes is what the disk was.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::ledger::{Clock, Ledger};
use crate::load::{Load, Mix};
use crate::served::{Served, Wanted};

const SIZE: usize = 4096;
const PLACES: usize = 512;
const QUEUES: usize = 2;
const ROUNDS: usize = 10;

/// Bytes a second: slow enough to be killed in the midst.
const SLOW: u64 = 1 << 20;

struct Drill {
    served: Served,
    clock: Arc<Clock>,
    mix: Mix,
    /// What the backups make up, brought forward by changes only.
    backup: Vec<u8>,
}

impl Drill {
    fn start(format: &'static str, mix: Mix) -> Self {
        let bytes = (SIZE * PLACES * QUEUES) as u64;
        let wanted = Wanted { format, cache: "writeback", disks: 1, queues: QUEUES, bytes };
        let (served, clock) = (Served::start(wanted), Arc::new(Clock::new()));
        Self { served, clock, mix, backup: vec![0; bytes as usize] }
    }

    /// Begins to write. Nobody asks the ledgers: what is compared is the disk.
    fn write(&self) -> Load {
        let ledgers = (0..QUEUES).map(|queue| Ledger::new(SIZE, queue, QUEUES, PLACES)).collect();
        Load::connect(&self.served.sockets, vec![ledgers], self.mix, &self.clock)
    }

    /// Writes for a while, up to a `kill -9` if `is_killed`.
    fn load(&mut self, is_killed: bool) {
        let load = self.write();
        thread::sleep(Duration::from_millis(20));
        if is_killed {
            self.served.kill();
            load.leave();
            self.served.restart();
        } else {
            load.finish();
        }
    }

    fn changes(&self, from: &str, to: &str) -> Vec<(usize, usize)> {
        let (mut found, mut offset) = (Vec::new(), 0);
        loop {
            let asked = json!({ "disk": "vd0", "from": from, "to": to, "offset": offset, "limit": 7 });
            let page = self.served.ask("query-changes", asked);
            let number = |value: &Value| value.as_u64().unwrap();
            for range in page["ranges"].as_array().unwrap() {
                found.push((number(&range["offset"]) as usize, number(&range["length"]) as usize));
            }
            match page.get("next") {
                None => return found,
                Some(next) => offset = number(next),
            }
        }
    }

    /// An increment on the one before, up to a snapshot taken under load, which stays.
    fn back_up(&mut self, round: usize) {
        let load = self.write();
        thread::sleep(Duration::from_millis(5));
        let name = format!("s{round}");
        self.served.snapshot(&name, &self.clock);
        load.finish();
        self.served.ask("checkpoint-create", json!({ "name": format!("c{round}"), "snapshot": name }));
        let disk = self.served.export(&name, "vd0");
        for (offset, len) in self.changes(&format!("c{}", round - 1), &name) {
            self.backup[offset..offset + len].copy_from_slice(&disk[offset..offset + len]);
        }
        assert!(self.backup == disk, "the increment of round {round} lacks something");
    }

    /// Deletes a snapshot; the daemon is killed in the midst of it if `is_killed`, and the next one ends it.
    fn delete(&mut self, name: &str, is_killed: bool) {
        let speed = if is_killed { SLOW } else { 0 };
        self.served.ask("snapshot-delete", json!({ "name": name, "speed": speed }));
        if is_killed {
            thread::sleep(Duration::from_millis(60));
            self.served.kill();
            self.served.restart();
        }
        for job in self.served.ask("query-jobs", json!({})).as_array().unwrap() {
            // It may just have ended.
            let unlimited = json!({ "device": job["id"], "speed": 0 });
            let _ = self.served.qmp().execute("block-job-set-speed", unlimited, |_, _| {});
        }
        while self.served.ask("query-jobs", json!({})) != json!([]) {
            thread::sleep(Duration::from_millis(5));
        }
        assert!(!self.served.names().contains(&name.to_owned()));
    }
}

fn drill(format: &'static str, mix: Mix) {
    let mut drill = Drill::start(format, mix);
    drill.served.ask("checkpoint-create", json!({ "name": "c0" }));
    for round in 1..=ROUNDS {
        drill.load(round % 3 == 0);
        drill.back_up(round);
        if round > 1 {
            drill.load(false);
            drill.delete(&format!("s{}", round - 1), round % 2 == 0);
            drill.served.ask("checkpoint-delete", json!({ "name": format!("c{}", round - 1) }));
        }
        if round % 4 == 0 {
            let backed_up = format!("s{round}");
            drill.served.ask("snapshot-revert", json!({ "name": backed_up }));
            assert_eq!(drill.changes(&format!("c{round}"), &backed_up), []);
        }
    }
    let marks = std::fs::read_dir(drill.served.path("state/marks")).unwrap().count();
    assert!(marks <= 4, "{marks} files of changes are left");
}

#[test]
fn increments_over_kills_deletes_and_reverts_make_up_the_disk() {
    drill("raw", Mix::Stamps);
}

#[test]
fn increments_with_zeroes_and_discards_make_up_the_disk() {
    drill("qcow2", Mix::Discards);
}

#[test]
fn the_command_line_shows_checkpoints_and_changes() {
    let wanted = Wanted { format: "raw", cache: "writeback", disks: 1, queues: 1, bytes: 1 << 20 };
    let mut served = Served::start(wanted);
    let control = served.path("control").display().to_string();
    let run = |served: &Served, words: &[&str], place: [&str; 2]| {
        let output = served.command(&[words, &place].concat());
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let online = ["--control", &*control];
    let made = run(&served, &["checkpoint", "create", "monday"], online);
    assert!(made.contains("monday") && made.contains("vd0"), "{made}");
    let clock = Arc::new(Clock::new());
    let ledgers = vec![vec![Ledger::new(SIZE, 0, 1, 3)]];
    let load = Load::connect(&served.sockets, ledgers, Mix::Stamps, &clock);
    thread::sleep(Duration::from_millis(50));
    load.finish();
    let since = ["changes", "--disk", "vd0", "--from", "monday"];
    let shown = run(&served, &since, online);
    assert_eq!(shown, "OFFSET  LENGTH\n     0   12288\n12 KiB of 1 MiB changed\n");
    let json = run(&served, &[&since[..], &["--json", "--granularity", "64K"]].concat(), online);
    let expected = json!({ "capacity": 1 << 20, "granularity": 65_536,
                           "ranges": [{ "offset": 0, "length": 65_536 }] });
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap(), expected);
    served.stop();
    let state = served.path("state").display().to_string();
    let offline = ["--state", &*state];
    assert_eq!(run(&served, &since, offline), shown, "the same without a daemon");
    assert!(run(&served, &["checkpoint", "list"], offline).contains("monday"));
    run(&served, &["checkpoint", "delete", "monday"], offline);
    assert_eq!(run(&served, &["checkpoint", "list"], offline), "no checkpoints\n");
}
