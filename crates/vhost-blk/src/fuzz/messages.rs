//! A front-end that says anything, cut anywhere, with descriptors or without.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use block::RawDisk;
use block::testing::{Input, MemStorage};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::allowance::Allowance;
use crate::config::MAX_QUEUE_SIZE;
use crate::device::Device;
use crate::inspect::Inspector;
use crate::relay::{self, Message, Verdict};
use crate::server::DeviceConfig;

/// Queues of the device.
const QUEUES: u16 = 2;
/// Pieces that one front-end sends; they are in its socket before the first is read.
const MAX_PIECES: usize = 64;
/// Bytes of a header.
const HEADER: usize = 12;
/// Bytes of each file of memory.
const FILE: u64 = 16 << 10;

/// What a descriptor is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Memory,
    Event,
    Socket,
    Device,
}

impl Kind {
    fn open(self) -> OwnedFd {
        match self {
            Self::Memory => {
                let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
                ftruncate(&file, FILE).unwrap();
                file
            }
            Self::Event => eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
            Self::Socket => UnixStream::pair().unwrap().0.into(),
            Self::Device => File::open("/dev/null").unwrap().into(),
        }
    }
}

/// Bytes that are sent at once, with descriptors.
struct Piece<'a> {
    bytes: &'a [u8],
    kinds: Vec<Kind>,
}

/// What goes on, and what is answered: bytes, and how many descriptors.
#[derive(Debug, Default, Eq, PartialEq)]
struct Talk {
    forwarded: Vec<(Vec<u8>, usize)>,
    answered: Vec<(Vec<u8>, usize)>,
}

/// What should come of a front-end's messages.
#[derive(Default)]
struct Model {
    features: u64,
    talk: Talk,
}

impl Model {
    /// Reads all that is sent; `None` if that ends the session other than at the end of a message.
    fn run(&mut self, pieces: &[Piece<'_>]) -> Option<()> {
        let bytes: Vec<u8> = pieces.iter().flat_map(|piece| piece.bytes).copied().collect();
        let starts = pieces.iter().scan(0, |at, piece| Some(std::mem::replace(at, *at + piece.bytes.len())));
        let sent: Vec<_> = starts.zip(pieces).collect();
        let mut at = 0;
        while at < bytes.len() {
            let header = bytes.get(at..at + HEADER)?;
            let size = word(header, 8) as usize;
            let end = at + HEADER + size;
            let message = bytes.get(at..end).filter(|_| size <= 4096)?;
            let inside = sent.iter().filter(|(start, _)| (at..end).contains(start));
            let kinds: Vec<Kind> = inside.flat_map(|(_, piece)| &piece.kinds).copied().collect();
            if kinds.len() > 32 {
                return None;
            }
            self.message(message, &kinds)?;
            at = end;
        }
        Some(())
    }

    fn message(&mut self, message: &[u8], kinds: &[Kind]) -> Option<()> {
        let (header, payload) = message.split_at(HEADER);
        let all = |kind: Kind| kinds.iter().all(|found| *found == kind).then_some(());
        match word(header, 0) {
            5 | 37 => {
                all(Kind::Memory)?;
                let regions = payload.get(8..).unwrap_or_default().chunks_exact(32);
                let sound = |region: &[u8]| {
                    long(region, 8).checked_add(long(region, 24)).is_some_and(|end| end <= FILE)
                };
                kinds.iter().zip(regions).all(|(_, region)| sound(region)).then_some(())?;
            }
            6 => {
                (self.features & 2 != 0 && kinds == [Kind::Memory] && payload.len() == 16).then_some(())?;
                let (size, offset) = (long(payload, 0), long(payload, 8));
                let fits = size > 0 && offset.is_multiple_of(4096) && size.checked_add(offset)? <= FILE;
                fits.then(|| self.answer(6, payload, 0))?;
                return Some(());
            }
            7 => {
                all(Kind::Event)?;
                self.acknowledge(header);
                return Some(());
            }
            12..=14 => all(Kind::Event)?,
            16 => self.features = if payload.len() == 8 { long(payload, 0) } else { 0 },
            21 => all(Kind::Socket)?,
            31 => {
                let (queues, queue_size) = self.shape(payload)?;
                kinds.is_empty().then_some(())?;
                let size = (16 + 16 * u64::from(queue_size)).next_multiple_of(64) * u64::from(queues) + 64;
                let mut told = [size, 0].map(u64::to_ne_bytes).concat();
                told.extend([queues, queue_size].map(u16::to_ne_bytes).concat());
                told.resize(payload.len(), 0);
                self.answer(31, &told, 1);
                return Some(());
            }
            32 => {
                let (queues, queue_size) = self.shape(payload)?;
                (kinds == [Kind::Memory]).then_some(())?;
                let (size, offset) = (long(payload, 0), long(payload, 8));
                let least = (16 + 16 * u64::from(queue_size)).next_multiple_of(64) * u64::from(queues);
                let fits = size >= least && offset.is_multiple_of(4096);
                (fits && size.checked_add(offset)? <= FILE).then_some(())?;
                self.acknowledge(header);
                return Some(());
            }
            _ => {}
        }
        self.talk.forwarded.push((message.to_vec(), kinds.len()));
        Some(())
    }

    /// Queues and entries of an in-flight record, if it was negotiated and can be.
    fn shape(&self, payload: &[u8]) -> Option<(u16, u16)> {
        let negotiated = self.features & 1 << 12 != 0;
        let known = negotiated && (20..=24).contains(&payload.len());
        let short = |at: usize| u16::from_ne_bytes(payload[at..at + 2].try_into().unwrap());
        let (queues, queue_size) = known.then(|| (short(16), short(18)))?;
        let fits = (1..=QUEUES).contains(&queues) && (1..=MAX_QUEUE_SIZE).contains(&queue_size);
        fits.then_some((queues, queue_size))
    }

    /// Answers a message that asks for it, where REPLY_ACK was agreed upon.
    fn acknowledge(&mut self, header: &[u8]) {
        if word(header, 4) & 8 != 0 && self.features & 8 != 0 {
            self.answer(word(header, 0), &[0; 8], 0);
        }
    }

    fn answer(&mut self, request: u32, payload: &[u8], fds: usize) {
        let mut answer = [request, 1 | 4, payload.len() as u32].map(u32::to_ne_bytes).concat();
        answer.extend(payload);
        self.talk.answered.push((answer, fds));
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Made once: what a session leaves behind in it says nothing to the next one here.
fn device() -> Device {
    let disk = Arc::new(RawDisk::new(Arc::new(MemStorage::new(4096)), false).unwrap());
    let config = DeviceConfig {
        name: "fuzzed".to_owned(),
        socket: "/nowhere".into(),
        serial: String::new(),
        queues: QUEUES,
        disk,
        gate: Arc::default(),
        pulse: Arc::default(),
        parking: Arc::default(),
        allowance: Allowance::share(1),
        on_failure: Arc::new(|_| {}),
        on_session: Box::new(|_| {}),
    };
    Device::new(&config, &Arc::default(), &Arc::default()).unwrap()
}

/// Each message goes on as it is, is answered, or ends the session, as a plain reading of the specification has it, however
/// the bytes are cut; and descriptors go with the message with which they came.
pub fn vhost_user_messages(data: &[u8]) {
    thread_local!(static DEVICE: Device = device());
    let pieces = pieces(Input(data));
    let mut model = Model::default();
    let ends_well = model.run(&pieces).is_some();
    let (front, outer) = UnixStream::pair().unwrap();
    let (framework, inner) = UnixStream::pair().unwrap();
    for Piece { bytes, kinds } in &pieces {
        let fds = kinds.iter().map(|kind| kind.open()).collect();
        Message { bytes: bytes.to_vec(), fds }.send(front.as_fd()).unwrap();
    }
    front.shutdown(std::net::Shutdown::Write).unwrap();
    let ended = DEVICE.with(|device| relayed(device, &front, outer, &framework, inner));
    assert_eq!(ended.0, model.talk);
    assert_eq!(ended.1.is_ok(), ends_well, "{:?}", ended.1);
}

/// Takes the bytes apart: how many to send at once, and with which descriptors.
fn pieces(mut input: Input<'_>) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    while !input.is_empty() && pieces.len() < MAX_PIECES {
        let how = input.byte();
        let len = if how & 0x80 != 0 { input.number(2) as usize % 5000 } else { usize::from(input.byte()) };
        let kinds = [Kind::Memory, Kind::Event, Kind::Socket, Kind::Device];
        let kinds = vec![kinds[usize::from(how & 3)]; [0, 0, 1, 2, 3, 4, 8, 31][usize::from(how >> 2 & 7)]];
        let bytes = input.bytes(len);
        if !bytes.is_empty() {
            pieces.push(Piece { bytes, kinds });
        }
    }
    pieces
}

/// Passes messages on to nobody but who looks at what came, after each: nothing waits in a socket.
fn relayed(
    device: &Device,
    front: &UnixStream,
    outer: UnixStream,
    framework: &UnixStream,
    inner: UnixStream,
) -> (Talk, io::Result<()>) {
    let mut talk = Talk::default();
    let keep = |_: OwnedFd| {};
    let mut inspector = Inspector::new(device, &keep);
    let never = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let ended = relay::run(&outer, &inner, never.as_fd(), |message| {
        let verdict = inspector.inspect(message);
        match &verdict {
            Ok(Verdict::Forward(message)) => {
                talk.forwarded.push((message.bytes.clone(), message.fds.len()));
            }
            Ok(Verdict::Answer(Some(message))) => {
                talk.answered.push((message.bytes.clone(), message.fds.len()));
            }
            _ => {}
        }
        drain(front);
        drain(framework);
        verdict
    });
    device.maps().renounce();
    let _ = device.maps().prune();
    (talk, ended)
}

fn drain(mut socket: &UnixStream) {
    socket.set_nonblocking(true).unwrap();
    let mut bytes = [0; 8192];
    while socket.read(&mut bytes).is_ok_and(|count| count > 0) {}
}
