//! What a job may become, and what may be asked of it: two tables, after QEMU's `job.c` (`JobSTT`, `JobVerbTable`).
//!
//! ```text
//!                         standby
//!                          ▲  │
//!                          │  ▼
//!                     ┌──▶ ready ──┐
//!   created ──▶ running ───────────┴▶ waiting ──▶ pending ──▶ concluded ──▶ null
//!      │        │  ▲ │                   │           │            ▲
//!      │        ▼  │ └────┬──────────────┴───────────┘            │
//!      │       paused     ▼                                       │
//!      └─────────────▶ aborting ──────────────────────────────────┘
//! ```
//! *Ready* is a commit of the active layer that a client completes by hand, as in QEMU; nothing grows meanwhile, for the
//! job has pivoted first. *Waiting* is for a cut that is under way. *Pending* is the last step, which nobody can call off
//! once it has been finalized, by a client or of itself.

use block::{Error, ErrorKind, Result};

use super::JobStatus::{
    self, Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
};

/// What a client may ask of a job.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verb {
    /// To rest until it is resumed.
    Pause,
    /// To go on.
    Resume,
    /// To copy at another speed.
    SetSpeed,
    /// To give up.
    Cancel,
    /// To switch over, when it is ready.
    Complete,
    /// To do its last step.
    Finalize,
    /// To leave the list, once it has concluded.
    Dismiss,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Cancel => "cancel",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
        }
    }
}

/// Which statuses may follow which.
const FOLLOWS: &[(JobStatus, &[JobStatus])] = &[
    (Created, &[Running, Aborting, Null]),
    (Running, &[Paused, Ready, Waiting, Aborting]),
    (Paused, &[Running]),
    (Ready, &[Standby, Waiting, Aborting]),
    (Standby, &[Ready]),
    (Waiting, &[Pending, Aborting]),
    (Pending, &[Concluded, Aborting]),
    (Aborting, &[Concluded]),
    (Concluded, &[Null]),
    (Null, &[]),
];

/// In which statuses what may be asked.
const ALLOWED: &[(Verb, &[JobStatus])] = &[
    (Verb::Pause, &[Created, Running, Paused, Ready, Standby]),
    (Verb::Resume, &[Created, Running, Paused, Ready, Standby]),
    (Verb::SetSpeed, &[Created, Running, Paused, Ready, Standby]),
    (Verb::Cancel, &[Created, Running, Paused, Ready, Standby, Waiting, Pending]),
    (Verb::Complete, &[Ready]),
    (Verb::Finalize, &[Pending]),
    (Verb::Dismiss, &[Concluded]),
];

/// What a job should do next, asked by the job itself between two pieces of work.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Wish {
    GoOn,
    Rest,
    GiveUp,
}

/// A job's status, and what was asked of it. Changed only as the tables allow.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    status: JobStatus,
    paused: bool,
    cancelled: bool,
    /// Somebody has called it off twice.
    insisted: bool,
    completed: bool,
    finalized: bool,
}

impl Machine {
    /// A job that was just made; `paused` if it was when its daemon ended. If `finalized`, its last step needs nobody.
    pub(crate) fn new(paused: bool, finalized: bool) -> Self {
        Self { status: Created, paused, cancelled: false, insisted: false, completed: false, finalized }
    }

    pub(crate) fn status(&self) -> JobStatus {
        self.status
    }

    /// Whether somebody has asked it to pause, and nobody since to resume.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether somebody has asked it to switch over.
    pub(crate) fn is_completed(&self) -> bool {
        self.completed
    }

    /// Whether its last step may be done.
    pub(crate) fn is_finalized(&self) -> bool {
        self.finalized
    }

    /// Whether somebody has called it off.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    /// Whether somebody has called it off once more, and will not wait for what it does then.
    pub(crate) fn is_insisted(&self) -> bool {
        self.insisted
    }

    /// It is decided whether its last step is done: what was asked to the contrary came too late.
    pub(crate) fn settle(&mut self, all_well: bool) {
        (self.finalized, self.cancelled) = (all_well, !all_well);
    }

    /// It has failed of itself: that it was called off before is not why it ends.
    pub(crate) fn fail(&mut self) {
        self.cancelled = false;
    }

    /// Checks and notes what a client asks. The job itself follows when it next looks for a [`Wish`].
    pub(crate) fn ask(&mut self, id: &str, verb: Verb) -> Result<()> {
        let busy = |story: String| Err(Error::new(ErrorKind::Busy, story));
        let allowed = ALLOWED.iter().any(|(of, statuses)| *of == verb && statuses.contains(&self.status));
        let too_late = self.status == Pending && self.finalized;
        if !allowed || too_late {
            let (status, verb) = (self.status.name(), verb.name());
            return busy(format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'"));
        }
        match verb {
            Verb::Pause if self.paused => return busy("Job is already paused".to_owned()),
            Verb::Pause => self.paused = true,
            Verb::Resume if !self.paused => {
                return busy("Can't resume a job that was not paused".to_owned());
            }
            Verb::Resume => self.paused = false,
            Verb::Cancel => (self.insisted, self.cancelled) = (self.cancelled, true),
            Verb::Finalize => self.finalized = true,
            Verb::Complete => self.completed = true,
            Verb::SetSpeed | Verb::Dismiss => {}
        }
        Ok(())
    }

    pub(crate) fn wish(&self) -> Wish {
        match (self.cancelled, self.paused) {
            (true, _) => Wish::GiveUp,
            (false, true) => Wish::Rest,
            (false, false) => Wish::GoOn,
        }
    }

    /// Goes to another status. An error is a defect of the caller, and the job fails of it.
    pub(crate) fn go(&mut self, to: JobStatus) -> Result<()> {
        let may = FOLLOWS.iter().any(|(from, next)| *from == self.status && next.contains(&to));
        if !may {
            let story = format!("a job went from {} to {}", self.status.name(), to.name());
            return Err(Error::new(ErrorKind::InvalidInput, story));
        }
        self.status = to;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [JobStatus; 10] =
        [Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null];
    const VERBS: [Verb; 7] = [
        Verb::Pause,
        Verb::Resume,
        Verb::SetSpeed,
        Verb::Cancel,
        Verb::Complete,
        Verb::Finalize,
        Verb::Dismiss,
    ];

    fn in_status(status: JobStatus) -> Machine {
        Machine { finalized: true, status, ..Machine::new(false, true) }
    }

    /// `JobSTT` of QEMU 10.0, `job.c`, without the row and column of *undefined*.
    #[test]
    fn every_step_is_one_of_qemus() {
        let qemu = [
            (Created, &[Running, Aborting, Null][..]),
            (Running, &[Paused, Ready, Waiting, Aborting]),
            (Paused, &[Running]),
            (Ready, &[Standby, Waiting, Aborting]),
            (Standby, &[Ready]),
            (Waiting, &[Pending, Aborting]),
            (Pending, &[Aborting, Concluded]),
            (Aborting, &[Aborting, Concluded]),
            (Concluded, &[Null]),
            (Null, &[]),
        ];
        for (from, allowed) in qemu {
            for to in ALL {
                let mut machine = in_status(from);
                let went = machine.go(to).is_ok();
                assert!(!went || allowed.contains(&to), "{from:?} to {to:?}");
                assert_eq!(machine.status(), if went { to } else { from });
            }
        }
    }

    #[test]
    fn every_job_can_end_wherever_it_is() {
        for from in ALL {
            let (mut reached, mut grown) = (vec![from], true);
            while grown {
                let next: Vec<_> = FOLLOWS.iter().filter(|(from, _)| reached.contains(from)).collect();
                let new = next.iter().flat_map(|(_, to)| to.iter()).find(|to| !reached.contains(to));
                grown = new.is_some();
                reached.extend(new);
            }
            assert!(reached.contains(&Null), "{from:?} is a dead end");
        }
    }

    #[test]
    fn what_is_asked_at_the_wrong_time_is_refused_in_qemus_words_and_changes_nothing() {
        for status in ALL {
            for verb in VERBS {
                let mut machine = in_status(status);
                machine.paused = verb == Verb::Resume;
                let before = format!("{machine:?}");
                if let Err(error) = machine.ask("j", verb) {
                    let words = format!(
                        "Job 'j' in state '{}' cannot accept command verb '{}'",
                        status.name(),
                        verb.name()
                    );
                    assert_eq!(error.to_string(), words);
                    assert_eq!(format!("{machine:?}"), before);
                }
            }
        }
    }

    #[test]
    fn the_switch_can_not_be_called_off() {
        assert!(in_status(Waiting).ask("j", Verb::Cancel).is_ok());
        assert!(in_status(Pending).ask("j", Verb::Cancel).is_err());
        assert!(in_status(Pending).ask("j", Verb::Finalize).is_err());
    }

    #[test]
    fn a_job_that_waits_for_its_last_step_is_finalized_once_or_called_off() {
        let waiting = || Machine { finalized: false, ..in_status(Pending) };
        assert!(waiting().ask("j", Verb::Cancel).is_ok());
        let mut job = waiting();
        job.ask("j", Verb::Finalize).unwrap();
        assert!(job.is_finalized());
        assert!(job.ask("j", Verb::Finalize).is_err());
        assert!(job.ask("j", Verb::Cancel).is_err());
    }

    #[test]
    fn pauses_do_not_add_up_and_a_cancel_ends_one() {
        let mut machine = Machine::new(false, true);
        assert_eq!(machine.ask("j", Verb::Resume).unwrap_err().kind(), ErrorKind::Busy);
        machine.ask("j", Verb::Pause).unwrap();
        assert!(machine.ask("j", Verb::Pause).is_err());
        assert_eq!(machine.wish(), Wish::Rest);
        machine.ask("j", Verb::Resume).unwrap();
        assert_eq!(machine.wish(), Wish::GoOn);
        machine.ask("j", Verb::Pause).unwrap();
        machine.ask("j", Verb::Cancel).unwrap();
        assert_eq!(machine.wish(), Wish::GiveUp, "a paused job that is cancelled must not rest for ever");
    }
}
