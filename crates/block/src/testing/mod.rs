//! For tests: storage in memory, failing on demand, or remembering what a loss of power would have kept; random numbers;
//! fuzz targets, for a moment.

mod crash;
mod fault;
mod fuzz;
mod memory;
mod random;

pub use crash::CrashStorage;
pub use fault::FaultStorage;
pub use fuzz::{Input, drive, keep_seeds, mutate};
pub use memory::MemStorage;
pub use random::Random;
