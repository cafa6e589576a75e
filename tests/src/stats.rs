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

/// Kilobytes of a process's memory, as the line `name` of its `/proc/PID/status` has it (`VmRSS`, `VmHWM`).
pub fn kilobytes(pid: u32, name: &str) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = rest.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("{name} is not told")))
}

/// The processor time that a process has used so far.
#[derive(Clone, Copy, Debug)]
pub struct ProcessTime(Duration);

impl ProcessTime {
    /// Of process `pid`: the sum over its threads, kernel's helpers included, of the nanoseconds in their `schedstat`
    /// (`/proc/PID/stat` counts in hundredths of a second). What threads used that have ended is not in it.
    pub fn of(pid: u32) -> io::Result<Self> {
        let mut used = Duration::ZERO;
        for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            // It may end between the two looks.
            let text = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
            let nanoseconds = text.split_whitespace().next().and_then(|first| first.parse().ok());
            used += Duration::from_nanos(nanoseconds.unwrap_or(0));
        }
        Ok(Self(used))
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

    /// However long it takes: on a busy machine this thread may hardly get any.
    #[test]
    fn own_time_grows() {
        let before = ProcessTime::of(std::process::id()).unwrap();
        let start = std::time::Instant::now();
        let used = || ProcessTime::of(std::process::id()).unwrap().since(before);
        while used() < Duration::from_millis(20) {
            assert!(start.elapsed() < Duration::from_secs(30), "{:?}", used());
        }
    }
}
