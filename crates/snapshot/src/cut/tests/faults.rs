//! The calls of the ports, and how each can go wrong.

/// A call of a port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Call {
    Prepare,
    UndoLayers,
    Pivot,
    Record,
    Seal,
    Close,
    Drain,
    Open,
    RecordDebt,
    ClearDebt,
    Connect,
    PreSync,
    Coverage,
    Freeze,
    Status,
    Thaw,
}

impl Call {
    pub(super) fn is_guest(self) -> bool {
        use Call::*;
        matches!(self, Connect | PreSync | Coverage | Freeze | Status | Thaw)
    }

    /// How this call can go wrong.
    pub(super) fn faults(self) -> &'static [Fault] {
        use Fault::*;
        match self {
            Call::Prepare
            | Call::UndoLayers
            | Call::Record
            | Call::Seal
            | Call::RecordDebt
            | Call::ClearDebt => &[Fails, Slow, Kill],
            Call::Drain => &[Fails, Slow, ForeignThaw, Kill],
            Call::Pivot | Call::Close | Call::Open => &[Slow, ForeignThaw, Kill],
            Call::Connect | Call::PreSync | Call::Coverage | Call::Status => {
                &[Absent, Lost, AnswerLost, Refused, Slow, Kill]
            }
            Call::Freeze => &[Absent, Lost, Late, AnswerLost, Refused, Slow, Kill],
            Call::Thaw => &[Absent, Lost, Late, AnswerLost, Refused, Slow, ForeignThaw, Kill],
        }
    }
}

/// What goes wrong at a call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    /// An error, and nothing done.
    Fails,
    /// It is done, but only at the very end of its deadline, or after 11 s if it has none.
    Slow,
    /// Nobody there.
    Absent,
    /// Timed out; the command is never carried out.
    Lost,
    /// Timed out; the agent is stuck for a while and then carries it out.
    Late,
    /// Carried out, but the channel broke before the answer.
    AnswerLost,
    /// An error from the agent; nothing done.
    Refused,
    /// It is done, but someone else has thawed the guest before.
    ForeignThaw,
    /// The daemon dies just when it has sent this. What it does to the world from then on does not happen.
    Kill,
}
