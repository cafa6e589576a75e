use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Asks every 20 ms until `probe` has an answer; an error when `limit` has passed.
///
/// Every wait of the harness ends: either here, or in a socket's read timeout.
pub fn eventually<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        if start.elapsed() >= limit {
            return Err(Error::new(format!("{what}: not within {} s", limit.as_secs_f64())));
        }
        thread::sleep(Duration::from_millis(20));
    }
}
