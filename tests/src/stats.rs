//! Figures of processes and of latencies.

use std::io;
use std::time::Duration;

/// The descriptors that this process has open.
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// The threads of this process.
pub fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// The processor time that a process has used so far.
#[derive(Clone, Copy, Debug)]
pub struct ProcessTime(Duration);

impl ProcessTime {
    /// Of process `pid`, from `/proc/PID/stat` (fields 14 and 15, in hundredths of a second).
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name, field 2, may hold anything; what follows its last parenthesis is field 3.
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks: u64 =
            fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Ok(Self(Duration::from_millis(ticks * 10)))
    }

    /// What was used since `earlier`.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// The value below which `percent` of the sorted values lie.
pub fn percentile(sorted: &[u32], percent: f64) -> u32 {
    let index = (sorted.len() as f64 * percent / 100.0) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_few_and_none() {
        assert_eq!(percentile(&[], 50.0), 0);
        assert_eq!(percentile(&[7], 99.0), 7);
        assert_eq!(percentile(&(0..100).collect::<Vec<_>>(), 99.0), 99);
    }

    #[test]
    fn own_time_grows() {
        let before = ProcessTime::of(std::process::id()).unwrap();
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(60) {}
        let used = ProcessTime::of(std::process::id()).unwrap().since(before);
        assert!(used >= Duration::from_millis(20), "{used:?}");
    }
}
