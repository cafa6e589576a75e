//! The body of the fuzz target: it takes any bytes, and panics if the client does other than a plain model of it.
//!
//! `fuzz/` hands it to libFuzzer; the test here runs it for a moment on mutated seeds, so that it stays true.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a panic is how a fuzz target speaks"
)]

mod agent;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::coverage::{Coverage, FileSystem, coverage};
use crate::error::AgentError;
use crate::link::Link;
use crate::session::{Agent, AgentInfo, FreezeStatus, Session};
use agent::{Guest, Reply};

/// Calls that are made of one guest.
const MAX_CALLS: usize = 12;
/// Replies are there, or the connection is closed: nothing is waited for but this process.
const PATIENCE: Duration = Duration::from_secs(20);
/// For calls that ask again until the guest says something else.
const IMPATIENCE: Duration = Duration::from_millis(40);
/// What a sync is told apart by.
const ID: i64 = 7;

/// Whatever an agent says: what counts is what a plain reading of the protocol takes for the answer; a freeze of which
/// nobody knows is thawed before anything else is asked; and nothing of what it says could steer a terminal.
pub fn agent_replies(data: &[u8]) {
    let Some((mode, rest)) = data.split_first() else { return };
    match mode % 2 {
        0 => framed(rest),
        _ => asked(rest),
    }
}

/// All that the agent will ever say is in the socket.
fn framed(said: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(said).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let (mut link, deadline) = (Link::over(ours.into()), Instant::now() + PATIENCE);
    let mut discarded = 0;
    let synced = link.sync(ID, deadline, &mut discarded);
    let Ok(()) = synced else {
        assert!(matches!(synced, Err(AgentError::Io { .. })), "{synced:?}");
        assert!(discarded == said.len() as u64 && lines(said).all(|line| !is_sync(line)));
        return;
    };
    let (before, mut rest) = said.split_at(discarded as usize);
    let last = lines(before).last().unwrap();
    assert!(before.ends_with(b"\n") && might_be_sync(last), "taken for a sync: {last:?}");
    assert!(lines(before).rev().skip(1).all(|line| !is_sync(line)), "a sync was passed over");
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        assert_eq!(link.exchange("x", b"{}\n", deadline).unwrap(), rest[..end]);
        rest = &rest[end + 1..];
    }
    assert!(matches!(link.exchange("x", b"{}\n", deadline), Err(AgentError::Io { .. })));
}

/// What is ended by a newline, without it.
fn lines(bytes: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    let mut lines: Vec<_> = bytes.split(|byte| *byte == b'\n').collect();
    lines.pop();
    lines.into_iter()
}

/// What follows the last delimiter of a line.
fn delimited(line: &[u8]) -> Option<&[u8]> {
    let at = line.iter().rposition(|byte| *byte == 0xff)?;
    Some(&line[at + 1..]).filter(|reply| reply.len() <= 4096)
}

/// Whether the line is the reply to the sync beyond doubt.
fn is_sync(line: &[u8]) -> bool {
    delimited(line).and_then(object).is_some_and(|reply| reply.get("return") == Some(&Value::from(ID)))
}

/// Whether it can be taken for one by a reader that is not strict with members that it does not know.
fn might_be_sync(line: &[u8]) -> bool {
    delimited(line).is_some_and(|reply| {
        let has = |what: &[u8]| reply.windows(what.len()).any(|part| part == what);
        reply.trim_ascii().starts_with(b"{") && (has(b"return") || has(b"\\u")) && has(b"7")
    })
}

/// A reply that is sound JSON, with each of the two members at most once.
fn object(reply: &[u8]) -> Option<Value> {
    let twice = |name: &str| std::str::from_utf8(reply).is_ok_and(|text| text.matches(name).count() > 1);
    let value: Value = serde_json::from_slice(reply).ok()?;
    (value.is_object() && !twice("return") && !twice("error") && !twice("\\u")).then_some(value)
}

/// What a reply says, where there is no doubt about it.
enum Meaning {
    Returned(Value),
    Refused,
    Unclear,
}

fn meaning(reply: &Reply) -> Meaning {
    let Some(Value::Object(mut members)) = reply.line().and_then(object) else { return Meaning::Unclear };
    let is_text = |value: Option<&Value>| value.is_none_or(Value::is_string);
    match (members.remove("return"), members.get("error")) {
        (_, Some(Value::Object(error))) if is_text(error.get("class")) && is_text(error.get("desc")) => {
            Meaning::Refused
        }
        (Some(value), None | Some(Value::Null)) if !value.is_null() => Meaning::Returned(value),
        _ => Meaning::Unclear,
    }
}

/// A guest whose agent answers each question with the next of these replies.
fn asked(data: &[u8]) {
    let calls = data.get(..MAX_CALLS).unwrap_or(data);
    let replies = agent::replies(&data[calls.len()..]);
    let guest = Guest::begin(replies);
    let mut asker = Asker { session: None, info: AgentInfo::default(), mounts: Vec::new(), in_doubt: false };
    for call in calls {
        if asker.session.is_none() {
            asker.session = Agent::new(guest.path()).connect(Instant::now() + PATIENCE).ok();
        }
        let Some(session) = asker.session.take() else { return };
        if !asker.call(call % 6, session, &guest) {
            return;
        }
    }
}

/// Who asks, and what it has been told.
struct Asker {
    session: Option<Session>,
    info: AgentInfo,
    mounts: Vec<FileSystem>,
    /// A freeze was asked for and its outcome never heard.
    in_doubt: bool,
}

impl Asker {
    fn coverage(&self) -> Coverage {
        coverage(&self.info, &self.mounts, None)
    }

    /// Makes a call; `false` if there is nothing more to be learnt, for this process was too slow.
    fn call(&mut self, call: u8, mut session: Session, guest: &Guest) -> bool {
        let soon = Instant::now() + IMPATIENCE;
        // In doubt each call thaws first.
        let deadline = if self.in_doubt { soon } else { Instant::now() + PATIENCE };
        let outcome = match call {
            0 => session.ping(deadline).map(|()| Value::Null),
            1 => session.info(deadline).map(|info| {
                self.info = info;
                Value::Null
            }),
            2 => session.file_systems(deadline).map(|mounts| {
                self.mounts = mounts;
                Value::Null
            }),
            3 => session.freeze(&self.coverage(), deadline).map(Value::from),
            4 => session.status(deadline).map(|status| match status {
                FreezeStatus::Thawed => "thawed".into(),
                FreezeStatus::Frozen => "frozen".into(),
            }),
            _ if self.in_doubt => session.thaw(soon).map(|_| Value::Null),
            _ => {
                let report = session.pre_sync(&self.info, &self.coverage(), soon);
                harmless(report.shortfall.as_deref().unwrap_or_default());
                Ok(Value::Null)
            }
        };
        let talk = guest.take_talk();
        if outcome
            .as_ref()
            .is_err_and(|error| matches!(error, AgentError::Timeout { .. } | AgentError::Silent { .. }))
        {
            return false;
        }
        outcome.as_ref().inspect_err(|error| harmless(&error.to_string())).ok();
        if self.in_doubt && call != 4 {
            assert!(talk.first().is_none_or(|(asked, _)| asked == "guest-fsfreeze-thaw"), "{talk:?}");
        }
        match (call, &talk[..]) {
            (0 | 3 | 4, [(asked, reply)]) if !asked.ends_with("thaw") => agrees(call, &outcome, reply),
            _ => {}
        }
        self.learn(call, &outcome, &talk);
        self.session = Some(session);
        true
    }

    fn learn(&mut self, call: u8, outcome: &Result<Value, AgentError>, talk: &[(String, Reply)]) {
        // What is asked after a thaw is asked of a guest that is confirmed thawed.
        let thawed = |(asked, reply): &(String, Reply)| match asked.as_str() {
            "guest-fsfreeze-thaw" => false,
            "guest-fsfreeze-status" => match meaning(reply) {
                Meaning::Returned(value) => call != 4 && value == "thawed",
                Meaning::Refused => false,
                Meaning::Unclear => true,
            },
            _ => true,
        };
        self.in_doubt &= !talk.iter().any(thawed);
        let froze = talk.last().is_some_and(|(asked, _)| asked.starts_with("guest-fsfreeze-freeze"));
        if let (3, true, Err(error)) = (call, froze, outcome) {
            self.in_doubt = error.in_doubt();
        }
    }
}

/// One question was asked, and this was the reply.
fn agrees(call: u8, outcome: &Result<Value, AgentError>, reply: &Reply) {
    let told = match meaning(reply) {
        Meaning::Unclear => {
            return assert!(outcome.is_err() || reply.line().is_some_and(is_loose), "{reply:?}");
        }
        Meaning::Refused => return assert!(matches!(outcome, Err(AgentError::Refused { .. })), "{reply:?}"),
        Meaning::Returned(value) => value,
    };
    let counts = match call {
        0 => Some(Value::Null),
        3 => told.as_u64().filter(|count| *count <= i64::MAX as u64).map(Value::from),
        _ => Some(told.clone()).filter(|told| told == "thawed" || told == "frozen"),
    };
    match counts {
        Some(expected) => assert_eq!(outcome.as_ref().unwrap(), &expected, "{reply:?}"),
        None => assert!(matches!(outcome, Err(AgentError::Protocol { .. })), "{reply:?}"),
    }
}

/// Where a reader may be less strict than another one.
fn is_loose(line: &[u8]) -> bool {
    line.trim_ascii().starts_with(b"{")
}

fn harmless(story: &str) {
    assert!(!story.chars().any(char::is_control), "{story:?}");
}

#[cfg(test)]
mod tests {
    use block::testing::{drive, keep_seeds};

    use super::*;

    #[test]
    fn agents_are_understood_as_the_model_says() {
        let said = |text: &[u8]| [b"\0", text].concat();
        let calls = |calls: [u8; MAX_CALLS], replies: &[u8]| [&[1], &calls[..], replies].concat();
        let made = [
            ("sync", said(b"\xff{\"return\": 7}\n{\"return\": {}}\n{\"return\": 3}\n")),
            ("late", said(b"{\"return\": 1}\n\xff{\"return\": 6}\n{\"return\":7}\n\xff\xff{\"x\":0,\"return\": 7 }\r\n\n")),
            ("freeze", calls([0, 1, 2, 5, 3, 4, 3, 0, 0, 0, 0, 0], &[1, 5, 6, 7, 8, 0, 1, 3, 0, 1, 2, 1])),
            ("doubt", calls([1, 2, 3, 0, 3, 4, 5, 0, 1, 2, 3, 4], &[5, 6, 11, 0, 1, 2, 1, 9, 3, b'{', b'}', b'x', 3])),
            ("refused", calls([1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0], &[5, 6, 4, 2, 4, 10, 2, b'{', b'"', 12])),
        ];
        keep_seeds("agent_replies", &made);
        drive("agent_replies", agent_replies, Duration::from_secs(3));
    }
}
