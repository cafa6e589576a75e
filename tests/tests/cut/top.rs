//! `frazil top`, in a pipe and on a terminal.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use frazil_tests::{Driver, Request};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

use crate::served::{Served, Wanted, program};

const WANTED: Wanted = Wanted { format: "raw", cache: "writeback", disks: 1, queues: 1, bytes: 1 << 20 };

/// Runs `work` while a guest reads without end.
fn while_read<T>(served: &Served, work: impl FnOnce() -> T) -> T {
    let mut driver = Driver::connect(&served.sockets[0], 1, 1, 4096).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(driver.queues[0].ask(Request::Read(0)), 0);
            }
        });
        let done = work();
        stop.store(true, Ordering::Relaxed);
        done
    })
}

#[test]
fn a_pipe_gets_one_sample_as_a_table_or_as_json() {
    let served = Served::start(WANTED);
    let control = served.path("control");
    let control = control.to_str().unwrap();
    let (table, json) = while_read(&served, || {
        let words = ["top", "--interval", "0.3", "--control", control];
        (served.command(&words), served.command(&[&words[..], &["--json"]].concat()))
    });
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(table.status.success() && text.contains("READ MB/S") && !text.contains('\x1b'), "{text}");
    let row: Vec<_> = text.lines().find(|line| line.starts_with("vd0")).unwrap().split_whitespace().collect();
    assert_eq!(row[1], "connected");
    assert!(row[2].parse::<u64>().unwrap() > 0, "{text}");
    let sample: Value = serde_json::from_slice(&json.stdout).unwrap();
    let disk = &sample["disks"][0];
    let (reads, bytes) = (disk["reads"].as_f64().unwrap(), disk["read-bytes"].as_f64().unwrap());
    assert!(reads > 0.0 && (bytes / reads - 4096.0).abs() < 1.0, "{sample}");
    assert!(disk["read-latency"].as_f64().unwrap() > 0.0 && disk["writes"] == 0.0, "{sample}");
}

/// It draws over itself, again and again, until it is ended; a dumb terminal gets one table beneath the other.
#[test]
fn a_terminal_is_drawn_over() {
    let served = Served::start(WANTED);
    for (term, redrawn) in [("xterm", true), ("dumb", false)] {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let inner = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let mut top = Command::new(program())
            .args(["top", "--interval", "0.1", "--control"])
            .arg(served.path("control"))
            .env("TERM", term)
            .stdout(Stdio::from(OwnedFd::from(inner)))
            .spawn()
            .unwrap();
        let (mut screen, mut text) = (File::from(terminal), String::new());
        while text.matches("vd0").count() < 3 {
            let mut piece = [0; 4096];
            let count = screen.read(&mut piece).unwrap();
            text += std::str::from_utf8(&piece[..count]).unwrap();
        }
        top.kill().unwrap();
        top.wait().unwrap();
        assert_eq!(text.contains("\x1b[H"), redrawn, "{term}: {text:?}");
        assert_eq!(text.contains('\x1b'), redrawn, "{term}: {text:?}");
    }
}
