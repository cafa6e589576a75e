//! What the length of a chain costs: random reads over up to 500 layers, against a raw disk and against
//! qemu-storage-daemon over the same files; how long the chain takes to open, and what memory it takes.
//!
//! Two kinds of chains: of a busy disk, most of which is in crumbs of one block after 500 layers, and of a quiet one, most
//! of which is still in its base.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::testing::Random;
use block::{Disk, Storage, write_disk};
use comfy_table::Table;
use frazil_integration::{Context, Error, Process, Result, Scratch, program};
use frazil_tests::{Load, Measured};
use hostio::{Cache, HostFile};
use qcow2::{CreateOptions, Image as Qcow2, Journal, Mode, Parts};
use serde_json::{Value, json};

use crate::peer::{Image, Peer, Settings};
use crate::{Tables, median, say, table};

/// Rounds of all that is compared.
const ROUNDS: usize = 7;
const RUN: Duration = Duration::from_millis(500);
/// Before the first round one block in each of these is read, so that what is looked up once is known.
const LOOKED_UP: u64 = 2 << 20;
const LOAD: Load = Load { write: false, block: BLOCK as usize, depth: 32 };
const BLOCK: u64 = 4096;
pub(crate) const DISK_BYTES: u64 = 256 << 20;
/// Chains that are alike but for their length.
pub(crate) struct Kind {
    /// Blocks that each layer holds, in crumbs all over the disk.
    pub(crate) blocks: u64,
    /// Overlays above the raw base, and the memory that the daemon may use to know where the bytes are.
    pub(crate) chains: &'static [(usize, &'static str)],
    /// Overlays of those that the other one is asked for too; it takes too long over the others.
    pub(crate) peers: &'static [usize],
}

const KINDS: [Kind; 2] = [
    Kind {
        blocks: 128,
        chains: &[(0, "64M"), (1, "64M"), (20, "64M"), (100, "64M"), (500, "64M"), (500, "2M")],
        peers: &[0, 20, 100],
    },
    Kind { blocks: 8, chains: &[(20, "64M"), (100, "64M"), (500, "64M"), (500, "2M")], peers: &[20, 100] },
];

pub(crate) fn measure(folder: &Path) -> Result<Tables> {
    Scratch::with_in(folder, "chains", |scratch| {
        let base = scratch.path("base.raw");
        std::fs::write(&base, vec![0xa5; DISK_BYTES as usize]).context(base.display())?;
        let settings = Settings::best(scratch, &base)?;
        let raw = Ours::start(scratch, "raw", &base, "64M")?;
        let mut rows = Rows { table: header(), figures: Vec::new() };
        for kind in &KINDS {
            let images = kind.make_images(scratch, &base)?;
            for &(depth, cache) in kind.chains {
                let name = format!("{}-{depth}-{cache}", kind.blocks);
                let ours = Ours::start(scratch, &name, image(&images, depth)?, cache)?;
                let peer = match kind.peers.contains(&depth) {
                    true => {
                        let chain = images.get(..=depth).unwrap_or_default();
                        Some(Peer::start(scratch, settings, &base, &Image::Chain(chain))?)
                    }
                    false => None,
                };
                rows.compare((kind.blocks, depth, cache), &raw, &ours, peer.as_ref())?;
            }
        }
        Ok((rows.table, json!({ "qemu-storage-daemon": settings.name(), "rows": rows.figures })))
    })
}

fn image(images: &[PathBuf], depth: usize) -> Result<&Path> {
    images.get(depth).map(PathBuf::as_path).ok_or_else(|| Error::new("a chain that was not made"))
}

impl Kind {
    /// The base, and overlays above it that each have some blocks.
    pub(crate) fn make_images(&self, scratch: &Scratch, base: &Path) -> Result<Vec<PathBuf>> {
        let Self { blocks, chains, .. } = self;
        let journal = ["a", "b"]
            .map(|half| HostFile::create(&scratch.path(&format!("{blocks}.{half}")), Cache::Writeback));
        let [a, b] = journal.map(|half| half.map(|file| Arc::new(file) as Arc<dyn Storage>));
        let (a, b) = (a.map_err(failed)?, b.map_err(failed)?);
        let mut images = vec![base.to_owned()];
        let mut random = Random(1);
        for depth in 1..=chains.iter().map(|(depth, _)| *depth).max().unwrap_or(0) {
            let path = scratch.path(&format!("overlay-{blocks}-{depth:03}.qcow2"));
            let format = if depth == 1 { "raw" } else { "qcow2" };
            let beneath = images.last().map(|beneath| (beneath.display().to_string(), format.to_owned()));
            let fill = || -> block::Result<()> {
                let file = HostFile::create(&path, Cache::Writeback)?;
                qcow2::create(&file, &CreateOptions::overlay(DISK_BYTES, beneath))?;
                let journal = Journal::create(Arc::clone(&a), Arc::clone(&b), "none")?;
                let image = Qcow2::open(Parts::new(Arc::new(file), None), Mode::Writable(journal))?;
                for _ in 0..*blocks {
                    let offset = random.below(DISK_BYTES / BLOCK) * BLOCK;
                    write_disk(&image, offset, &[depth as u8; BLOCK as usize])?;
                }
                image.flush().run()
            };
            fill().map_err(failed)?;
            images.push(path);
        }
        Ok(images)
    }
}

fn failed(error: block::Error) -> Error {
    Error::new(error.to_string())
}

/// A daemon of ours that serves one image for reading. It is killed when it is dropped.
struct Ours {
    process: Process,
    socket: PathBuf,
    opened: Duration,
}

impl Ours {
    /// `name` is that of its state directory and its sockets.
    fn start(scratch: &Scratch, name: &str, image: &Path, cache: &str) -> Result<Self> {
        let path = |what: &str| scratch.path(&format!("{name}.{what}"));
        let (state, control, socket, log) = (path("state"), path("control"), path("sock"), path("log"));
        let format = if image.extension().is_some_and(|end| end == "raw") { "raw" } else { "qcow2" };
        let (at, image) = (socket.display(), image.display());
        let disk =
            format!("id=vda,path={image},format={format},socket={at},readonly=on,metadata-cache={cache}");
        let [state, control_at] = [&state, &control].map(|path| path.display().to_string());
        let words = ["serve", "--freeze", "never", "--freeze-owner", "none", "--disk", &disk];
        let words = words.into_iter().chain(["--state", &state, "--control", &control_at]);
        let begun = Instant::now();
        let mut process = Process::spawn(&program("frazil")?, words, log)?;
        // Not `eventually`, which looks too seldom to tell how long it took.
        while UnixStream::connect(&control).is_err() {
            process.check_alive()?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Self { process, socket, opened: begun.elapsed() })
    }

    fn run(&self) -> Result<Measured> {
        let end = Instant::now() + RUN;
        LOAD.random(&self.socket, Some(self.process.id()), || Instant::now() < end).context("frazil")
    }
}

const ANONYMOUS: &str = "RssAnon:";

/// Memory of a process, in MiB: a line of its `status`.
pub(crate) fn memory(process: &Process, what: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id()))?;
    let kib = status.lines().find_map(|line| line.strip_prefix(what)?.split_whitespace().next());
    let kib: Option<f64> = kib.and_then(|kib| kib.parse().ok());
    kib.map(|kib| kib / 1024.0).ok_or_else(|| Error::new("the kernel does not tell the memory of a process"))
}

fn header() -> Table {
    table([
        "BLOCKS EACH",
        "OVERLAYS",
        "CACHE",
        "",
        "IOPS",
        "P50 µs",
        "P99 µs",
        "CPU µs/REQ",
        "TO RAW",
        "OPENED ms",
        "MiB",
    ])
}

struct Rows {
    table: Table,
    figures: Vec<Value>,
}

impl Rows {
    /// Runs them all in turns. What they cost is told as a ratio to the raw disk in the same round.
    fn compare(
        &mut self,
        (blocks, depth, cache): (u64, usize, &str),
        raw: &Ours,
        ours: &Ours,
        peer: Option<&Peer>,
    ) -> Result<()> {
        let theirs = || -> Result<Option<Measured>> {
            let end = Instant::now() + RUN;
            peer.map(|peer| peer.run(LOAD, || Instant::now() < end)).transpose()
        };
        LOAD.once(&ours.socket, None, LOOKED_UP).context("frazil")?;
        theirs()?;
        let (mut of_ours, mut of_theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let base = raw.run()?.cpu_us;
            let run = ours.run()?;
            of_ours.push((run.cpu_us / base, run));
            of_theirs.extend(theirs()?.map(|run| (run.cpu_us / base, run)));
        }
        self.add((blocks, depth, cache, "frazil"), &of_ours, ours.opened, memory(&ours.process, ANONYMOUS)?);
        if let Some(peer) = peer {
            self.add(
                (blocks, depth, "", "qemu-storage-daemon"),
                &of_theirs,
                peer.opened(),
                memory(peer.process(), ANONYMOUS)?,
            );
        }
        Ok(())
    }

    fn add(
        &mut self,
        (blocks, depth, cache, server): (u64, usize, &str, &str),
        runs: &[(f64, Measured)],
        opened: Duration,
        mib: f64,
    ) {
        let of = |figure: fn(&(f64, Measured)) -> f64| median(runs.iter().map(figure));
        let (iops, cpu, ratio) =
            (of(|(_, run)| run.iops), of(|(_, run)| run.cpu_us), of(|(ratio, _)| *ratio));
        let (p50, p99) = (of(|(_, run)| f64::from(run.p50_us)), of(|(_, run)| f64::from(run.p99_us)));
        let opened = opened.as_secs_f64() * 1e3;
        let head = [blocks.to_string(), depth.to_string(), cache.to_owned(), server.to_owned()];
        let whole = [iops, p50, p99].map(|figure| format!("{figure:.0}"));
        let parts = [format!("{cpu:.2}"), format!("{ratio:.2}"), format!("{opened:.0}"), format!("{mib:.0}")];
        self.table.add_row(head.into_iter().chain(whole).chain(parts));
        self.figures.push(json!({
            "blocks": blocks, "overlays": depth, "cache": cache, "server": server, "iops": iops, "p50-us": p50, "p99-us": p99,
            "cpu-us": cpu, "cpu-to-raw": ratio, "opened-ms": opened, "anonymous-mib": mib,
        }));
        say(&format!(
            "{server}, {depth} overlays of {blocks} blocks: {ratio:.2} of a raw disk, opened in {opened:.0} ms, {mib:.0} MiB"
        ));
    }
}
