//! Backups as a program asks for them, over real files.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step of a test ends it")]

mod bench;
mod ends;
mod fleeces;
mod groups;
mod instants;
mod races;
mod refusals;
mod targets;
