//! Metrics, scraped from the daemon; and clients that scrape badly.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use frazil_tests::{Driver, Request};
use serde_json::json;

use crate::agent::FakeAgent;
use crate::served::{Served, Wanted};

const WANTED: Wanted = Wanted { format: "qcow2", cache: "writeback", disks: 2, queues: 1, bytes: 16 << 20 };

/// A daemon with metrics, and where they are.
fn start() -> (Served, std::path::PathBuf) {
    let mut served = Served::start(WANTED);
    let socket = served.path("metrics");
    served.restart_with(&["--metrics", &format!("unix:{}", socket.display())]);
    (served, socket)
}

/// One request, and the whole answer.
fn talk(socket: &Path, request: &[u8]) -> String {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    talk_over(stream, request)
}

fn talk_over(mut stream: impl Read + Write, request: &[u8]) -> String {
    // It may answer and leave before it has read all.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: here\r\nAccept: */*\r\n\r\n";

fn scrape(socket: &Path) -> String {
    body(&talk(socket, GET))
}

fn body(answer: &str) -> String {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text;"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    body.to_owned()
}

/// The value of a sample.
fn value(text: &str, sample: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{sample} is not in\n{text}")).parse().unwrap()
}

#[test]
fn metrics_tell_what_was_done() {
    let (served, socket) = start();
    let mut driver = Driver::connect(&served.sockets[1], 1, 1, 4096).unwrap();
    (0..7).for_each(|at| assert_eq!(driver.queues[0].ask(Request::Write(at * 4096)), 0));
    assert_eq!(driver.queues[0].ask(Request::Flush), 0);
    served.ask("snapshot-create", json!({ "name": "one" }));
    let text = scrape(&socket);
    let labels = "{disk=\"vd1\",kind=\"write\"";
    assert_eq!(value(&text, &format!("frazil_requests_total{labels},result=\"done\"}}")), 7.0);
    assert_eq!(value(&text, &format!("frazil_request_bytes_total{labels}}}")), 7.0 * 4096.0);
    let timed = value(&text, &format!("frazil_request_duration_seconds_count{labels}}}"));
    assert!((1.0..=7.0).contains(&timed));
    let all = value(&text, "frazil_request_duration_seconds_bucket{le=\"+Inf\",disk=\"vd1\",kind=\"write\"}");
    assert_eq!(all, timed, "the last bucket holds all");
    assert_eq!(value(&text, "frazil_requests_total{disk=\"vd0\",kind=\"write\",result=\"done\"}"), 0.0);
    assert_eq!(value(&text, "frazil_disk_layers{disk=\"vd1\"}"), 2.0);
    assert_eq!(value(&text, "frazil_disk_connected{disk=\"vd1\"}"), 1.0);
    assert_eq!(value(&text, "frazil_snapshots_taken_total{grade=\"crash\"}"), 1.0);
    assert_eq!(value(&text, "frazil_gate_closed_seconds_count"), 1.0);
    assert_eq!(value(&text, "frazil_guest_frozen_seconds_count"), 0.0);
    assert_eq!(value(&text, "frazil_thaw_owed"), 0.0);
    assert!(value(&text, "frazil_free_bytes") > 0.0);
    assert!(text.ends_with("# EOF\n"));
    let unnamed = text.lines().find(|line| !line.starts_with('#') && !line.starts_with("frazil_"));
    assert_eq!(unnamed, None);
}

/// Over TCP, as Prometheus asks; a daemon that was not told to listens nowhere.
#[test]
fn metrics_and_top_tell_of_freezes_of_a_thaw_that_is_owed_of_jobs_and_of_overlays_that_grow() {
    let mut served = Served::start(WANTED);
    let said = |served: &Served| std::fs::read_to_string(served.path("log")).unwrap();
    assert!(!said(&served).contains("metrics"), "they are off if nobody asks");
    let socket = served.path("agent");
    let agent = FakeAgent::start(&socket);
    served.restart_with(&["--agent", socket.to_str().unwrap(), "--metrics", "127.0.0.1:0"]);
    let log = said(&served);
    let address = log.split("address=").nth(1).unwrap().split_whitespace().next().unwrap();
    let scrape = || body(&talk_over(TcpStream::connect(address).unwrap(), GET));
    served.ask("snapshot-create", json!({ "name": "one", "freeze": "require" }));
    let text = scrape();
    assert_eq!(value(&text, "frazil_snapshots_taken_total{grade=\"filesystem\"}"), 1.0);
    assert_eq!(value(&text, "frazil_guest_frozen_seconds_count"), 1.0);
    let frozen = value(&text, "frazil_guest_frozen_seconds_sum");
    assert!((0.03..30.0).contains(&frozen), "the agent takes 15 ms for a freeze and for a thaw: {frozen}");

    let overlay = "frazil_disk_active_layer_allocated_bytes{disk=\"vd0\"}";
    let mut driver = Driver::connect(&served.sockets[0], 1, 1, 1 << 20).unwrap();
    driver.queues[0].fill(0, &[7; 1 << 20]);
    let mut write = || {
        (0..4).for_each(|at| assert_eq!(driver.queues[0].ask(Request::Write(at << 20)), 0));
        assert_eq!(driver.queues[0].ask(Request::Flush), 0);
    };
    write();
    let grown = scrape();
    assert!(value(&grown, overlay) >= value(&text, overlay) + f64::from(4 << 20), "{grown}");
    assert!(!grown.contains("frazil_jobs{"), "{grown}");
    served.ask("snapshot-create", json!({ "name": "two", "freeze": "never" }));
    write();
    served.ask("snapshot-delete", json!({ "name": "two", "job-id": "slow", "speed": 4096 }));
    let deadline = Instant::now() + Duration::from_secs(20);
    while value(&scrape(), "frazil_jobs{type=\"snapshot-delete\",status=\"running\"}") != 1.0 {
        assert!(Instant::now() < deadline, "{}", scrape());
        thread::sleep(Duration::from_millis(10));
    }

    agent.hang(true);
    assert_eq!(value(&scrape(), "frazil_thaw_owed"), 0.0);
    let mut client = served.qmp();
    let arguments = json!({ "name": "three", "freeze": "require" });
    let asked = thread::spawn(move || client.execute("snapshot-create", arguments, |_, _| {}).is_err());
    while value(&scrape(), "frazil_thaw_owed") != 1.0 {
        assert!(Instant::now() < deadline, "a freeze that is not answered is a thaw that is owed");
        thread::sleep(Duration::from_millis(10));
    }
    let top = served.command(&["top", "--once", "--interval", "0.1", "--control", "control"]);
    let shown = String::from_utf8(top.stdout).unwrap();
    assert!(shown.contains("THAW OWED") && shown.contains("slow"), "{shown}");
    while value(&scrape(), "frazil_thaw_retries_total") == 0.0 {
        assert!(Instant::now() < deadline + Duration::from_secs(20), "{}", scrape());
        thread::sleep(Duration::from_millis(50));
    }
    agent.hang(false);
    assert!(asked.join().unwrap());
    while value(&scrape(), "frazil_thaw_owed") != 0.0 {
        assert!(Instant::now() < deadline + Duration::from_secs(40), "{}", scrape());
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(value(&scrape(), "frazil_snapshots_failed_total"), 1.0);
}

/// Those who say nothing, nonsense, too much, or half of it: each is answered or cut off, and nothing is left of them.
#[test]
fn bad_scrapers_harm_nobody() {
    let (served, socket) = start();
    scrape(&socket);
    let before = served.held();
    let begun = Instant::now();
    assert!(talk(&socket, &[0xff; 100]).starts_with("HTTP/1.1 400 "));
    assert!(talk(&socket, b"GET /state HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
    assert!(talk(&socket, b"DELETE / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
    let endless = [b"GET / HTTP/1.1\r\nA: ".as_slice(), &[b'a'; 64 << 10]].concat();
    assert!(!talk(&socket, &endless).contains(" 200 "));
    // A hundred that stay and are silent: eight are waited for, and the rest are turned away at once.
    let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    served.ask("query-frazil", json!({}));
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    // They are cut off, and then the next is served.
    for mut stream in silent {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // One that goes before it has its answer.
    let mut gone = UnixStream::connect(&socket).unwrap();
    gone.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    gone.shutdown(Shutdown::Both).unwrap();
    served.lets_go(before);
    scrape(&socket);
}
