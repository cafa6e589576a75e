//! The words for checkpoints and changes.

use clap::{Args, Subcommand};

use super::{Output, Place, What, size};

#[derive(Debug, Subcommand)]
pub(crate) enum Checkpoint {
    /// Remember an instant, to ask later what changed since. The guest's file systems are frozen only if --freeze says so.
    Create {
        #[command(flatten)]
        what: What,
        /// The instant of this snapshot, instead of now.
        #[arg(long, value_name = "NAME", conflicts_with = "freeze")]
        snapshot: Option<String>,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        output: Output,
    },
    /// List the checkpoints.
    List {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        output: Output,
    },
    /// Forget a checkpoint; what changed between others stays known.
    Delete {
        /// The checkpoint's name.
        name: String,
        #[command(flatten)]
        place: Place,
    },
}

/// What changed on a disk between two instants.
#[derive(Args, Debug)]
pub(crate) struct Changes {
    /// Which disk.
    #[arg(long, value_name = "ID")]
    pub(crate) disk: String,
    /// A checkpoint or, if there is none of that name, a snapshot.
    #[arg(long, value_name = "NAME")]
    pub(crate) from: String,
    /// The same; now if absent, while the guest goes on writing.
    #[arg(long, value_name = "NAME")]
    pub(crate) to: Option<String>,
    /// Round outward to so many bytes, a power of two such as 64K; as fine as is known if absent.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) granularity: Option<u64>,
    #[command(flatten)]
    pub(crate) place: Place,
    #[command(flatten)]
    pub(crate) output: Output,
}
