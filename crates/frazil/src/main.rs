//! `frazil serve`, and the commands that speak to it.
//!
//! ```text
//!   flags ─┐                       ┌─ serve    the daemon: wires the crates together, runs until told to stop
//!          ├─▶ cli ─▶ config ──────┤
//!   TOML ──┘                       └─ client   one command: ask, print, end with a code that scripts can use
//!                                       │
//!                                       ├─ a daemon's control socket (QMP), or
//!                                       └─ the state directory of a daemon that does not run
//! ```
//!
//! Standard output carries what was asked for and nothing else; logs, progress and failures go to standard error.
//! No command leaves by a panic: each ends in a [`failure::Failure`] that says what to do next, or in success.

mod cli;
mod client;
mod config;
mod failure;
mod serve;

use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use block::ErrorKind;
use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command, Serve};
use config::{Config, Mistake};
use failure::{Exit, Failure};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit().into()
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    log_to_stderr(if matches!(command, Command::Serve(_)) { "info" } else { "warn" });
    match command {
        Command::Serve(told) => serve::run(configuration(told)?).map_err(|error| not_served(&error)),
        Command::Snapshot(snapshot) => client::snapshot(snapshot),
        Command::Checkpoint(checkpoint) => client::checkpoint(checkpoint),
        Command::Changes(changes) => client::changes(&changes),
        Command::Chain(chain) => client::chain(chain),
        Command::Job(job) => client::job(job),
        Command::Disk(disk) => client::disk(disk),
        Command::Top(top) => client::top(&top),
        Command::Status { daemon, output } => client::status(&daemon, output),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "frazil", &mut io::stdout());
            Ok(())
        }
    }
}

/// What is wrong is in the text; what to do about it depends on the kind.
fn not_served(error: &block::Error) -> Failure {
    let failure = Failure::new(Exit::Failed, "serve", error);
    match error.kind() {
        ErrorKind::NotFound => {
            failure.hint("images and the folders of sockets must be there; `qemu-img create` makes an image")
        }
        ErrorKind::Busy => failure.hint("end what uses it, or give another path"),
        ErrorKind::Corrupt | ErrorKind::Unsupported => failure.hint(
            "is format= right? `qemu-img info` tells an image's format, `qemu-img check` whether it is sound",
        ),
        ErrorKind::Io => failure.hint("can the user who runs this open it, and write there?"),
        _ => failure,
    }
}

/// `FRAZIL_LOG`, else `RUST_LOG`, else `default`, in the words of `tracing`'s filters.
fn log_to_stderr(default: &str) {
    let directives = ["FRAZIL_LOG", "RUST_LOG"].iter().find_map(|name| std::env::var(name).ok());
    let filter = EnvFilter::new(directives.as_deref().unwrap_or(default));
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(colour).init();
}

/// What the flags or the file say, checked.
fn configuration(told: Serve) -> Result<Config, Failure> {
    match told.config {
        Some(path) => read_configuration(&path),
        None => from_flags(told.flags)
            .map_err(|mistake| Failure::new(Exit::Usage, "read the command line", mistake))?
            .based_on(Path::new(""))
            .map_err(|error| Failure::new(Exit::Failed, "find the working directory", error))
            .and_then(|config| checked(config, "read the command line".to_owned())),
    }
    .map_err(|failure| failure.hint("`frazil serve --help` lists the words and their values"))
}

fn read_configuration(path: &Path) -> Result<Config, Failure> {
    let what = format!("read {}", path.display());
    let text =
        std::fs::read_to_string(path).map_err(|error| Failure::new(Exit::Usage, what.as_str(), error))?;
    let config = config::read(&text).map_err(|mistake| Failure::new(Exit::Usage, what.as_str(), mistake))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let config = config.based_on(folder).map_err(|error| Failure::new(Exit::Failed, what.as_str(), error))?;
    checked(config, what)
}

fn from_flags(flags: cli::ServeFlags) -> Result<Config, Mistake> {
    Ok(Config {
        state: flags.state.ok_or(Mistake::Missing { key: "state", example: "DIR" })?,
        control: flags.control.ok_or(Mistake::Missing { key: "control", example: "SOCK" })?,
        agent: flags.agent,
        freeze_owner: flags.freeze_owner,
        freeze: flags.freeze,
        pre_sync: flags.pre_sync,
        allow_folders: flags.allow_folders,
        target_folders: flags.target_folders,
        tls_folders: flags.tls_folders,
        sandbox: flags.sandbox,
        metrics: flags.metrics,
        users: flags.users,
        disks: flags.disks,
    })
}

fn checked(config: Config, what: String) -> Result<Config, Failure> {
    match config.check() {
        Ok(()) => Ok(config),
        Err(mistake) => Err(Failure::new(Exit::Usage, what, mistake)),
    }
}
