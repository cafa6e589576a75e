//! Storage for tests: in memory, failing on demand, or remembering what a loss of power would have kept.

mod crash;
mod fault;
mod memory;

pub use crash::CrashStorage;
pub use fault::FaultStorage;
pub use memory::MemStorage;
