//! Figures: the hit path against qemu-storage-daemon, what long chains cost, how long a cut holds requests, what backups
//! take, how long a guest stands frozen.
//!
//! ```text
//! bench [--json FILE] [--only hits|chains|disk|queues|cuts|nbd|backup|frozen]
//! ```
//! Everything that is compared is measured in turns, so that what else the machine does meets both. Files are in
//! memory (`/dev/shm`) if there is room: the cost of the servers, not that of a disk.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use comfy_table::{Table, presets::NOTHING};
use frazil_integration::{Context, Error, Result};
use serde_json::{Map, Value};

mod backups;
mod chains;
mod cuts;
mod disk;
mod frozen;
mod hits;
mod nbd;
mod peer;
mod queues;
mod server;

/// A figure's table, for people and for programs.
type Tables = (Table, Value);

/// Measures one part, with its files in this folder.
type Part = fn(&Path) -> Result<Tables>;

/// Bytes that the images of a part need at most.
const ROOM: u64 = 4 << 30;

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<()> {
    let (mut json, mut only) = (None, None);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| Error::new(format!("{word} needs a value")))?;
        match word.as_str() {
            "--json" => json = Some(PathBuf::from(value)),
            "--only" => only = Some(value),
            _ => return Err(Error::new(format!("unknown option {word}"))),
        }
    }
    let parts: [(&str, Part); 8] = [
        ("hits", hits::measure),
        ("chains", chains::measure),
        ("disk", disk::measure),
        ("queues", queues::measure),
        ("cuts", cuts::measure),
        ("nbd", nbd::measure),
        ("backup", backups::measure),
        ("frozen", frozen::measure),
    ];
    let (folder, mut all) = (folder(), Map::new());
    for (name, measure) in parts {
        if only.as_deref().is_none_or(|only| only == name) {
            let (table, figures) = measure(&folder)?;
            println!("{table}\n");
            all.insert(name.to_owned(), figures);
        }
    }
    match json {
        Some(path) => {
            std::fs::write(&path, serde_json::to_string_pretty(&Value::Object(all))?).context(path.display())
        }
        None => Ok(()),
    }
}

fn folder() -> PathBuf {
    let memory = Path::new("/dev/shm");
    match rustix::fs::statvfs(memory) {
        Ok(found) if found.f_bavail * found.f_frsize >= ROOM => memory.to_path_buf(),
        _ => std::env::temp_dir(),
    }
}

fn say(what: &str) {
    eprintln!("bench: {what}");
}

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header);
    table
}

/// The middle one of some figures.
fn median(figures: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = figures.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The largest one.
fn largest(figures: impl IntoIterator<Item = f64>) -> f64 {
    figures.into_iter().fold(f64::NAN, f64::max)
}
