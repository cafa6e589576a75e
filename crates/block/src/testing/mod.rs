//! Storage for tests: in memory, or failing on demand.

mod fault;
mod memory;

pub use fault::FaultStorage;
pub use memory::MemStorage;
