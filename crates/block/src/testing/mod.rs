//! For tests: storage in memory, failing on demand, or remembering what a loss of power would have kept; random numbers.

mod crash;
mod fault;
mod memory;
mod random;

pub use crash::CrashStorage;
pub use fault::FaultStorage;
pub use memory::MemStorage;
pub use random::Random;
