//! The words for watching.

use std::time::Duration;

use clap::Args;

use super::Daemon;

/// Watch the daemon's disks live.
#[derive(Args, Debug)]
pub(crate) struct Top {
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = interval)]
    pub(crate) interval: Duration,
    /// Print one look, over one interval, and end; so does a standard output that is no terminal.
    #[arg(long)]
    pub(crate) once: bool,
    /// The same, as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) daemon: Daemon,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "expected seconds from 0.1 to 3600".to_owned())
}
