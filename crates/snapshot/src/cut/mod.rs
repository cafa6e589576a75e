//! The cut: one instant, over one disk or several, at which the disks' state becomes a snapshot.
//!
//! ```text
//!   Cut ──prepare()──▶ Held ──release()──▶ SnapshotRecord        Cut ──take()──▶ both at once
//!                        └────abort(), drop──▶ nothing happened
//!
//!   PREPARE      pre-sync, FREEZE   GATE  DRAIN │ PIVOT  OPEN    THAW     SEAL
//!   overlays,    thaw owed is       all   all   │ all    all     until    old layers
//!   manifest     recorded first                 │                confirmed
//!   └─ guest runs ─┘└──── frozen ───────────────┼──────────────────┘└─ guest runs ─┘
//!                                   └─ no request is taken ┘
//!                ◀── a failure undoes everything│the snapshot stands ──▶
//! ```
//!
//! # Lifecycle
//! The steps are types ([`machine`](self)): each owns the one before, so none can be left out or repeated, and going
//! back means to undo the own part and to hand back to the one before: gates open first, so that the guest can run, then
//! the thaw, then the overlays.
//!
//! # Invariants
//! - Freeze first, gate second. Inside the gate nothing waits for the guest, nothing is created, synced or told.
//! - A guest that may be frozen is held by a cut or by the [`Collector`], and its *thaw owed* record is durable.
//! - A failure before the pivot leaves everything as it was; after the pivot the snapshot stands.
//! - [`grade()`] alone says how clean a snapshot is, and all doubt makes it a crash.
//! - Every wait has a deadline ([`Limits`]).
//!
//! # I/O model
//! None here: the world is behind the traits [`Guest`], [`Debts`], [`Layers`], [`Gates`], [`Clock`] and [`Events`], so the
//! tests run every failure of every call in memory. The caller's thread does all the waiting, but for owed thaws.
//!
//! docs/cut-protocol.md says what each failure leads to.

mod collector;
mod freezer;
mod gates;
mod grade;
mod limits;
mod machine;
mod ports;
mod run;
#[cfg(test)]
mod tests;

pub use collector::Collector;
pub use freezer::Freezer;
pub use gates::GateGroup;
pub use grade::{FreezeOutcome, Overrun, ThawOutcome, grade};
pub use limits::Limits;
pub use machine::{Cut, Held};
pub use ports::{
    Clock, ClosedGates, Coverage, Debts, Events, FreezeStatus, Gates, Guest, GuestError, GuestResult, Layers,
    PivotedLayers, PreparedLayers, SystemClock,
};
pub use run::{CutPlan, CutPorts};
