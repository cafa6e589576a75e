//! Exports that nobody waits for any more: they end, and leave nothing.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::ledger::Clock;
use crate::served::{Served, Wanted};

/// All holes, and so many that an export of it has no end in a test's time.
const ENDLESS: u64 = 1 << 50;

const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon with a snapshot of a disk of so many bytes.
fn served(bytes: u64) -> Served {
    let served = Served::start(Wanted { format: "raw", cache: "writeback", disks: 1, queues: 1, bytes });
    served.snapshot("one", &Clock::new());
    served
}

/// Asks for an export, and waits for nothing.
fn ask(served: &Served, target: &Path) -> UnixStream {
    let mut client = UnixStream::connect(served.path("control")).unwrap();
    let arguments = json!({ "name": "one", "disk": "vd0", "target": target, "format": "raw" });
    for (command, arguments) in [("qmp_capabilities", json!({})), ("snapshot-export", arguments)] {
        let request = json!({ "execute": command, "arguments": arguments });
        client.write_all(request.to_string().as_bytes()).unwrap();
    }
    client
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Begins an export without end: the client, and the file that it writes.
fn begin(served: &Served) -> (UnixStream, PathBuf) {
    let partial = served.path("out.partial");
    let client = ask(served, &served.path("out"));
    wait_for("the export has not begun", || partial.exists());
    (client, partial)
}

#[test]
fn an_export_ends_with_its_client() {
    let served = served(ENDLESS);
    let (client, partial) = begin(&served);
    drop(client);
    wait_for("the export goes on for nobody", || !partial.exists());
    assert!(!served.path("out").exists(), "it was not called off");
}

#[test]
fn an_export_ends_with_the_daemon() {
    let mut served = served(ENDLESS);
    let (_client, partial) = begin(&served);
    served.stop();
    assert!(!partial.exists() && !served.path("out").exists());
}

/// As `echo … | socat - UNIX-CONNECT:…` does.
#[test]
fn a_client_that_sends_no_more_still_gets_its_export() {
    let served = served(1 << 30);
    let mut client = ask(&served, &served.path("out"));
    client.shutdown(Shutdown::Write).unwrap();
    let mut said = String::new();
    client.read_to_string(&mut said).unwrap();
    assert!(said.trim_end().ends_with(r#"{"return":{}}"#), "{said}");
    assert_eq!(served.path("out").metadata().unwrap().len(), 1 << 30);
}
