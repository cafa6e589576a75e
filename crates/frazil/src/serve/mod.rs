//! The daemon.

use std::path::Path;

use block::{Error, ErrorKind, Result};
use control::Service;

use crate::config::Config;

/// Serves the disks until it is told to stop.
pub(crate) fn run(_config: Config) -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, "not wired yet"))
}

/// The state directory of a daemon that does not run, as the commands without a guest need it.
pub(crate) fn offline(_state: &Path) -> Result<Box<dyn Service>> {
    Err(Error::new(ErrorKind::Unsupported, "not wired yet"))
}
