//! qemu-storage-daemon, as good as it gets here.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use frazil_integration::{Context, Error, Process, Result, Scratch, eventually};
use frazil_tests::{Load, Measured};

use crate::say;

/// How it does its I/O.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Of the `file` driver.
    file: &'static str,
    iothread: bool,
}

/// An image for it to serve.
pub(crate) enum Image<'a> {
    Raw,
    /// A new overlay on the raw image, with these options of `qemu-img create`.
    Overlay(&'a str),
    /// These images, the raw base first, each over the one before it; for reading only.
    Chain(&'a [PathBuf]),
}

/// A running qemu-storage-daemon that serves one image. It is killed when it is dropped.
pub(crate) struct Peer {
    process: Process,
    socket: PathBuf,
    opened: Duration,
}

impl Settings {
    const ALL: [Self; 6] = [
        Self { file: "aio=native,cache.direct=on", iothread: true },
        Self { file: "aio=native,cache.direct=on", iothread: false },
        Self { file: "aio=io_uring", iothread: true },
        Self { file: "aio=io_uring", iothread: false },
        Self { file: "aio=threads", iothread: true },
        Self { file: "aio=threads", iothread: false },
    ];

    /// Past the page cache, as a disk wants it.
    pub(crate) const fn direct(iothread: bool) -> Self {
        Self { file: "aio=native,cache.direct=on", iothread }
    }

    /// The settings with which random reads of `raw` cost it the least; those that do not work here are left out.
    pub(crate) fn best(scratch: &Scratch, raw: &Path) -> Result<Self> {
        let load = Load { write: false, block: 4096, depth: 32 };
        let mut best: Option<(f64, Self)> = None;
        for settings in Self::ALL {
            let cost = Peer::start(scratch, settings, raw, &Image::Raw).and_then(|peer| {
                let end = Instant::now() + Duration::from_millis(500);
                Ok(peer.run(load, || Instant::now() < end)?.cpu_us)
            });
            if let Ok(cost) = cost
                && best.is_none_or(|(least, _)| cost < least)
            {
                best = Some((cost, settings));
            }
        }
        let (_, settings) = best.ok_or_else(|| Error::new("qemu-storage-daemon serves nothing here"))?;
        say(&format!("qemu-storage-daemon is best with {}", settings.name()));
        Ok(settings)
    }

    pub(crate) fn name(self) -> String {
        format!("{}{}", self.file, if self.iothread { ", an iothread" } else { "" })
    }
}

impl Peer {
    /// Serves `raw`, or an overlay on it. Without locks, for Frazil has `raw` open too.
    pub(crate) fn start(
        scratch: &Scratch,
        settings: Settings,
        raw: &Path,
        image: &Image<'_>,
    ) -> Result<Self> {
        let (socket, log) = (scratch.path("peer.sock"), scratch.path("peer.log"));
        let _ = std::fs::remove_file(&socket);
        let mut words: Vec<String> = Vec::new();
        let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
        let file = |name: &str, path: &Path, more: &str| {
            let (path, how) = (path.display(), settings.file);
            format!("driver=file,node-name={name},filename={path},locking=off,{how}{more}")
        };
        match image {
            Image::Raw => {
                add("--blockdev", file("file", raw, ""));
                add("--blockdev", "driver=raw,node-name=disk,file=file".to_owned());
            }
            Image::Overlay(options) => {
                let overlay = scratch.path("peer.qcow2");
                create_overlay(&overlay, raw, options)?;
                add("--blockdev", file("base-file", raw, ",read-only=on"));
                add("--blockdev", "driver=raw,node-name=base,file=base-file,read-only=on".to_owned());
                add("--blockdev", file("file", &overlay, ""));
                add("--blockdev", "driver=qcow2,node-name=disk,file=file,backing=base".to_owned());
            }
            Image::Chain(images) => {
                for (index, path) in images.iter().enumerate() {
                    let node =
                        if index + 1 == images.len() { "disk".to_owned() } else { format!("node-{index}") };
                    let how = match index.checked_sub(1) {
                        None => "driver=raw".to_owned(),
                        Some(beneath) => format!("driver=qcow2,backing=node-{beneath}"),
                    };
                    add("--blockdev", file(&format!("file-{index}"), path, ",read-only=on"));
                    add("--blockdev", format!("{how},node-name={node},file=file-{index},read-only=on"));
                }
            }
        }
        let writable = if let Image::Chain(_) = image { "off" } else { "on" };
        if settings.iothread {
            add("--object", "iothread,id=worker".to_owned());
        }
        let worker = if settings.iothread { ",iothread=worker" } else { "" };
        let (kind, at) = ("type=vhost-user-blk,id=export,node-name=disk", socket.display());
        add("--export", format!("{kind},writable={writable},addr.type=unix,addr.path={at}{worker}"));
        let begun = Instant::now();
        let mut process = Process::spawn(Path::new("qemu-storage-daemon"), words, log)?;
        eventually("qemu-storage-daemon's socket", Duration::from_secs(10), || {
            process.check_alive()?;
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Self { process, socket, opened: begun.elapsed() })
    }

    /// How long it took until it could be connected to, to some 20 ms.
    pub(crate) fn opened(&self) -> Duration {
        self.opened
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn run(&self, load: Load, go_on: impl FnMut() -> bool) -> Result<Measured> {
        load.random(&self.socket, Some(self.process.id()), go_on).context("qemu-storage-daemon")
    }

    pub(crate) fn run_once(&self, load: Load, stride: u64) -> Result<Measured> {
        load.once(&self.socket, Some(self.process.id()), stride).context("qemu-storage-daemon")
    }
}

fn create_overlay(overlay: &Path, raw: &Path, options: &str) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-o", options, "-b"]).arg(raw).arg(overlay);
    let status = command.status().context("qemu-img")?;
    if status.success() { Ok(()) } else { Err(Error::new(format!("{command:?}: {status}"))) }
}
