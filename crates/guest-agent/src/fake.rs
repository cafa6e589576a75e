//! An agent for tests that does what it is told, good or bad.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// One connection, seen from the agent's side.
pub(crate) struct Peer {
    reader: BufReader<UnixStream>,
    heard: mpsc::Sender<String>,
}

/// A socket, and what its agent was asked.
pub(crate) struct Fake {
    pub(crate) path: PathBuf,
    heard: mpsc::Receiver<String>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

pub(crate) type Script = Box<dyn FnOnce(&mut Peer) + Send>;

/// One connection's part of a script.
pub(crate) fn script(play: impl FnOnce(&mut Peer) + Send + 'static) -> Script {
    Box::new(play)
}

/// An instant `millis` from now.
pub(crate) fn within(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis)
}

impl Fake {
    /// Plays one script a connection, in turn; the last connection stays open until the test's end.
    pub(crate) fn new(scripts: Vec<Script>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qga.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, heard) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            for play in scripts {
                let (stream, _) = listener.accept().unwrap();
                let mut peer = Peer { reader: BufReader::new(stream), heard: sender.clone() };
                play(&mut peer);
            }
        });
        Self { path, heard, thread: Some(thread), _folder: folder }
    }

    /// The commands that came so far, syncs left out.
    pub(crate) fn heard(&self) -> Vec<String> {
        self.heard.try_iter().collect()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the scripts to end, and hands on their panics.
    pub(crate) fn join(mut self) -> Vec<String> {
        self.thread.take().unwrap().join().unwrap();
        self.heard()
    }
}

impl Peer {
    /// The next request, or `None` when the client has gone.
    pub(crate) fn request(&mut self) -> Option<Value> {
        let mut line = Vec::new();
        if self.reader.read_until(b'\n', &mut line).unwrap_or(0) == 0 {
            return None;
        }
        let json = line.strip_prefix(&[0xFF]).unwrap_or(&line);
        let request: Value = serde_json::from_slice(json).unwrap();
        let name = request["execute"].as_str().unwrap();
        if name == "guest-sync-delimited" {
            assert_eq!(line[0], 0xFF, "a sync must reset the agent's parser first");
        } else {
            let _gone = self.heard.send(name.to_owned());
        }
        Some(request)
    }

    /// Sends bytes; a client that is gone does not matter.
    pub(crate) fn say(&mut self, bytes: &[u8]) -> bool {
        self.reader.get_mut().write_all(bytes).is_ok()
    }

    pub(crate) fn answer(&mut self, value: &Value) -> bool {
        self.say(format!("{}\n", json!({ "return": value })).as_bytes())
    }

    /// Answers one sync properly.
    pub(crate) fn sync(&mut self) {
        let Some(request) = self.request() else { return };
        assert_eq!(request["execute"], "guest-sync-delimited");
        self.say(b"\xFF");
        self.answer(&request["arguments"]["id"]);
    }

    /// Answers each request as `reply` says, syncs properly, until the client goes.
    pub(crate) fn serve(&mut self, mut reply: impl FnMut(&str, &Value) -> Value) {
        while let Some(request) = self.request() {
            if request["execute"] == "guest-sync-delimited" {
                self.say(b"\xFF");
                self.answer(&request["arguments"]["id"]);
                continue;
            }
            let reply = reply(request["execute"].as_str().unwrap(), &request["arguments"]);
            self.say(format!("{reply}\n").as_bytes());
        }
    }

    /// Holds the connection until the client goes.
    pub(crate) fn hold(&mut self) {
        let mut rest = Vec::new();
        let _gone = std::io::Read::read_to_end(&mut self.reader, &mut rest);
    }
}
