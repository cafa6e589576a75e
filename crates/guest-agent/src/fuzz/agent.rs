//! An agent that answers syncs as it should, and all else with what it was given.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::fs::{Mode, OFlags, open};
use serde_json::Value;

/// Replies of one guest.
const MAX_REPLIES: usize = 32;

/// What is answered to one question. Without the end of a line in it, the connection is closed.
#[derive(Clone, Debug, Default)]
pub(super) struct Reply(Vec<u8>);

impl Reply {
    /// Its first line.
    pub(super) fn line(&self) -> Option<&[u8]> {
        self.0.iter().position(|byte| *byte == b'\n').map(|end| &self.0[..end])
    }
}

/// Replies that agents give, and others.
pub(super) fn replies(mut bytes: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    while let Some((kind, rest)) = bytes.split_first().filter(|_| replies.len() < MAX_REPLIES) {
        bytes = rest;
        let mut take = |end: &[u8]| {
            let (len, rest) = bytes.split_first().unwrap_or((&0, &[]));
            let (now, rest) = rest.split_at(usize::from(*len).min(rest.len()));
            bytes = rest;
            [now, end].concat()
        };
        let text = match kind % 13 {
            0 => r#"{"return": 1}"#,
            1 => r#"{"return": {}}"#,
            2 => r#"{"return": "thawed"}"#,
            3 => r#"{"return": "frozen"}"#,
            4 => r#"{"error": {"class": "GenericError", "desc": "no\u001b[31m"}}"#,
            5 => {
                r#"{"return": {"version": "7.2", "supported_commands": [
                    {"name": "guest-exec", "enabled": true, "success-response": true},
                    {"name": "guest-exec-status", "enabled": true, "success-response": true},
                    {"name": "guest-fsfreeze-freeze-list", "enabled": true, "success-response": true}]}}"#
            }
            6 => {
                r#"{"return": [{"name": "vda1", "mountpoint": "/", "type": "ext4", "disk": []},
                    {"name": "vda2", "mountpoint": "/boot", "type": "vfat", "disk": [{"serial": "A"}]}]}"#
            }
            7 => r#"{"return": {"pid": 5}}"#,
            8 => r#"{"return": {"exited": true, "exitcode": 0}}"#,
            9 => {
                replies.push(Reply(take(b"\n")));
                continue;
            }
            10 => {
                replies.push(Reply(take(b"")));
                continue;
            }
            11 => {
                replies.push(Reply(b"{\"return\": 1}\n{\"return\": 1}\n".to_vec()));
                continue;
            }
            _ => {
                replies.push(Reply::default());
                continue;
            }
        };
        replies.push(Reply([text.replace('\n', " ").as_bytes(), b"\n"].concat()));
    }
    replies
}

#[derive(Debug, Default)]
struct Script {
    replies: VecDeque<Reply>,
    /// What was asked, and answered to it.
    talk: Vec<(String, Reply)>,
}

/// The one guest of this process at a time, behind a socket that stays.
pub(super) struct Guest {
    path: PathBuf,
    script: Arc<Mutex<Script>>,
    _turn: MutexGuard<'static, ()>,
}

impl Guest {
    pub(super) fn begin(replies: Vec<Reply>) -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        static SERVED: LazyLock<(PathBuf, Arc<Mutex<Script>>)> = LazyLock::new(serve);
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (path, script) = (SERVED.0.clone(), Arc::clone(&SERVED.1));
        *lock(&script) = Script { replies: replies.into(), talk: Vec::new() };
        Self { path, script, _turn: turn }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What was asked since the last look.
    pub(super) fn take_talk(&self) -> Vec<(String, Reply)> {
        std::mem::take(&mut lock(&self.script).talk)
    }
}

fn lock(script: &Mutex<Script>) -> MutexGuard<'_, Script> {
    script.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The socket's name is gone at once: who is killed leaves nothing. It is connected to by its descriptor, which stays open.
fn serve() -> (PathBuf, Arc<Mutex<Script>>) {
    let name = std::env::temp_dir().join(format!("frazil-fuzz-{}.sock", std::process::id()));
    let listener = UnixListener::bind(&name).unwrap();
    let socket = open(&name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    std::fs::remove_file(&name).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", socket.into_raw_fd()));
    let script = Arc::new(Mutex::new(Script::default()));
    let theirs = Arc::clone(&script);
    thread::spawn(move || {
        listener.incoming().for_each(|stream| converse(stream.unwrap(), &theirs));
    });
    (path, script)
}

/// Answers until the client goes, or there is no reply left.
fn converse(stream: UnixStream, script: &Mutex<Script>) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let request: Value = serde_json::from_slice(line.strip_prefix(&[0xff]).unwrap_or(&line)).unwrap();
        line.clear();
        let asked = request["execute"].as_str().unwrap().to_owned();
        let reply = match asked.as_str() {
            "guest-sync-delimited" => {
                format!("\u{0}{{\"return\": {}}}\n", request["arguments"]["id"]).into_bytes()
            }
            _ => {
                let mut script = lock(script);
                let reply = script.replies.pop_front().unwrap_or_default();
                script.talk.push((asked, reply.clone()));
                reply.0
            }
        };
        let mut reply = reply;
        if let Some(delimiter) = reply.first_mut().filter(|first| **first == 0) {
            *delimiter = 0xff;
        }
        let ends = !reply.contains(&b'\n');
        if reader.get_mut().write_all(&reply).is_err() || ends {
            return;
        }
    }
}
