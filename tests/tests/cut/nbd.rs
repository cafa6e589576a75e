//! Disks and snapshots that the daemon serves over NBD, read by others' programs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use block::testing::Random;
use frazil_tests::{Driver, ProcessTime, Request};
use serde_json::{Value, json};

use crate::served::{Served, Wanted};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const SIZE: u64 = 16 * MIB;

fn served() -> Served {
    Served::start(Wanted { format: "raw", cache: "writeback", disks: 1, queues: 1, bytes: SIZE })
}

fn write(served: &Served, at: u64, byte: u8) {
    let mut driver = Driver::connect(&served.sockets[0], 1, 1, BLOCK as usize).unwrap();
    driver.queues[0].fill(0, &[byte; BLOCK as usize]);
    assert_eq!(driver.queues[0].ask(Request::Write(at)), 0);
}

/// Has the daemon's NBD server listen; the URI of an export.
fn start_server(served: &Served) -> impl Fn(&str) -> String + use<> {
    let socket = served.path("nbd");
    served.ask("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    move |export| format!("nbd+unix:///{export}?socket={}", socket.display())
}

/// A program's output; it must succeed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn copy(served: &Served, uri: &str) -> Vec<u8> {
    let out: PathBuf = served.path("copy");
    run("nbdcopy", &[uri, out.to_str().unwrap()]);
    std::fs::read(out).unwrap()
}

/// Where a bitmap is dirty.
fn dirty(uri: &str, name: &str) -> Vec<(u64, u64)> {
    let map = run("nbdinfo", &["--json", &format!("--map=qemu:dirty-bitmap:{name}"), uri]);
    let runs: Vec<Value> = serde_json::from_str(&map).unwrap();
    let dirty = runs.iter().filter(|run| run["type"] == 1);
    dirty.map(|run| (run["offset"].as_u64().unwrap(), run["length"].as_u64().unwrap())).collect()
}

/// A client that stays connected until it is dropped.
struct Holder(Child);

impl Holder {
    fn connect(uri: &str) -> Self {
        let script = "import sys; h.pread(512, 0); print('in', flush=True); sys.stdin.read()";
        // Debian's own Python has the module, whatever `python3` is on the path.
        let mut nbdsh = Command::new("/usr/bin/python3");
        nbdsh.args(["-m", "nbd", "-u", uri, "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = nbdsh.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "in\n");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_disk_that_is_exported_is_read_as_it_was_with_its_bitmaps_and_checkpoints() {
    let mut served = served();
    write(&served, 0, 1);
    served.ask("block-dirty-bitmap-add", json!({"node": "vd0", "name": "b", "persistent": true}));
    write(&served, MIB, 2);
    served.ask("checkpoint-create", json!({"name": "c"}));
    write(&served, 2 * MIB, 3);
    let uri = start_server(&served);
    let expected = served.read(0);
    let options = json!({"type": "nbd", "id": "e", "node-name": "vd0", "bitmaps": ["b", "c"], "allocation-depth": true});
    served.ask("block-export-add", options.clone());
    write(&served, 3 * MIB, 4);
    assert!(copy(&served, &uri("vd0")) == expected);
    let (b, c) = (dirty(&uri("vd0"), "b"), dirty(&uri("vd0"), "c"));
    assert_eq!(b, [(MIB, 64 << 10), (2 * MIB, 64 << 10)]);
    assert!(c.len() == 1 && c[0].0 <= 2 * MIB && c[0].0 + c[0].1 >= 2 * MIB + BLOCK, "{c:?}");
    assert!(served.refusal("block-export-add", options).contains("'e' is already in use"));

    // One that is in use stays, unless it must go.
    let holder = Holder::connect(&uri("vd0"));
    assert!(served.refusal("block-export-del", json!({"id": "e"})).contains("in use"));
    served.ask("block-export-del", json!({"id": "e", "mode": "hard"}));
    wait_for("the export is still there", || served.ask("query-block-exports", json!({})) == json!([]));
    drop(holder);
    served.ask("nbd-server-stop", json!({}));
    assert_eq!(served.refusal("nbd-server-stop", json!({})), "NBD server not running");

    // With a client connected the daemon ends as promptly as without, and exports nothing when it is back.
    let uri = start_server(&served);
    served.ask("nbd-server-add", json!({"device": "vd0"}));
    let _holder = Holder::connect(&uri("vd0"));
    let began = Instant::now();
    served.stop();
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    served.restart();
    assert_eq!(served.ask("query-block-exports", json!({})), json!([]));
    wait_for("the layers of an export that is gone stay", || served.layers("vd0").len() <= 3);
}

/// `frazil snapshot export --nbd`, to look into a snapshot and to try something on it.
#[test]
fn a_snapshot_is_served_until_the_command_ends_and_what_is_written_to_it_is_thrown_away() {
    let served = served();
    write(&served, 0, 1);
    served.ask("snapshot-create", json!({"name": "old"}));
    write(&served, MIB, 2);
    served.ask("snapshot-create", json!({"name": "new"}));
    let expected = served.export("new", "vd0");
    for (writable, place) in [(false, "served"), (true, "served"), (false, "127.0.0.1:0")] {
        let mut words =
            vec!["snapshot", "export", "new", "--disk", "vd0", "--nbd", place, "--control", "control"];
        words.extend(["--since", "old"]);
        words.extend(writable.then_some("--writable"));
        let mut child = served.spawn(&words);
        let mut uri = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut uri).unwrap();
        let uri = uri.trim();
        assert!(copy(&served, uri) == expected);
        assert_eq!(dirty(uri, "old"), [(MIB, BLOCK)]);
        let write = ["-f", "raw", "-c", "write -P 7 8M 64k", "-c", "read -P 7 8M 64k", uri];
        let wrote = Command::new("qemu-io").args(write).output().unwrap();
        assert_eq!(wrote.status.success(), writable, "{wrote:?}");
        let deleted = served.command(&["snapshot", "delete", "new", "--control", "control"]);
        let told = String::from_utf8_lossy(&deleted.stderr).into_owned();
        assert!(!deleted.status.success() && told.contains("is being read"), "{told}");
        child.kill().unwrap();
        child.wait().unwrap();
        wait_for("it is served for nobody", || {
            Command::new("nbdinfo").arg(uri).output().is_ok_and(|out| !out.status.success())
        });
    }
    assert!(served.export("new", "vd0") == expected);
    let left = std::fs::read_dir(served.path("state")).unwrap();
    let names: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.starts_with("scratch")), "{names:?}");
}

/// Connections of all kinds of ill will, and how much of the daemon is left once they are gone.
#[test]
fn clients_of_ill_will_leave_the_daemon_as_it_was() {
    let served = served();
    let uri = start_server(&served);
    served.ask("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "vd0" }));
    let mut driver = Driver::connect(&served.sockets[0], 1, 1, BLOCK as usize).unwrap();
    assert_eq!(copy(&served, &uri("vd0")).len() as u64, SIZE);
    let connect = || UnixStream::connect(served.path("nbd")).unwrap();
    // The client's flags, then an option of the greatest length that can be said.
    let endless = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &[0, 0, 0, 7], &u32::MAX.to_be_bytes()].concat();
    let round = || {
        let mut random = Random(7);
        let silent: Vec<_> = (0..50).map(|_| connect()).collect();
        for length in 0..100 {
            let noise: Vec<u8> = (0..length).map(|_| random.number() as u8).collect();
            // It may be cut off before it has said all.
            let _ = connect().write_all(&noise);
            let _ = connect().write_all(&endless[..endless.len().min(length)]);
        }
        let mut flood = connect();
        flood.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = flood.write_all(&endless);
        let _ = (0..1024).all(|_| flood.write_all(&[7; 64 << 10]).is_ok());
        drop((silent, flood));
    };
    // What is made once has been.
    round();
    thread::sleep(Duration::from_millis(500));
    let (held, memory) = (served.held(), served.memory());
    for _ in 0..3 {
        round();
        assert_eq!(driver.queues[0].ask(Request::Write(0)), 0);
    }
    served.lets_go(held);
    assert!(served.memory() < memory + (16 << 10), "{} KiB, and before {memory}", served.memory());
    let before = ProcessTime::of(served.pid()).unwrap();
    thread::sleep(Duration::from_millis(500));
    let used = ProcessTime::of(served.pid()).unwrap().since(before);
    assert!(used < Duration::from_millis(50), "{used:?} with nothing to do");
    assert_eq!(copy(&served, &uri("vd0")).len() as u64, SIZE);
}
