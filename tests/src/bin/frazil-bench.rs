//! Random I/O on any vhost-user-blk socket, from a driver that polls: the device's own cost, without a guest's.
//!
//! ```text
//! frazil-bench --socket SOCK --rw randread|randwrite [--bs 4096] [--iodepth 32] [--seconds 5] [--pid PID]
//! ```
//! Prints one JSON object. `--pid` is the process that serves the socket; its processor time is divided by the requests.

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use frazil_tests::{Driver, ProcessTime, Request, percentile};

struct Options {
    socket: PathBuf,
    write: bool,
    block: usize,
    depth: usize,
    seconds: u64,
    pid: Option<u32>,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut found =
        Options { socket: PathBuf::new(), write: false, block: 4096, depth: 32, seconds: 5, pid: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--socket" => found.socket = value.into(),
            "--rw" => found.write = matches!(value.as_str(), "randwrite"),
            "--bs" => found.block = value.parse()?,
            "--iodepth" => found.depth = value.parse()?,
            "--seconds" => found.seconds = value.parse()?,
            "--pid" => found.pid = Some(value.parse()?),
            _ => return Err(format!("unknown option {word}").into()),
        }
    }
    if found.depth == 0 || found.depth > 80 || found.block == 0 || !found.block.is_multiple_of(512) {
        return Err("--iodepth is 1 to 80, --bs a multiple of 512".into());
    }
    Ok(found)
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    let mut driver = Driver::connect(&options.socket, 1, options.depth, options.block)?;
    let blocks = driver.capacity()? / options.block as u64;
    let queue = driver.queues.first_mut().ok_or("no queue")?;
    queue.set_polling(true);
    let cpu = |pid: Option<u32>| pid.map(ProcessTime::of).transpose();
    let (before, start) = (cpu(options.pid)?, Instant::now());
    let end = start + Duration::from_secs(options.seconds);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut started = vec![start; options.depth];
    let (mut free, mut back): (Vec<usize>, Vec<_>) = ((0..options.depth).collect(), Vec::new());
    let mut latencies = Vec::new();
    loop {
        let now = Instant::now();
        if now >= end && queue.in_flight() == 0 {
            break;
        }
        let any = !free.is_empty() && now < end;
        for index in free.drain(..if any { free.len() } else { 0 }) {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let offset = seed % blocks * options.block as u64;
            queue.queue(index, if options.write { Request::Write(offset) } else { Request::Read(offset) })?;
            started[index] = now;
        }
        if any {
            queue.kick()?;
        }
        queue.poll(&mut back);
        let now = Instant::now();
        for (index, status) in back.drain(..) {
            if status != 0 {
                return Err(
                    format!("a request failed: {}", std::io::Error::from_raw_os_error(-status)).into()
                );
            }
            latencies.push((now - started[index]).as_micros() as u32);
            free.push(index);
        }
        if free.is_empty() {
            // On a machine with few processors the device needs ours.
            std::thread::yield_now();
        }
    }
    let (elapsed, after) = (start.elapsed(), cpu(options.pid)?);
    latencies.sort_unstable();
    let count = latencies.len().max(1) as f64;
    let cpu = before.zip(after).map(|(before, after)| after.since(before).as_secs_f64() * 1e6 / count);
    println!(
        "{{\"iops\": {:.0}, \"p50_us\": {}, \"p99_us\": {}, \"requests\": {}, \"cpu_us_per_request\": {}}}",
        count / elapsed.as_secs_f64(),
        percentile(&latencies, 50.0),
        percentile(&latencies, 99.0),
        latencies.len(),
        cpu.map_or("null".to_owned(), |us| format!("{us:.2}")),
    );
    Ok(())
}
