//! The questions that can be asked, over a connection that heals itself.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use qapi::qga;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::coverage::{Coverage, FileSystem, Means};
use crate::error::AgentError;
use crate::link::{Link, is_object};
use crate::text::quote;

/// Between two thaws of a guest that still says `frozen`.
const THAW_PAUSE: Duration = Duration::from_millis(50);

/// Where the agent of one guest is to be found.
#[derive(Clone, Debug)]
pub struct Agent {
    path: PathBuf,
}

/// What the agent says about itself (`guest-info`).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AgentInfo {
    /// The agent's version, as it gives it.
    pub version: String,
    enabled: BTreeSet<String>,
}

impl AgentInfo {
    /// Whether the agent knows `command` and the guest's administrator has not blocked it.
    pub fn offers(&self, command: &str) -> bool {
        self.enabled.contains(command)
    }

    /// An agent of this version that offers just these commands.
    pub fn new(version: &str, enabled: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { version: version.to_owned(), enabled: enabled.into_iter().map(Into::into).collect() }
    }
}

/// What the agent believes of the guest's file systems (`guest-fsfreeze-status`).
///
/// On Windows it can say `Frozen` when VSS has given up after its 10 s and all volumes are writing again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FreezeStatus {
    /// None is frozen.
    Thawed,
    /// A freeze took place and no thaw since.
    Frozen,
}

/// A guest that is confirmed thawed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Thawed {
    /// How many file systems this thaw thawed, by the agent's count; 0 if they were thawed before.
    pub count: u64,
    /// The agent's error, if the thaw returned one and yet the agent is no longer frozen: VSS had already given up
    /// (Windows, 10 s), or the guest's thaw hook failed. The count is then not known.
    pub complaint: Option<String>,
}

/// A conversation with the agent. See the [crate] for its lifecycle and what holds throughout.
pub struct Session {
    path: PathBuf,
    link: Option<Link>,
    next_id: i64,
    /// A freeze was sent and its outcome never heard.
    freeze_in_doubt: bool,
}

#[derive(Deserialize)]
#[serde(bound = "T: DeserializeOwned")]
struct Reply<T> {
    #[serde(rename = "return")]
    value: Option<T>,
    error: Option<ErrorReply>,
}

/// Not `qapi`'s own: that one knows five classes, and a sixth would hide the reason.
#[derive(Deserialize)]
struct ErrorReply {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}

impl Agent {
    /// The agent behind the Unix socket at `path`, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a connection and synchronizes it.
    ///
    /// # Errors
    /// [`AgentError::Absent`] at once if nothing listens; [`AgentError::Silent`] at `deadline` if nobody answers.
    pub fn connect(&self, deadline: Instant) -> Result<Session, AgentError> {
        // Ids only have to differ from those of earlier clients, whose replies may still be under way. The agent reads
        // them as an int64; 2^53 keeps them exact for anything between us that counts in doubles.
        let seed = RandomState::new().hash_one(std::process::id()) & ((1 << 52) - 1);
        let next_id = i64::try_from(seed).unwrap_or_default();
        let mut session = Session { path: self.path.clone(), link: None, next_id, freeze_in_doubt: false };
        session.link(deadline)?;
        Ok(session)
    }
}

impl Session {
    /// Asks whether the agent is there.
    pub fn ping(&mut self, deadline: Instant) -> Result<(), AgentError> {
        self.settle(deadline)?;
        self.call(&qga::guest_ping {}, deadline).map(|_: serde::de::IgnoredAny| ())
    }

    /// The agent's version and which commands are enabled.
    pub fn info(&mut self, deadline: Instant) -> Result<AgentInfo, AgentError> {
        self.settle(deadline)?;
        let info: qga::GuestAgentInfo = self.call(&qga::guest_info {}, deadline)?;
        let enabled =
            info.supported_commands.into_iter().filter(|command| command.enabled).map(|command| command.name);
        Ok(AgentInfo { version: quote(&info.version), enabled: enabled.collect() })
    }

    /// The mounted file systems that have a block device. Refused while frozen.
    pub fn file_systems(&mut self, deadline: Instant) -> Result<Vec<FileSystem>, AgentError> {
        self.settle(deadline)?;
        self.call(&qga::guest_get_fsinfo {}, deadline)
    }

    /// Freezes what `coverage` says, and returns how many file systems the agent says it froze: as many as there are
    /// targets, if all is well.
    ///
    /// A thaw is owed from before this call until [`Session::thaw`] succeeds, also when the number is 0 (the guest's
    /// freeze hook has run) and when this returns an error: the freeze may be late, and this session then thaws before
    /// it asks anything else. A refusal means that the agent has itself thawed what it had frozen.
    pub fn freeze(&mut self, coverage: &Coverage, deadline: Instant) -> Result<u64, AgentError> {
        self.settle(deadline)?;
        if coverage.targets().is_empty() {
            return Ok(0);
        }
        let frozen: Result<i64, _> = match coverage.means() {
            Means::List => {
                let mountpoints = Some(coverage.mountpoints().map(str::to_owned).collect());
                self.call(&qga::guest_fsfreeze_freeze_list { mountpoints }, deadline)
            }
            Means::All => self.call(&qga::guest_fsfreeze_freeze {}, deadline),
        };
        let count = frozen.and_then(|count| self.count("guest-fsfreeze-freeze", count));
        self.freeze_in_doubt = count.as_ref().is_err_and(AgentError::in_doubt);
        count
    }

    /// What the agent believes. Never thaws.
    pub fn status(&mut self, deadline: Instant) -> Result<FreezeStatus, AgentError> {
        let status: String = self.call(&qga::guest_fsfreeze_status {}, deadline)?;
        match status.as_str() {
            "thawed" => Ok(FreezeStatus::Thawed),
            "frozen" => Ok(FreezeStatus::Frozen),
            other => Err(self.broken("guest-fsfreeze-status", format!("status {:?}", quote(other)))),
        }
    }

    /// Thaws until the agent's status says `thawed`.
    ///
    /// # Errors
    /// Anything but success means that the guest may be frozen: try again, for ever.
    pub fn thaw(&mut self, deadline: Instant) -> Result<Thawed, AgentError> {
        let mut count = 0;
        loop {
            let refusal = match self.call::<_, i64>(&qga::guest_fsfreeze_thaw {}, deadline) {
                Ok(thawed) => {
                    count = self.count("guest-fsfreeze-thaw", thawed)?.saturating_add(count);
                    None
                }
                Err(error @ AgentError::Refused { .. }) => Some(error),
                Err(error) => return Err(error),
            };
            match (self.status(deadline)?, refusal) {
                (FreezeStatus::Thawed, refusal) => {
                    self.freeze_in_doubt = false;
                    return Ok(Thawed { count, complaint: refusal.map(|error| error.to_string()) });
                }
                (FreezeStatus::Frozen, refusal) if Instant::now() + THAW_PAUSE >= deadline => {
                    return Err(refusal.unwrap_or(AgentError::Timeout { command: "guest-fsfreeze-thaw" }));
                }
                (FreezeStatus::Frozen, _) => thread::sleep(THAW_PAUSE),
            }
        }
    }

    /// Starts a program in the guest and waits for its end; whether it ended with exit status 0.
    pub(crate) fn run(
        &mut self,
        path: &str,
        args: Vec<String>,
        deadline: Instant,
    ) -> Result<bool, AgentError> {
        const PAUSE_MAX: Duration = Duration::from_millis(50);
        self.settle(deadline)?;
        let program = qga::guest_exec {
            path: path.to_owned(),
            arg: Some(args),
            env: None,
            input_data: None,
            capture_output: None,
        };
        let started: qga::GuestExec = self.call(&program, deadline)?;
        let mut pause = Duration::from_millis(2);
        loop {
            let status: ExecStatus = self.call(&qga::guest_exec_status { pid: started.pid }, deadline)?;
            if status.exited {
                return Ok(status.exitcode == Some(0));
            }
            if Instant::now() + pause >= deadline {
                return Err(AgentError::Timeout { command: "guest-exec" });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Thaws after a freeze whose reply never came (design invariant "never left frozen").
    fn settle(&mut self, deadline: Instant) -> Result<(), AgentError> {
        if self.freeze_in_doubt {
            let thawed = self.thaw(deadline)?;
            tracing::warn!(count = thawed.count, "a freeze that had not been answered in time is thawed");
        }
        Ok(())
    }

    /// The connection, opened and synchronized anew if there is none that is in step.
    fn link(&mut self, deadline: Instant) -> Result<&mut Link, AgentError> {
        let link = match self.link.take().filter(Link::is_quiet) {
            Some(link) => link,
            None => {
                self.next_id += 1;
                Link::open(&self.path, self.next_id, deadline)?
            }
        };
        Ok(self.link.insert(link))
    }

    /// One question, one answer. Replies are read as `R`, not always `qapi`'s type: those are closed enumerations and
    /// required members, and a newer agent's new bus type must not make all its file systems unreadable.
    fn call<C: qapi::Command, R: DeserializeOwned>(
        &mut self,
        command: &C,
        deadline: Instant,
    ) -> Result<R, AgentError> {
        let request = serde_json::json!({ "execute": C::NAME, "arguments": command });
        let line = format!("{request}\n");
        let reply = self.link(deadline)?.exchange(C::NAME, line.as_bytes(), deadline);
        let reply = reply.inspect_err(|_| self.link = None)?;
        if !is_object(&reply) {
            return Err(self.broken(C::NAME, "not an object".to_owned()));
        }
        match serde_json::from_slice::<Reply<R>>(&reply) {
            Ok(Reply { error: Some(error), .. }) => Err(AgentError::Refused {
                command: C::NAME,
                class: quote(&error.class),
                desc: quote(&error.desc),
            }),
            Ok(Reply { value: Some(value), error: None }) => Ok(value),
            Ok(Reply { value: None, error: None }) => {
                Err(self.broken(C::NAME, "neither `return` nor `error`".to_owned()))
            }
            Err(error) => Err(self.broken(C::NAME, quote(&error.to_string()))),
        }
    }

    /// A count must not be negative.
    fn count(&mut self, command: &'static str, count: i64) -> Result<u64, AgentError> {
        u64::try_from(count).map_err(|_| self.broken(command, format!("{count} file systems")))
    }

    /// After nonsense, nothing more on this connection is believed.
    fn broken(&mut self, command: &'static str, detail: String) -> AgentError {
        self.link = None;
        AgentError::Protocol { command, detail }
    }
}

#[derive(Deserialize)]
struct ExecStatus {
    exited: bool,
    exitcode: Option<i64>,
}

#[cfg(test)]
mod tests;
