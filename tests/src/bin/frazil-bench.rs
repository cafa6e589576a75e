//! Random I/O on any vhost-user-blk socket, from a driver that polls: the device's own cost, without a guest's.
//!
//! ```text
//! frazil-bench --socket SOCK --rw randread|randwrite [--bs 4096] [--iodepth 32] [--seconds 5] [--pid PID]
//! ```
//! Prints one JSON object. `--pid` is the process that serves the socket; its processor time is divided by the requests.

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use frazil_tests::Load;

struct Options {
    socket: PathBuf,
    load: Load,
    seconds: u64,
    pid: Option<u32>,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let load = Load { write: false, block: 4096, depth: 32 };
    let mut found = Options { socket: PathBuf::new(), load, seconds: 5, pid: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--socket" => found.socket = value.into(),
            "--rw" => found.load.write = value == "randwrite",
            "--bs" => found.load.block = value.parse()?,
            "--iodepth" => found.load.depth = value.parse()?,
            "--seconds" => found.seconds = value.parse()?,
            "--pid" => found.pid = Some(value.parse()?),
            _ => return Err(format!("unknown option {word}").into()),
        }
    }
    let Load { block, depth, .. } = found.load;
    if depth == 0 || depth > 80 || block == 0 || !block.is_multiple_of(512) {
        return Err("--iodepth is 1 to 80, --bs a multiple of 512".into());
    }
    Ok(found)
}

fn main() -> Result<(), Box<dyn Error>> {
    let Options { socket, load, seconds, pid } = options()?;
    let end = Instant::now() + Duration::from_secs(seconds);
    let measured = load.random(&socket, pid, || Instant::now() < end)?;
    println!(
        "{{\"iops\": {:.0}, \"p50_us\": {}, \"p99_us\": {}, \"requests\": {}, \"cpu_us_per_request\": {:.2}}}",
        measured.iops, measured.p50_us, measured.p99_us, measured.requests, measured.cpu_us,
    );
    Ok(())
}
