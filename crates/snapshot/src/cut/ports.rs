//! What the cut asks of the world. Every wait takes an absolute deadline on the [`Clock`].

use std::time::Instant;

use block::{ErrorKind, Result, Wait};
use time::OffsetDateTime;

use crate::{Event, SnapshotDisk, SnapshotRecord};

/// Why the guest agent did not do what it was asked; what may have happened in the guest follows from the kind, so an
/// adapter that is not sure says `TimedOut` or `Other`.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum GuestError {
    /// Nobody answers on the channel; the command was not sent.
    #[error("the guest agent is not there: {0}")]
    Absent(String),
    /// The command was sent and not answered by the deadline. It may be carried out at any time from now on.
    #[error("the guest agent did not answer in time: {0}")]
    TimedOut(String),
    /// The agent answered with an error, and nothing has changed in the guest.
    #[error("the guest agent refused: {0}")]
    Refused(String),
    /// Anything else, such as a channel that was lost after the command had been sent. The command may have been
    /// carried out, or may be later.
    #[error("the guest agent failed: {0}")]
    Other(String),
}

impl GuestError {
    /// Whether the command may have been carried out or may still be.
    pub(super) fn is_unknown(&self) -> bool {
        match self {
            Self::TimedOut(_) | Self::Other(_) => true,
            Self::Absent(_) | Self::Refused(_) => false,
        }
    }
}

impl From<GuestError> for block::Error {
    fn from(error: GuestError) -> Self {
        let kind = match error {
            // Not `NotFound`: that is for names that a client gave.
            GuestError::Absent(_) | GuestError::Other(_) => ErrorKind::Io,
            GuestError::TimedOut(_) => ErrorKind::TimedOut,
            GuestError::Refused(_) => ErrorKind::Busy,
        };
        Self::new(kind, error.to_string())
    }
}

/// The result of a command to the guest.
pub type GuestResult<T> = std::result::Result<T, GuestError>;

/// What the agent says of the guest's file systems.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FreezeStatus {
    /// Some may be frozen.
    Frozen,
    /// None is.
    Thawed,
}

/// The file systems that must be frozen for the grade `filesystem`: every one that is mounted writable on a disk of
/// ours, each once however often it is mounted.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Coverage {
    /// Where they are mounted in the guest, in words for people.
    pub mounts: Vec<String>,
    /// Those among them that are not known to support a freeze: they are named when the count is short.
    pub unfreezable: Vec<String>,
}

/// The guest agent.
///
/// # Order
/// The agent carries out one command after the other, in the order of the channel, and a command that timed out stays
/// in it. So an answer to [`Guest::connect`] proves that everything sent before has been carried out or is lost, and a
/// thaw sent after a freeze is carried out after it, however late. All recovery from a freeze of unknown fate rests on
/// this (qemu-ga reads its channel and carries out its commands in one thread).
///
/// # Connection
/// After any error but [`GuestError::Refused`] the channel may be out of step, and the caller calls `connect` again
/// before anything else. A connection is kept from there to the thaw, as opening one takes about 0.1 s.
pub trait Guest: Send {
    /// Connects if need be, and gets into step: returns when the agent has answered a fresh synchronisation, all older
    /// answers having been thrown away.
    fn connect(&mut self, deadline: Instant) -> GuestResult<()>;

    /// Has the guest write out its dirty memory while it runs. Must never freeze. Succeeds at once if the agent offers
    /// no means.
    fn pre_sync(&mut self, deadline: Instant) -> GuestResult<()>;

    /// Which file systems must be frozen. Agents refuse this while frozen.
    fn coverage(&mut self, deadline: Instant) -> GuestResult<Coverage>;

    /// Freezes the file systems of `coverage`, and says how many of *those* it froze: what else the agent freezes is
    /// not counted. An agent that fails half-way and thaws what it froze has refused.
    fn freeze(&mut self, coverage: &Coverage, deadline: Instant) -> GuestResult<u64>;

    /// Whether the guest is frozen.
    fn status(&mut self, deadline: Instant) -> GuestResult<FreezeStatus>;

    /// Thaws all file systems, and says how many it thawed, counted as [`Guest::freeze`] counts. Zero, or a refusal, is
    /// the answer of a guest that was not frozen.
    fn thaw(&mut self, deadline: Instant) -> GuestResult<u64>;
}

/// The *thaw owed* record: one guest's, on stable storage.
pub trait Debts: Send + Sync {
    /// Whether a record was left by an earlier run of the daemon.
    fn is_recorded(&self) -> Result<bool>;

    /// Writes it; durable on return. `snapshot` tells people who froze.
    fn record(&self, snapshot: &str) -> Result<()>;

    /// Removes it; durable on return, and no error if there is none.
    fn clear(&self) -> Result<()>;
}

/// The layers of the disks of one cut, before it.
pub trait Layers {
    /// Creates and syncs an overlay for each disk, loads what the pivot needs, and commits the manifest, in which the
    /// empty overlays stand upon the still active layers. May take long. Whatever can fail at the pivot fails here.
    /// On failure it leaves nothing behind.
    fn prepare(self: Box<Self>) -> Result<Box<dyn PreparedLayers>>;
}

/// Overlays that are ready, while the layers beneath are still active.
pub trait PreparedLayers: Send {
    /// Takes the overlays out of the manifest and removes them. May take long. On failure the overlays may stay in the
    /// manifest: empty, they change nothing that is read.
    fn undo(self: Box<Self>) -> Result<()>;

    /// Makes the overlays active, of all disks. The disks are quiesced. In memory only: no I/O, no allocation that
    /// grows with anything, no waiting, and no failure.
    fn pivot(self: Box<Self>) -> Box<dyn PivotedLayers>;
}

/// The layers that the cut froze, beneath the now active overlays.
pub trait PivotedLayers {
    /// The images that hold the frozen state.
    fn disks(&self) -> Vec<SnapshotDisk>;

    /// Writes the snapshot into the manifest: once when its grade is known, and again when it is sealed or could not be.
    /// On failure it is known to this process all the same, as it stands.
    fn record(&mut self, record: &SnapshotRecord) -> Result<()>;

    /// Syncs the layers beneath and marks them read-only. May take long; requests flow.
    fn seal(&mut self) -> Result<()>;
}

/// The gates of the disks of one cut.
pub trait Gates: Send + Sync {
    /// Closes them all before it returns; opened by [`ClosedGates::open`] or by dropping.
    fn close(&self) -> Box<dyn ClosedGates>;
}

/// A hold on closed gates; dropping it opens them.
pub trait ClosedGates: Send {
    /// Waits until no request is in flight on any of the disks. On failure they stay closed.
    fn drain(&self, deadline: Instant) -> Result<()>;

    /// Opens them all, and tells how long requests waited.
    fn open(self: Box<Self>) -> Wait;
}

/// Time.
pub trait Clock: Send + Sync {
    /// For durations and deadlines.
    fn now(&self) -> Instant;

    /// For people.
    fn wall(&self) -> OffsetDateTime;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wall(&self) -> OffsetDateTime {
        OffsetDateTime::now_utc()
    }
}

/// Who listens.
pub trait Events: Send + Sync {
    /// Must neither wait nor call back into the cut.
    fn emit(&self, event: Event);
}
