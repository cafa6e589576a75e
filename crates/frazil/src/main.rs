//! Consistent snapshots for running virtual machines.
fn main() {}
