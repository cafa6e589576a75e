//! The cut in memory.

mod every_fault;
mod hold;
mod stories;
mod world;
