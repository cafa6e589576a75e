//! The cut in memory.

mod every_fault;
mod faults;
mod hold;
mod stories;
mod world;
