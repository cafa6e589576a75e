//! The daemon itself, `target/.../frazil serve`, driven without a virtual machine: cuts under load, kills, front-ends
//! that go and come in mid-cut, disks that are full.
//!
//! What may be in a snapshot is proved, not sampled: see [`ledger`].

#![allow(clippy::unwrap_used, clippy::panic, reason = "what fails here fails the test")]

mod agent;
mod backups;
mod broken;
mod commands;
mod confined;
mod courtesy;
mod exports;
mod faults;
mod fleeced;
mod foreign;
mod full;
mod fuzzed;
mod grown;
mod guest;
mod held;
mod images;
mod jobs;
mod killed;
mod ledger;
mod load;
mod mapped;
mod marks;
mod nbd;
mod neighbours;
mod ordinary;
mod overload;
mod planned;
mod prefix;
mod recipe;
mod renamed;
mod rogue;
mod said;
mod scraped;
mod served;
mod shared;
mod slow;
mod stopped;
mod targets;
mod top;
mod unsynced;
mod watched;
