//! What a test guest does to its disks: writers of three kinds, each with a file that shows what it had written.
//!
//! ```text
//! guest-workload run REPORTS DIR...           writes to each DIR until it is killed
//! guest-workload check KIND FILE ACKED MODE   proves that FILE holds what it must; MODE is `exact` or `at-least`
//! guest-workload dirty FILE MIB               fills FILE through the page cache, quickly and without a sync
//! guest-workload read FILE REPORT             makes FILE and reads it, until what was read is something else
//! ```
//!
//! Each writer owns one file, `DIR/KIND`, a ring of [`record::SLOTS`] places, and numbers its writes from 1. What it
//! has written, and what of it is *acknowledged* (a sync has returned since), goes to `REPORTS/DIR-KIND`, in memory.
//! `check` then knows two kinds of proof: in an `exact` snapshot, of a frozen file system, the file is as the writer
//! left it between two writes; in any other it holds `at-least` all that was acknowledged before.

use std::path::Path;
use std::process::ExitCode;

mod mapping;
mod reader;
mod record;
mod report;
mod writers;

use writers::Kind;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["run", reports, directories @ ..] if !directories.is_empty() => {
            writers::run(Path::new(reports), directories)
        }
        ["check", kind, file, acked, mode] => check(kind, Path::new(file), acked, mode),
        ["dirty", file, mib] => dirty(Path::new(file), mib),
        ["read", file, report] => reader::run(Path::new(file), Path::new(report)).map(|never| match never {}),
        _ => Err(
            "guest-workload run REPORTS DIR... | check KIND FILE ACKED exact|at-least | dirty FILE MIB | \
                  read FILE REPORT"
                .into(),
        ),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-workload: {error}");
            ExitCode::FAILURE
        }
    }
}

fn check(kind: &str, file: &Path, acked: &str, mode: &str) -> Result<()> {
    let kind = Kind::named(kind)?;
    let exact = match mode {
        "exact" => true,
        "at-least" => false,
        _ => return Err(format!("no mode {mode}").into()),
    };
    let content = std::fs::read(file)?;
    let newest = match kind {
        Kind::Mapped => record::check_stamps(&content, acked.parse()?, exact)?,
        Kind::Buffered | Kind::Direct => record::check_ring(&content, acked.parse()?, exact)?,
    };
    println!("{newest}");
    Ok(())
}

fn dirty(file: &Path, mib: &str) -> Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::create(file)?;
    let chunk = vec![0x5a; 1 << 20];
    for _ in 0..mib.parse::<u32>()? {
        file.write_all(&chunk)?;
    }
    Ok(())
}
