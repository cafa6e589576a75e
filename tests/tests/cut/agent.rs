//! A guest agent that freezes nothing but notes that it did, and takes its time for it.
//!
//! It does as qemu-ga does: one client at a time, one command after the other, also those of a client that is gone; and
//! while it is frozen it refuses all that could write.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What a freeze takes, and a thaw.
const WORK: Duration = Duration::from_millis(15);

/// It has one file system to freeze. It is there as long as the test's process.
pub(crate) struct FakeAgent {
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    frozen: AtomicBool,
    /// It has been told to freeze.
    asked: AtomicBool,
    /// What freezes the guest does not come to its end, until this is taken back.
    hangs: AtomicBool,
}

impl FakeAgent {
    pub(crate) fn start(socket: &Path) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let state = Arc::<State>::default();
        let theirs = Arc::clone(&state);
        thread::spawn(move || listener.incoming().for_each(|client| serve(client.unwrap(), &theirs)));
        Self { state }
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.state.frozen.load(Ordering::SeqCst)
    }

    /// Whether it has ever been told to freeze.
    pub(crate) fn is_asked(&self) -> bool {
        self.state.asked.load(Ordering::SeqCst)
    }

    /// From now on it takes the next freeze, and whatever comes after it, and does not answer. When it does not hang any
    /// more it freezes first, late as that is.
    pub(crate) fn hang(&self, hangs: bool) {
        self.state.hangs.store(hangs, Ordering::SeqCst);
    }

    /// Waits until it is frozen, or is not.
    pub(crate) fn wait_until(&self, frozen: bool, deadline: Instant) {
        while self.is_frozen() != frozen {
            assert!(Instant::now() < deadline, "the guest does not become frozen: {frozen}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn serve(client: UnixStream, state: &State) {
    let mut lines = BufReader::new(client);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
        let (sync, json) = match line.strip_prefix(&[0xff]) {
            Some(json) => (true, json),
            None => (false, &line[..]),
        };
        // Half a command of one who was killed is none.
        if let Ok(request) = serde_json::from_slice::<Value>(json) {
            let reply = reply(request["execute"].as_str().unwrap(), &request["arguments"], state);
            let prefix: &[u8] = if sync { &[0xff] } else { &[] };
            // Whoever asked may be gone.
            let _ = lines.get_mut().write_all(&[prefix, format!("{reply}\n").as_bytes()].concat());
        }
        line.clear();
    }
}

fn reply(command: &str, arguments: &Value, State { frozen, asked, hangs }: &State) -> Value {
    let change = |to| {
        asked.fetch_or(to, Ordering::SeqCst);
        while to && hangs.load(Ordering::SeqCst) {
            thread::sleep(WORK);
        }
        frozen.store(true, Ordering::SeqCst);
        thread::sleep(WORK);
        json!({ "return": u64::from(frozen.swap(to, Ordering::SeqCst)) })
    };
    match (command, frozen.load(Ordering::SeqCst)) {
        ("guest-sync-delimited", _) => json!({ "return": arguments["id"] }),
        ("guest-ping", _) => json!({ "return": {} }),
        ("guest-info", _) => json!({ "return": { "version": "10.0.2", "supported_commands": [] } }),
        ("guest-fsfreeze-status", is) => json!({ "return": if is { "frozen" } else { "thawed" } }),
        ("guest-fsfreeze-thaw", true) => change(false),
        ("guest-fsfreeze-thaw", false) => json!({ "return": 0 }),
        ("guest-fsfreeze-freeze", false) => change(true),
        ("guest-get-fsinfo", false) => {
            json!({ "return": [{ "name": "vda", "mountpoint": "/", "type": "ext4", "disk": [] }] })
        }
        _ => json!({ "error": { "class": "CommandNotFound", "desc": "not now" } }),
    }
}
