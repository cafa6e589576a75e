//! Front-ends of ill will: whatever they send, the daemon lives, other disks are served, and nothing of it is left.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use frazil_tests::{Driver, FrontEnd, ProcessTime, Request, kilobytes, open_files, threads};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::served::{MIB, Served, wait_until};
use super::wire::{NEED_REPLY, PLAIN, Wire};

const SOON: Duration = Duration::from_secs(10);

pub(super) fn memory(len: u64) -> OwnedFd {
    let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file.into()
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Descriptors of each kind that is neither memory nor an event.
fn odd() -> Vec<OwnedFd> {
    let (socket, _) = UnixStream::pair().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let files =
        ["/dev/zero", "/dev/null", "/", "/proc/self/maps"].map(|path| File::open(path).unwrap().into());
    [socket.into(), reader.into(), writer.into(), epoll].into_iter().chain(files).collect()
}

/// A memory table: count, padding, then guest address, size, user address and offset of each.
pub(super) fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let head = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
    regions.iter().fold(head, |all, region| [all, region.map(u64::to_ne_bytes).concat()].concat())
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.map(u32::to_ne_bytes).concat()
}

/// More memory than this is not taken by chance: threads that come and go have some each.
const SOME: u64 = 32 << 20;

/// Bytes of memory of this process, and how many pieces of others' files are in its addresses.
fn memory_in_use() -> (u64, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (
        kilobytes(std::process::id(), "VmRSS").unwrap() << 10,
        maps.lines().filter(|line| line.contains("/memfd:")).count(),
    )
}

/// What is the same before and after, once sessions have let go: descriptors, threads, and what is mapped of front-ends'
/// memory. Nothing is busy then.
pub(super) struct Before(usize, usize, (u64, usize));

impl Before {
    pub(super) fn new(served: &Served) -> Self {
        // Whatever is made once has been.
        Wire::negotiated(&served.socket);
        served.wait_sessions(1);
        std::thread::sleep(Duration::from_millis(100));
        Self(open_files(), threads(), memory_in_use())
    }

    pub(super) fn check(&self, served: &Served) {
        wait_until("files to be closed and threads to end", || open_files() <= self.0 && threads() <= self.1);
        wait_until("memory to be let go", || memory_in_use().1 <= self.2.1);
        wait_until("memory to be given back", || memory_in_use().0 < self.2.0 + SOME);
        // Other tests may be at work in this process.
        wait_until("the processor to have nothing to do", || {
            let begun = ProcessTime::of(std::process::id()).unwrap();
            std::thread::sleep(Duration::from_millis(200));
            ProcessTime::of(std::process::id()).unwrap().since(begun) < Duration::from_millis(50)
        });
        let mut driver = Driver::connect(&served.socket, 1, 1, 4096).unwrap();
        assert_eq!(driver.queues[0].ask(Request::Read(0)), 0);
    }
}

#[test]
fn descriptors_of_odd_kinds_end_the_session() {
    let (served, _) = Served::memory(MIB, 1);
    let before = Before::new(&served);
    let mut sessions = 1;
    let region = table(&[[0, 4096, 0, 0]]);
    let single = [0_u64, 0, 4096, 0x1000, 0].map(u64::to_ne_bytes).concat();
    let number = 0_u64.to_ne_bytes().to_vec();
    let messages: [(u32, &Vec<u8>); 6] =
        [(5, &region), (37, &single), (12, &number), (13, &number), (14, &number), (32, &region)];
    for (request, payload) in messages {
        for fd in odd() {
            let wire = Wire::negotiated(&served.socket);
            wire.send(request, NEED_REPLY, payload, &[&fd]).unwrap();
            assert!(wire.has_ended(), "request {request} with {fd:?}");
            sessions += 1;
            served.wait_sessions(sessions);
        }
    }
    before.check(&served);
}

#[test]
fn memory_tables_that_make_no_sense_end_the_session() {
    let (served, _) = Served::memory(MIB, 1);
    const PAGE: u64 = 4096;
    let file = memory(8 * PAGE);
    let before = Before::new(&served);
    let tables: [&[[u64; 4]]; 9] = [
        &[[0, 2 * PAGE, 0, 0], [PAGE, 2 * PAGE, 4 * PAGE, 0]],
        &[[0, PAGE, 0, 0], [0, PAGE, 0, 0]],
        &[[0, 0, 0, 0]],
        &[[0, 64 * PAGE, 0, 0]],
        &[[0, PAGE, 0, 64 * PAGE]],
        &[[0, PAGE, 0, 5]],
        &[[u64::MAX - 100, PAGE, 0, 0]],
        &[[0, PAGE, u64::MAX - 100, 0]],
        &[[0, u64::MAX, 0, 0]],
    ];
    let mut sessions = 1;
    for regions in tables {
        let wire = Wire::negotiated(&served.socket);
        wire.send(5, PLAIN, &table(regions), &vec![&file; regions.len()]).unwrap();
        // With an answer, so that what was not refused is seen.
        wire.send(1, PLAIN, &[], &[]).unwrap();
        assert!(wire.has_ended(), "{regions:x?}");
        sessions += 1;
        served.wait_sessions(sessions);
    }
    for (regions, fds) in [(1, 0), (2, 1), (1, 2), (9, 9), (0, 1)] {
        let wire = Wire::negotiated(&served.socket);
        let regions: Vec<_> = (0..regions).map(|index| [index * PAGE, PAGE, index * PAGE, 0]).collect();
        wire.send(5, PLAIN, &table(&regions), &vec![&file; fds]).unwrap();
        wire.send(1, PLAIN, &[], &[]).unwrap();
        if (regions.len(), fds) != (9, 9) {
            assert!(wire.has_ended(), "{} regions with {fds} descriptors", regions.len());
        }
        drop(wire);
        sessions += 1;
        served.wait_sessions(sessions);
    }
    before.check(&served);
}

/// A part of such a page is mapped as the whole, and could then not be given back.
#[test]
fn pieces_of_huge_pages_end_the_session() {
    const HUGE: u64 = 2 << 20;
    let (served, _) = Served::memory(MIB, 1);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(memfd_create("huge", flags).unwrap());
    file.set_len(2 * HUGE).unwrap();
    let file = OwnedFd::from(file);
    let before = Before::new(&served);
    for (session, (size, ends)) in
        [(HUGE + HUGE / 2, true), (4096, true), (2 * HUGE, false)].into_iter().enumerate()
    {
        let wire = Wire::negotiated(&served.socket);
        wire.send(5, PLAIN, &table(&[[0, size, 0, 0]]), &[&file]).unwrap();
        wire.send(1, PLAIN, &[], &[]).unwrap();
        assert_eq!(wire.answer().is_err(), ends, "{size} bytes");
        drop(wire);
        served.wait_sessions(session + 2);
    }
    before.check(&served);
}

#[test]
fn messages_cut_short_end_with_the_connection() {
    let (served, _) = Served::memory(MIB, 1);
    let (file, mut sessions) = (memory(4096), 1);
    let before = Before::new(&served);
    let whole = [words([5, PLAIN, 40]), table(&[[0, 4096, 0, 0]])].concat();
    for len in 1..whole.len() {
        let wire = Wire::negotiated(&served.socket);
        wire.send_bytes(&whole[..len], &[&file]).unwrap();
        drop(wire);
        sessions += 1;
        served.wait_sessions(sessions);
    }
    before.check(&served);
}

/// The worker would have waited for somebody to look at the call, and everybody for the worker.
#[test]
fn a_call_that_is_never_looked_at_holds_up_nothing() {
    let (served, _) = Served::memory(MIB, 1);
    let before = Before::new(&served);
    let full = |flags| {
        let event = EventFd::new(flags).unwrap();
        event.write(u64::MAX - 1).unwrap();
        event
    };
    // One that says that it would wait, one that says so only after it was looked at.
    for (round, late) in [false, true].into_iter().enumerate() {
        let call = full(if late { EFD_NONBLOCK } else { 0 });
        let mut front_end = FrontEnd::connect(&served.socket, 1, 0).unwrap();
        front_end.set_memory(2).unwrap();
        front_end.start(0).unwrap();
        front_end.messages().set_vring_call(0, &call).unwrap();
        // Every message before it has been dealt with.
        front_end.messages().get_features().unwrap();
        if late {
            set_waiting(&call);
        }
        front_end.header(FrontEnd::DATA, 4, 0);
        let chain = [(FrontEnd::DATA, 16, FrontEnd::NEXT, 1), (FrontEnd::DATA + 16, 1, FrontEnd::WRITE, 0)];
        front_end.descriptors(0, 0, &chain);
        // A front-end that fools us so waits for itself, as long as it stays: from the answer on, or even before it.
        if late {
            front_end.offer(0, 0);
            front_end.used(0, Duration::from_millis(100));
        } else {
            for _ in 0..3 {
                front_end.offer(0, 0);
                assert_eq!(front_end.used(0, SOON), Some((0, 1)));
            }
            front_end.stop(0).unwrap();
        }
        drop(front_end);
        served.wait_sessions(round + 2);
    }
    before.check(&served);
}

/// Clears the flag that all copies of a descriptor share.
fn set_waiting(event: &EventFd) {
    let process = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let copy = pidfd_getfd(process, event.as_raw_fd(), PidfdGetfdFlags::empty()).unwrap();
    fcntl_setfl(&copy, fcntl_getfl(&copy).unwrap() - OFlags::NONBLOCK).unwrap();
}

/// Messages in any order, with payloads and descriptors that sometimes make sense; `FRAZIL_FUZZ` says how many.
#[test]
fn random_messages_never_harm() {
    let count: usize = std::env::var("FRAZIL_FUZZ").ok().and_then(|count| count.parse().ok()).unwrap_or(3000);
    let (served, _) = Served::memory(MIB, 4);
    let (other, _) = Served::memory(MIB, 1);
    let mut neighbour = Driver::connect(&other.socket, 1, 1, 4096).unwrap();
    let before = Before::new(&served);
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut sent, mut sessions) = (0, 1);
    while sent < count {
        let wire = if random.below(4) == 0 {
            Wire::connect(&served.socket)
        } else {
            Wire::negotiated(&served.socket)
        };
        wire.0.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        for _ in 0..random.below(40) {
            sent += 1;
            if random.message(&wire).is_err() {
                break;
            }
            let _ = wire.answer();
        }
        drop(wire);
        sessions += 1;
        served.wait_sessions(sessions);
        assert_eq!(neighbour.queues[0].ask(Request::Read(0)), 0);
    }
    drop(neighbour);
    before.check(&served);
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64*, by Vigna.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn pick(&mut self, from: &[u64]) -> u64 {
        from[self.below(from.len() as u64) as usize]
    }

    /// A number of those that stand near an edge, or any.
    fn number(&mut self) -> u64 {
        let any = self.next();
        self.pick(&[0, 1, 2, 3, 63, 64, 255, 256, 4095, 4096, 8192, 0x10000, 1 << 32, u64::MAX, any])
    }

    fn message(&mut self, wire: &Wire) -> std::io::Result<()> {
        let request =
            self.pick(&[1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 25, 31, 32, 36, 37, 38]);
        let request = if self.below(20) == 0 { self.number() } else { request };
        let payload = self.payload(request);
        let fds: Vec<OwnedFd> = match request {
            5 | 32 | 37 => (0..self.below(3)).map(|_| self.memory()).collect(),
            12..=14 if self.below(4) != 0 => vec![event()],
            _ if self.below(10) == 0 => vec![self.memory(), event()],
            _ => Vec::new(),
        };
        let flags = self.pick(&[1, 1, 1, 9, 9, 5, 0, u64::MAX]) as u32;
        wire.send(request as u32, flags, &payload, &fds.iter().collect::<Vec<_>>())
    }

    fn memory(&mut self) -> OwnedFd {
        let len = self.pick(&[0, 4096, 65536, 1 << 20]);
        memory(len)
    }

    fn payload(&mut self, request: u64) -> Vec<u8> {
        let mut payload = match request {
            5 => {
                let region = |random: &mut Self| {
                    let size = random.pick(&[0, 4096, 65536, u64::MAX]);
                    [random.number(), size, random.number(), random.pick(&[0, 4096, 1])]
                };
                let regions: Vec<_> = (0..self.below(3)).map(|_| region(self)).collect();
                table(&regions)
            }
            8 | 10 | 11 | 18 => words([self.number() as u32 % 6, self.number() as u32 % 1100]),
            31 | 32 => {
                let size = self.pick(&[0, 4096, 5000, u64::MAX]);
                let shape = self.pick(&[1 | 64 << 16, 4 | 128 << 16, 4 | 1024 << 16, 0, u64::MAX]);
                [size, self.pick(&[0, 4096, 3]), shape].map(u64::to_ne_bytes).concat()
            }
            24 | 25 => [words([self.number() as u32, self.number() as u32 % 300, 0]), vec![0; 60]].concat(),
            1 | 3 | 4 | 15 | 17 | 36 => Vec::new(),
            9 => (0..5).flat_map(|_| self.number().to_ne_bytes()).collect(),
            37 | 38 => {
                [0, self.number(), self.pick(&[4096, 65536]), self.number(), 0].map(u64::to_ne_bytes).concat()
            }
            _ => self.number().to_ne_bytes().to_vec(),
        };
        if self.below(8) == 0 {
            payload.truncate(self.below(payload.len() as u64 + 1) as usize);
        }
        payload
    }
}
