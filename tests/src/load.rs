//! Load: requests kept in flight by a driver that polls, and what they took.

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use block::testing::Random;

use crate::{Driver, DriverQueue, ProcessTime, Request, percentile};

/// The same numbers in every run.
const SEED: u64 = 0x2545_f491_4f6c_dd1d;

/// What a load is like.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Writes, or reads.
    pub write: bool,
    /// Bytes of a request.
    pub block: usize,
    /// Requests kept in flight.
    pub depth: usize,
}

/// What a load took.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Requests done.
    pub requests: usize,
    /// Requests a second.
    pub iops: f64,
    /// The server's processor time a request, in microseconds; zero if the server is not known.
    pub cpu_us: f64,
    /// Half of the requests were back within so many microseconds.
    pub p50_us: u32,
    /// 99 % of them.
    pub p99_us: u32,
    /// 99.9 % of them.
    pub p999_us: u32,
    /// All of them.
    pub max_us: u32,
}

impl Load {
    /// Requests random blocks of a disk until `go_on` says no.
    ///
    /// `server` is the process whose time is counted.
    pub fn random(
        self,
        socket: &Path,
        server: Option<u32>,
        mut go_on: impl FnMut() -> bool,
    ) -> io::Result<Measured> {
        let mut driver = Driver::connect(socket, 1, self.depth, self.block)?;
        let (blocks, mut random) = (driver.capacity()? / self.block as u64, Random(SEED));
        let offsets = std::iter::from_fn(|| go_on().then(|| random.number() % blocks * self.block as u64));
        self.measure(&mut driver, server, offsets)
    }

    /// As [`random`](Self::random), on several queues at once, each with a thread of its own and `depth` requests in flight,
    /// until `end`.
    pub fn spread(
        self,
        socket: &Path,
        server: Option<u32>,
        queues: usize,
        end: Instant,
    ) -> io::Result<Measured> {
        let mut driver = Driver::connect(socket, queues, self.depth, self.block)?;
        let blocks = driver.capacity()? / self.block as u64;
        let run = |number: usize, queue: &mut DriverQueue| {
            // Each queue has numbers of its own.
            let mut random = Random(SEED.wrapping_add(number as u64));
            let offsets = std::iter::from_fn(|| {
                (Instant::now() < end).then(|| random.number() % blocks * self.block as u64)
            });
            drive(queue, self.depth, self.requests(offsets))
        };
        let (before, start) = (cpu(server)?, Instant::now());
        let latencies = thread::scope(|scope| {
            let threads: Vec<_> = driver
                .queues
                .iter_mut()
                .enumerate()
                .map(|(number, queue)| scope.spawn(move || run(number, queue)))
                .collect();
            let ended = threads.into_iter().map(|thread| thread.join().map_err(|_| io::ErrorKind::Other)?);
            ended.collect::<io::Result<Vec<_>>>()
        })?;
        Ok(Measured::of(latencies.concat(), start.elapsed(), before.zip(cpu(server)?)))
    }

    /// Requests the first block of each `stride` bytes of a disk, each once, in a random order.
    pub fn once(self, socket: &Path, server: Option<u32>, stride: u64) -> io::Result<Measured> {
        self.once_within(socket, server, stride, u64::MAX)
    }

    /// The same of the first `bytes` of the disk only.
    pub fn once_within(
        self,
        socket: &Path,
        server: Option<u32>,
        stride: u64,
        bytes: u64,
    ) -> io::Result<Measured> {
        let mut driver = Driver::connect(socket, 1, self.depth, self.block)?;
        let count = driver.capacity()?.min(bytes) / stride;
        let mut offsets: Vec<u64> = (0..count).map(|index| index * stride).collect();
        let mut random = Random(SEED);
        for left in (1..offsets.len()).rev() {
            offsets.swap(left, (random.number() % (left as u64 + 1)) as usize);
        }
        self.measure(&mut driver, server, offsets.into_iter())
    }

    fn measure(
        self,
        driver: &mut Driver,
        server: Option<u32>,
        offsets: impl Iterator<Item = u64>,
    ) -> io::Result<Measured> {
        let queue = driver.queues.first_mut().ok_or(io::ErrorKind::NotFound)?;
        let (before, start) = (cpu(server)?, Instant::now());
        let latencies = drive(queue, self.depth, self.requests(offsets))?;
        Ok(Measured::of(latencies, start.elapsed(), before.zip(cpu(server)?)))
    }

    fn requests(self, offsets: impl Iterator<Item = u64>) -> impl Iterator<Item = Request> {
        offsets.map(move |offset| if self.write { Request::Write(offset) } else { Request::Read(offset) })
    }
}

fn cpu(server: Option<u32>) -> io::Result<Option<ProcessTime>> {
    server.map(ProcessTime::of).transpose()
}

impl Measured {
    /// Of latencies in microseconds, and the server's processor time before and after.
    fn of(mut latencies: Vec<u32>, elapsed: Duration, cpu: Option<(ProcessTime, ProcessTime)>) -> Self {
        latencies.sort_unstable();
        let used = cpu.map_or(Duration::ZERO, |(before, after)| after.since(before));
        let count = latencies.len().max(1) as f64;
        Self {
            requests: latencies.len(),
            iops: count / elapsed.as_secs_f64(),
            cpu_us: used.as_secs_f64() * 1e6 / count,
            p50_us: percentile(&latencies, 50.0),
            p99_us: percentile(&latencies, 99.0),
            p999_us: percentile(&latencies, 99.9),
            max_us: percentile(&latencies, 100.0),
        }
    }
}

/// Keeps `depth` requests in flight until there are no more, and gives their latencies in microseconds.
fn drive(
    queue: &mut DriverQueue,
    depth: usize,
    mut requests: impl Iterator<Item = Request>,
) -> io::Result<Vec<u32>> {
    queue.set_polling(true);
    let mut started = vec![Instant::now(); depth];
    let (mut free, mut back): (Vec<usize>, Vec<_>) = ((0..depth).collect(), Vec::new());
    let (mut latencies, mut more) = (Vec::new(), true);
    while more || queue.in_flight() > 0 {
        let now = Instant::now();
        let before = queue.in_flight();
        while more && let Some(&index) = free.last() {
            let Some(request) = requests.next() else {
                more = false;
                break;
            };
            queue.queue(index, request)?;
            free.pop();
            if let Some(started) = started.get_mut(index) {
                *started = now;
            }
        }
        if queue.in_flight() > before {
            queue.kick()?;
        }
        queue.poll(&mut back);
        let now = Instant::now();
        for (index, status) in back.drain(..) {
            if status != 0 {
                return Err(io::Error::from_raw_os_error(-status));
            }
            let taken = started.get(index).map_or(Duration::ZERO, |&started| now - started);
            latencies.push(u32::try_from(taken.as_micros()).unwrap_or(u32::MAX));
            free.push(index);
        }
        if free.is_empty() {
            // On a machine with few processors the device needs ours.
            std::thread::yield_now();
        }
    }
    Ok(latencies)
}
