//! The guest agent, as the cut wants it.

use std::time::Instant;

use guest_agent::{Agent, AgentError, AgentInfo, Coverage, Session};
use snapshot::{FreezeStatus, Guest, GuestError, GuestResult};
use tracing::{debug, info};

/// An agent's socket, and a conversation there from a cut's first question to its confirmed thaw. In between the
/// channel, which takes one client at a time, is left to others.
pub(super) struct AgentGuest {
    agent: Agent,
    /// The serials of our disks: what is mounted from others need not be frozen.
    serials: Vec<String>,
    pre_sync: bool,
    open: Option<Open>,
}

struct Open {
    session: Session,
    info: AgentInfo,
    /// What the last question for it found, with the means to freeze it.
    coverage: Option<Coverage>,
}

impl AgentGuest {
    pub(super) fn new(agent: Agent, serials: Vec<String>, pre_sync: bool) -> Self {
        Self { agent, serials, pre_sync, open: None }
    }

    /// The conversation, begun if there is none.
    fn open(&mut self, deadline: Instant) -> GuestResult<&mut Open> {
        let open = match self.open.take() {
            Some(open) => open,
            None => {
                let mut session = self.agent.connect(deadline).map_err(told)?;
                let info = session.info(deadline).map_err(told)?;
                Open { session, info, coverage: None }
            }
        };
        Ok(self.open.insert(open))
    }

    /// Asks something that changes nothing in the guest; if that fails, the conversation is over.
    fn ask<T>(
        &mut self,
        deadline: Instant,
        question: impl FnOnce(&mut Open) -> Result<T, AgentError>,
    ) -> GuestResult<T> {
        let answer = question(self.open(deadline)?).map_err(told);
        if answer.is_err() {
            self.open = None;
        }
        answer
    }

    fn find_coverage(&mut self, deadline: Instant) -> GuestResult<Coverage> {
        let serials = self.serials.clone();
        self.ask(deadline, |open| {
            let mounts = open.session.file_systems(deadline)?;
            Ok(guest_agent::coverage(&open.info, &mounts, Some(&serials)))
        })
    }
}

/// What the failure means for the guest.
fn told(error: AgentError) -> GuestError {
    let story = error.to_string();
    match error {
        AgentError::Absent { .. } | AgentError::Silent { .. } => GuestError::Absent(story),
        AgentError::Timeout { .. } => GuestError::TimedOut(story),
        AgentError::Refused { .. } => GuestError::Refused(story),
        _ => GuestError::Other(story),
    }
}

impl Guest for AgentGuest {
    fn connect(&mut self, deadline: Instant) -> GuestResult<()> {
        // A session that failed has dropped its connection: this opens another, and synchronizes it.
        self.ask(deadline, |open| open.session.ping(deadline))
    }

    fn pre_sync(&mut self, deadline: Instant) -> GuestResult<()> {
        if !self.pre_sync {
            return Ok(());
        }
        let coverage = self.find_coverage(deadline)?;
        let report = self.ask(deadline, |open| Ok(open.session.pre_sync(&open.info, &coverage, deadline)))?;
        match &report.shortfall {
            None => debug!(?report, "the guest has synced ahead of the freeze"),
            Some(why) => info!(why, "no sync ahead of the freeze, so applications may wait for it longer"),
        }
        Ok(())
    }

    fn coverage(&mut self, deadline: Instant) -> GuestResult<snapshot::Coverage> {
        let coverage = self.find_coverage(deadline)?;
        let told = snapshot::Coverage {
            mounts: coverage.targets().iter().map(ToString::to_string).collect(),
            unfreezable: coverage.unfreezable().map(ToString::to_string).collect(),
        };
        self.open(deadline)?.coverage = Some(coverage);
        Ok(told)
    }

    fn freeze(&mut self, _coverage: &snapshot::Coverage, deadline: Instant) -> GuestResult<u64> {
        let open = self.open(deadline)?;
        let Some(coverage) = &open.coverage else {
            return Err(GuestError::Absent("its file systems have not been asked for".to_owned()));
        };
        // On failure the session stays: it remembers that a thaw must come before all else.
        open.session.freeze(coverage, deadline).map_err(told)
    }

    fn status(&mut self, deadline: Instant) -> GuestResult<FreezeStatus> {
        match self.open(deadline)?.session.status(deadline).map_err(told)? {
            guest_agent::FreezeStatus::Frozen => Ok(FreezeStatus::Frozen),
            guest_agent::FreezeStatus::Thawed => {
                self.open = None;
                Ok(FreezeStatus::Thawed)
            }
        }
    }

    fn thaw(&mut self, deadline: Instant) -> GuestResult<u64> {
        let thawed = self.open(deadline)?.session.thaw(deadline).map_err(told)?;
        if let Some(complaint) = &thawed.complaint {
            info!(complaint, "the guest is thawed, but not by this thaw");
        }
        Ok(thawed.count)
    }
}
